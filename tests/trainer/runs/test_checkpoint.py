"""Models on disk: what is loaded is what was saved; what cannot be read is one line."""

import json
import os

import pytest
import torch
import vits
from cases import assert_same_to_rounding, in_float64
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.layers import GatedMlp
from torch import nn
from toy import GATES, gated_images, gated_vit, masked

import p3b
from p3b.runs.checkpoint import read_meta


@pytest.mark.parametrize(("name", "kind"), GATES)
def test_load_gives_back_what_was_saved(name, kind, tmp_path):
    empty = [(0, "out"), (3, "in")] if kind == "channels" else [(3, "inner")]
    small = p3b.shrink(masked(name, kind, share=0.4, empty=empty))
    folder = p3b.save(small, tmp_path / "run", meta={"mean": [0.5], "classes": 10})
    state = torch.random.get_rng_state()
    loaded = p3b.load(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_to_rounding(loaded(gated_images()), small(gated_images()), in_float64(small, gated_images()))
    assert read_meta(folder) == {"mean": [0.5], "classes": 10}
    assert sorted(os.listdir(folder)) == ["model.json", "model.safetensors"]
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), small.state_dict().values(), strict=True)
    )
    p3b.save(loaded, tmp_path / "again")  # what was loaded can be saved


@pytest.mark.parametrize("ratio", [1.25, 57 / 48, 15 / 11, 2.66667 * 2])
def test_any_number_of_hidden_channels_comes_back(ratio, tmp_path):
    model = gated_vit(embed_dim=44, num_heads=4, mlp_ratio=ratio)
    assert p3b.load(p3b.save(model, tmp_path)).blocks[0].mlp.fc1.weight.shape == model.blocks[0].mlp.fc1.weight.shape


def test_a_whole_model_can_be_saved_too(tmp_path):
    model = gated_vit("layer_scale")
    loaded = p3b.load(p3b.save(model, tmp_path))
    assert_same_to_rounding(loaded(gated_images()), model(gated_images()), in_float64(model, gated_images()))


def saved(tmp_path):
    return p3b.save(p3b.shrink(masked()), tmp_path / "run")


def test_a_folder_that_holds_a_model_is_refused(tmp_path):
    folder = saved(tmp_path)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(ValueError, match=r"save: .* already has a model"):
        p3b.save(gated_vit(), folder)
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
    with pytest.raises(ValueError, match=r"load: .* has no model\.json"):
        p3b.load(tmp_path)
    folder = saved(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"load: .* has no model\.safetensors"):
        p3b.load(folder)
    other = p3b.save(p3b.shrink(masked(share=0.3)), tmp_path / "other")
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="load: the weights do not fit the described model") as error:
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
    with pytest.raises(ValueError, match=r"load: the model in model\.json is not a valid timm ViT") as error:
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
        p3b.save(gated_vit(), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []
    with pytest.raises(ValueError, match="meta must be plain JSON"):
        p3b.save(gated_vit(), tmp_path / "other", meta={"model": gated_vit()})
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_described_says_so(tmp_path):
    with pytest.raises(
        NotImplementedError, match="save: mlp must be one of Mlp, GluMlp, SwiGLUPacked, SwiGLU, got GatedMlp"
    ):
        p3b.save(vits.family("deit", mlp_layer=GatedMlp), tmp_path / "run")
    with pytest.raises(NotImplementedError, match=r"save: activation must be one of GELU, .*, got Mish"):
        p3b.save(vits.family("deit", act_layer=nn.Mish), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def kept(model, folder):
    """The model saved and loaded, which must compute the same."""
    loaded = p3b.load(p3b.save(model.eval(), folder))
    truth = in_float64(model, gated_images())
    assert_same_to_rounding(loaded(gated_images()), model(gated_images()), truth)
    return loaded


@pytest.mark.parametrize("pruned", [True, False])
def test_a_model_is_described_as_it_is_when_it_is_saved(pruned, tmp_path):
    """Not as it was at the shrink or when it was loaded."""
    model = p3b.shrink(masked()) if pruned else gated_vit()
    model = kept(model, tmp_path / "begin")
    model.reset_classifier(4)
    model = kept(model, tmp_path / "classes")
    model.reset_classifier(6, global_pool="avg")
    model = kept(model, tmp_path / "pooling")
    assert model.global_pool == "avg" and model.num_classes == 6
    model.pool_include_prefix = True
    model = kept(model, tmp_path / "prefix")
    model.set_input_size((24, 16))
    loaded = p3b.load(p3b.save(model.eval(), tmp_path / "size"))
    images = gated_images()[..., :24, :16]
    assert_same_to_rounding(loaded(images), model(images), in_float64(model, images))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("blocks.1.mlp.act", nn.ReLU(), "blocks.1.mlp.act is a ReLU, where its description gives a GELU"),
        ("blocks.1.norm1.eps", 0.5, "blocks.1.norm1 has eps=0.5, where"),
        ("norm.eps", 0.5, "norm has eps=0.5, where"),
        ("blocks.1.attn.scale", 0.5, "blocks.1.attn has scale=0.5, where"),
        ("head.forward", lambda x: x, "head has a forward of its own"),
    ],
)
@pytest.mark.parametrize("pruned", [True, False])
def test_a_model_that_would_load_as_another_is_refused(pruned, part, value, message, tmp_path):
    model = p3b.shrink(masked()) if pruned else gated_vit()
    name, _, attribute = part.rpartition(".")
    setattr(model.get_submodule(name), attribute, value)
    with pytest.raises(NotImplementedError, match=message):
        p3b.save(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_preprocessing_of_the_weights_is_kept(tmp_path):
    """As timm.data.resolve_model_data_config reads it."""
    cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "crop_pct": 0.9, "interpolation": "bilinear", "url": "x"}
    model = gated_vit()
    model.pretrained_cfg = cfg | {"input_size": (3, 224, 224), "label_names": ["a", "b"]}
    loaded = p3b.load(p3b.save(model, tmp_path / "run"))
    expected = cfg | {"input_size": (3, *model.patch_embed.img_size)}
    actual = resolve_model_data_config(loaded)
    assert {key: actual[key] for key in expected if key != "url"} == {k: v for k, v in expected.items() if k != "url"}
    assert "url" not in loaded.pretrained_cfg and loaded.pretrained_cfg["num_classes"] == model.num_classes
    assert "label_names" not in loaded.pretrained_cfg  # two names for other classes


def test_a_run_saved_without_preprocessing_has_that_of_its_data(tmp_path):
    meta = {"data": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    folder = p3b.save(gated_vit(), tmp_path / "run", meta=meta)
    description = json.loads((folder / "model.json").read_text())
    del description["pretrained_cfg"]
    (folder / "model.json").write_text(json.dumps(description))
    actual = resolve_model_data_config(p3b.load(folder))
    assert actual["mean"] == (0.1, 0.2, 0.3) and actual["std"] == (0.4, 0.5, 0.6)
