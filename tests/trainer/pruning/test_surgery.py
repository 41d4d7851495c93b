"""The shrink is exact: masked and shrunk model agree to 1e-5 in float32, on random weights, at all ratios,
with empty gates."""

import copy
import json
import os

import pytest
import torch
import vits
from safetensors import SafetensorError
from timm.layers import GatedMlp
from torch import nn

import p3b
from p3b.pruning.gates import attach
from p3b.pruning.sub_blocks import outside_cost
from p3b.runs.checkpoint import read_meta
from p3b_ext import PPT, ToMe, patch, unpatch

FAMILIES = [
    *("deit", "distilled", "augreg_no_qkv_bias", "gap", "layer_scale", "qk_norm", "qk_norm_scale_norm"),
    *("reg4_gap", "no_embed_class", "pre_norm", "registers_dinov2", "glu_norm", "aimv2", "map"),
]
GATES = {"in": 0, "out": 1, "inner": 2}


def vit(name="deit", **options):
    return vits.family(name, **({"img_size": (32, 24), "patch_size": 8, "depth": 3} | options))


def images():
    return torch.randn(3, 3, 32, 24, generator=torch.Generator().manual_seed(1))


def masked(name="deit", share=0.5, empty=(), seed=0, **options):
    """A model under random 0/1 masks; `empty` lists (sub-block, gate) to switch off altogether."""
    model = vit(name, **options)
    gates = attach(model)
    values = (torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(seed)) < share).float()
    for place, gate in empty:
        values[gates.blocks[place].slices()[GATES[gate]]] = 0
    gates.set(values)
    return model


