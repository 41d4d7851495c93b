"""FLOPs that torch.utils.flop_counter counts of a patched model: those of timm's own."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import p3b_ext
from p3b_ext.ops.attention import packed_attention

OPTIONS = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def deit(**options):
    return timm.create_model("deit_tiny_patch16_224", **OPTIONS, **options)


@pytest.mark.parametrize("linear", ["torch", "onednn"])
@pytest.mark.parametrize("name", ["packed", "qk_norm"])
def test_a_patched_model_counts_as_timms(name, linear):
    model, x = deit(qk_norm=name == "qk_norm"), torch.randn(2, 3, 64, 64)
    n, c = 17, OPTIONS["embed_dim"]

    def forward():
        with torch.no_grad():
            model(x)

    def forward_and_backward():
        model(x).square().sum().backward()

    alone, both = flops(forward), flops(forward_and_backward)
    macs = 2 * (16 * 3 * 16 * 16 * c + 2 * (n * 12 * c * c + 2 * n * n * c) + 10 * c)
    assert alone == 2 * macs == 2 * 2 * p3b_ext.count_macs(model)
    p3b_ext.patch(model, linear=linear)
    assert flops(forward) == alone and flops(forward_and_backward) == both > 2 * alone


def test_fewer_tokens_are_fewer_flops():
    model, x = deit().eval(), torch.randn(1, 3, 64, 64)
    p3b_ext.patch(model, p3b_ext.TopK(0.5, blocks=(0,)))
    with torch.no_grad():
        assert flops(lambda: model(x)) == 2 * p3b_ext.count_macs(model)


def test_ops():
    """With a gradient of q alone too: the kernel computes all three."""
    batch, heads, n, d = 2, 3, 5, 8
    product = 2 * batch * heads * n * n * d
    q, k, v = torch.randn(3, batch, heads, n, d).unbind(0)
    assert flops(lambda: p3b_ext.masked_attention(q, k, v)) == 2 * product
    assert flops(lambda: p3b_ext.masked_attention(q, k, v, aux=("to_cls",))) == 2 * product + product // n
    assert flops(lambda: p3b_ext.masked_attention(q, k, v, aux=("received",))) == 3 * product
    assert flops(lambda: packed_attention(torch.randn(batch, n, 3, heads, d))) == 2 * product
    q.requires_grad_()
    assert flops(lambda: p3b_ext.masked_attention(q, k, v).sum().backward()) == 7 * product
