"""p3b_ext.Attention against timm's, for every option of its constructor and its forward."""

import copy

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from cases import assert_same_to_rounding, assert_within, in_float64
from torch import nn

import p3b_ext.modules
from p3b_ext.modules import Attention

OPTIONS = {
    "plain": {},
    "qkv_bias": {"qkv_bias": True},
    "no_proj_bias": {"proj_bias": False},
    "qk_norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "rms_norm": {"qk_norm": True, "norm_layer": timm.layers.RmsNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "head_dim": {"attn_head_dim": 10},
    "dim_out": {"dim_out": 20},
    "proj_drop": {"proj_drop": 0.2},
}


def pair(**options):
    """timm's layer and ours with the same weights."""
    theirs = timm.layers.Attention(24, 3, **options)
    ours = Attention(24, 3, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert not any(ours.load_state_dict(theirs.state_dict()))
    return theirs, ours


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_equals_timms(options, training):
    theirs, ours = pair(**options)
    results = []
    for layer in (copy.deepcopy(theirs).double(), theirs, ours):
        torch.manual_seed(1)
        x = torch.randn(2, 9, 24).to(layer.proj.weight.dtype).requires_grad_()
        torch.manual_seed(2)  # the same elements are dropped in every dtype
        y = layer.train(training)(x)
        y.square().mean().backward()  # the key norm's bias has a gradient of 0: terms around 1 that cancel
        results.append({"y": y, "x.grad": x.grad} | {name: p.grad for name, p in layer.named_parameters()})
    for name, truth in results[0].items():
        assert_within(name, results[2][name], truth, results[1][name], torch.float32)


def test_gated():
    try:
        theirs, ours = pair(gated=True)
    except TypeError:
        pytest.skip("this timm has no gated attention")
    x = torch.randn(2, 9, 24)
    assert_same_to_rounding(ours(x), theirs(x), in_float64(theirs, x))


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(9, 9) < 0.7,
        torch.randn(9, 9),
        torch.rand(2, 1, 9, 9) < 0.7,
        torch.rand(2, 1, 1, 9) < 0.7,
        torch.rand(1, 1, 1, 9) < 0.7,
    ],
    ids=lambda mask: f"{mask.dtype}{list(mask.shape)}",
)
@pytest.mark.parametrize("options", [{}, OPTIONS["qk_norm"]], ids=["packed", "qk_norm"])
def test_masks(mask, options):
    if mask.dtype == torch.bool:
        mask = mask.clone()
        mask[..., 0] = True
    theirs, ours = pair(**options)
    x = torch.randn(2, 9, 24)
    exact, wide = copy.deepcopy(theirs).double(), mask if mask.dtype == torch.bool else mask.double()
    truth = exact(x.double(), attn_mask=wide)
    assert_same_to_rounding(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), truth)


def test_causal():
    _, ours = pair()
    x = torch.randn(2, 9, 24)
    q, k, v = ours.qkv(x).reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 9, 24)
    torch.testing.assert_close(ours(x, is_causal=True), ours.proj(expected))


@pytest.mark.parametrize("size", [False, True])
def test_dropout_is_pytorchs(size):
    _, ours = pair(attn_drop=0.4)
    x, token_size = torch.randn(2, 9, 24), 1 + torch.rand(2, 9) if size else None
    q, k, v = ours.qkv(x).reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
    bias = token_size.log()[:, None, None] if size else None
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(q, k, v, bias, 0.4).transpose(1, 2).reshape(2, 9, 24)
    torch.manual_seed(3)
    result = ours(x, token_size=token_size, aux=("cls_attention",), metric=True)
    torch.testing.assert_close(result.x, ours.proj(expected))
    _, aux = p3b_ext.masked_attention(q, k, v, token_size=token_size, aux=("cls_attention",))
    torch.testing.assert_close(result.aux.cls_attention, aux.cls_attention)  # of the attention without dropout
    ours.eval()
    torch.testing.assert_close(ours(x), Attention.forward(ours, x))


@pytest.mark.parametrize("options", [{}, OPTIONS["qk_norm"]], ids=["packed", "qk_norm"])
def test_side_outputs(options):
    _, ours = pair(**options)
    x, size, mask = torch.randn(2, 9, 24), 1 + torch.rand(2, 9), torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    names = ("lse", "cls_attention", "entropy", "value_norm", "to_cls", "received")
    y, aux, metric = ours(x, mask, token_size=size, aux=names, metric=True)
    q, k, v = ours.qkv(x).reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
    q, k = ours.q_norm(q), ours.k_norm(k)
    out, expected = p3b_ext.masked_attention(q, k, v, key_mask=mask[:, 0, 0], token_size=size, aux=names)
    torch.testing.assert_close(y, ours.proj(out.transpose(1, 2).reshape(2, 9, 24)))
    for name in names:
        torch.testing.assert_close(getattr(aux, name), getattr(expected, name))
    torch.testing.assert_close(metric, k.mean(1))
    assert torch.equal(ours(x, mask, aux=(), metric="heads").metric.mean(1), ours(x, mask, aux=(), metric=True).metric)
    assert ours(x, aux=()).metric is None


def test_no_norm_reads_qkv_packed(monkeypatch):
    calls = []
    real = p3b_ext.modules.packed_attention
    monkeypatch.setattr(p3b_ext.modules, "packed_attention", lambda *a, **k: calls.append(a) or real(*a, **k))
    x = torch.randn(2, 9, 24)
    pair()[1](x)
    assert len(calls) == 1
    pair(**OPTIONS["qk_norm"])[1](x)
    assert len(calls) == 1


def test_as_attn_layer():
    model = timm.create_model("deit_tiny_patch16_224", attn_layer=Attention, img_size=32, depth=2).eval()
    plain = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same_to_rounding(model(x), plain(x), in_float64(plain, x))


def test_bad_input():
    _, ours = pair()
    x, size = torch.randn(2, 9, 24), torch.ones(2, 9)
    with pytest.raises(NotImplementedError, match="Attention: is_causal must be False together with token_size"):
        ours(x, is_causal=True, token_size=size)
    with pytest.raises(NotImplementedError, match=r"Attention: attn_mask must be bool \[2, 1, 1, 9\] together"):
        ours(x, torch.zeros(9, 9), aux=("lse",))
    with pytest.raises(ValueError, match="packed_attention: aux must be names out of"):
        ours(x, aux=("best",))
    with pytest.raises(ValueError, match="token_size must have shape"):
        ours(x, token_size=size[:, 1:])