def same(actual, expected):
    """Equal to 1e-5 of the logits' size, in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


def check(model):
    gates = model.p3b_gates
    predicted = int(gates.kept_cost().sum()) + int(outside_cost(model, gates.blocks, "params"))
    expected = model(images())
    small = p3b.shrink(model)
    assert small is model
    same(small(images()), expected)
    assert sum(p.numel() for p in small.parameters()) == predicted
    return small


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("name", FAMILIES)
def test_shrunk_equals_masked(name, share):
    check(masked(name, share))


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("half", [0, 1], ids=["attn", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_shrunk_equals_masked_with_an_empty_gate(name, half, gate):
    check(masked(name, 0.6, [(2 + half, gate)]))


def test_shrunk_block_asks_an_attention_only_for_what_it_knows():
    """The attention of timm 1.0.23 takes no `is_causal`; an unpatched shrunk model runs it."""
    model = check(masked())
    expected = model(images())
    for block in model.blocks:
        whole = block.attn.forward
        block.attn.forward = lambda x, attn_mask=None, whole=whole: whole(x, attn_mask=attn_mask)
    same(model(images()), expected)


def test_skipped_halves_do_not_run():
    everything = [(place, gate) for place in (0, 3) for gate in GATES]
    small = check(masked(share=0.6, empty=everything))
    first, second = small.blocks[0], small.blocks[1]
    assert first.attn is None and first.attn_constant is None and first.mlp is not None
    assert second.mlp is None and second.mlp_constant is None and second.attn is not None
    assert not list(first.norm1.parameters())
    empty = check(masked(share=0.0))
    assert sum(p.numel() for p in empty.blocks.parameters()) == 0


def test_whole_model_stays_as_it_is():
    small = check(masked(share=1.1))
    before = sum(p.numel() for p in vit().parameters())
    assert sum(p.numel() for p in small.parameters()) == before
    assert list(small.state_dict()) == list(vit().state_dict())


def test_soft_masks_are_rounded():
    model = vit()
    gates = attach(model)
    gates.set(torch.rand(gates.values.shape, generator=torch.Generator().manual_seed(3)))
    rounded = copy.deepcopy(model)
    rounded.p3b_gates.harden()
    same(p3b.shrink(model)(images()), rounded(images()))


def test_float64_agrees_to_rounding():
    model = masked("qk_norm", 0.5).double()
    expected = model(images().double())
    torch.testing.assert_close(p3b.shrink(model)(images().double()), expected, rtol=1e-6, atol=1e-6)


def test_gradients_agree_too():
    """The kept weights learn the same under the mask and after the shrink (q's rows apart, which carry the
    logit scale)."""
    model = masked("layer_scale", 0.5)
    twin = copy.deepcopy(model)
    small = p3b.shrink(twin)
    kept = small.p3b_kept["blocks.1.mlp"]
    model(images()).square().sum().backward()
    small(images()).square().sum().backward()
    wide, narrow = model.blocks[1].mlp.fc1.weight.grad, small.blocks[1].mlp.fc1.weight.grad
    expected = wide[kept["inner"]][:, kept["in"]]
    torch.testing.assert_close(narrow, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(
        small.patch_embed.proj.weight.grad, model.patch_embed.proj.weight.grad, rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("name", ["deit", "qk_norm", "layer_scale"])
def test_pruned_model_runs_on_fused_and_stock_attention(name):
    small = check(masked(name, 0.4, [(2, "inner"), (5, "out")]))
    expected = small(images())
    same(patch(small)(images()), expected)
    same(unpatch(small)(images()), expected)
    small.blocks[0].attn.fused_attn = False  # timm's own arithmetic instead of PyTorch's kernel
    same(small(images()), expected)


@pytest.mark.parametrize("name", ["deit", "qk_norm", "gap", "layer_scale"])
def test_token_reduction_does_the_same_to_the_masked_and_the_shrunk_model(name):
    """Keys, values and class attention of the kept channels decide which tokens go; the cut ones were zero."""
    reductions = [ToMe(r=2)] if name == "gap" else [ToMe(r=2), PPT(r=3, blocks=(1, 2), threshold=1e-3)]
    for reduction in reductions:
        model = masked(name, 0.6, [(1, "out"), (3, "in")])
        expected = patch(model, reduction)(images())
        dense = unpatch(model)(images())
        assert not torch.allclose(expected, dense, rtol=1e-3, atol=1e-3)
        same(patch(p3b.shrink(model), reduction)(images()), expected)


def test_reduction_in_a_block_without_attention_says_so():
    small = check(masked(share=0.6, empty=[(2, "out")]))
    with pytest.raises(ValueError, match="blocks must be ones with attention, got 1"):
        patch(small, PPT(r=3, blocks=(1,)))
    with pytest.raises(NotImplementedError, match="attention must exist where tokens are reduced"):
        small.blocks[1].attention_half(torch.zeros(1, 13, 48), aux=("cls_attention",))
    assert patch(small, PPT(r=3, blocks=(2,)))(images()).isfinite().all()
    assert patch(small, ToMe(r=2))(images()).isfinite().all()  # passes over the block


def test_shrink_needs_gates():
    with pytest.raises(ValueError, match="shrink: the model has no gates"):
        p3b.shrink(vit())


def test_a_pruned_model_cannot_be_pruned_again():
    with pytest.raises(NotImplementedError, match="the model is pruned already"):
        attach(check(masked(share=0.5)))


# on disk


@pytest.mark.parametrize("name", FAMILIES)
def test_load_gives_back_what_was_saved(name, tmp_path):
    small = check(masked(name, 0.4, [(0, "out"), (3, "in")]))
    folder = p3b.save(small, tmp_path / "run", meta={"mean": [0.5], "classes": 10})
    state = torch.random.get_rng_state()
    loaded = p3b.load(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    same(loaded(images()), small(images()))
    assert read_meta(folder) == {"mean": [0.5], "classes": 10}
    assert sorted(os.listdir(folder)) == ["model.json", "model.safetensors"]
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), small.state_dict().values(), strict=True)
    )
    p3b.save(loaded, tmp_path / "again")  # what was loaded can be saved


@pytest.mark.parametrize("ratio", [1.25, 57 / 48, 15 / 11, 2.66667 * 2])
def test_any_number_of_hidden_channels_comes_back(ratio, tmp_path):
    model = vit(embed_dim=44, num_heads=4, mlp_ratio=ratio)
    assert p3b.load(p3b.save(model, tmp_path)).blocks[0].mlp.fc1.weight.shape == model.blocks[0].mlp.fc1.weight.shape


def test_a_whole_model_can_be_saved_too(tmp_path):
    model = vit("layer_scale")
    same(p3b.load(p3b.save(model, tmp_path))(images()), model(images()))


def saved(tmp_path):
    return p3b.save(check(masked(share=0.5)), tmp_path / "run")


def test_a_folder_that_holds_a_model_is_refused(tmp_path):
    folder = saved(tmp_path)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(ValueError, match="save: folder must not hold a model yet"):
        p3b.save(vit(), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_files_cut_short_are_one_line_errors(tmp_path, file, share):
    folder = saved(tmp_path)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="load: ") as error:
        p3b.load(folder)
    assert "\n" not in str(error.value)


def test_missing_and_foreign_files_are_one_line_errors(tmp_path):
    with pytest.raises(ValueError, match=r"load: folder must hold model\.json"):
        p3b.load(tmp_path)
    folder = saved(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"load: folder must hold model\.safetensors"):
        p3b.load(folder)
    other = p3b.save(check(masked(share=0.3)), tmp_path / "other")
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="load: weights must fit the described model") as error:
        p3b.load(other)
    assert "\n" not in str(error.value)
    for text in ('{"format": "else"}', "[1]", json.dumps({"format": "p3b", "version": 99})):
        (other / "model.json").write_text(text)
        with pytest.raises(ValueError, match="load: "):
            p3b.load(other)


@pytest.mark.parametrize(
    ("argument", "value"), [("num_heads", 0), ("embed_dim", -5), ("depth", "2"), ("img_size", None)]
)
def test_descriptions_that_no_model_fits_are_one_line_errors(tmp_path, argument, value):
    folder = saved(tmp_path)
    description = json.loads((folder / "model.json").read_text())
    description["model"]["arguments"][argument] = value
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"load: model\.json must describe a timm ViT") as error:
        p3b.load(folder)
    assert "\n" not in str(error.value)


def test_a_description_without_meta_has_none(tmp_path):
    folder = saved(tmp_path)
    description = json.loads((folder / "model.json").read_text())
    del description["meta"]
    (folder / "model.json").write_text(json.dumps(description))
    assert read_meta(folder) == {}


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch, kind):
    def full_disk(*_):
        raise kind("No space left on device")

    monkeypatch.setattr("p3b.runs.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        p3b.save(vit(), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []
    with pytest.raises(ValueError, match="meta must be plain JSON"):
        p3b.save(vit(), tmp_path / "other", meta={"model": vit()})
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_described_says_so(tmp_path):
    with pytest.raises(
        NotImplementedError, match="save: mlp must be one of Mlp, GluMlp, SwiGLUPacked, SwiGLU, got GatedMlp"
    ):
        p3b.save(vits.family("deit", mlp_layer=GatedMlp), tmp_path / "run")
    with pytest.raises(NotImplementedError, match=r"save: activation must be one of GELU, .*, got Mish"):
        p3b.save(vits.family("deit", act_layer=nn.Mish), tmp_path / "run")
    assert not (tmp_path / "run").exists()
