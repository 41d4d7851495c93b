# SPDX-License-Identifier: MIT
"""Files that run without this software: `.pt2` and ONNX of whole, pruned and token-reduced models, and their checks."""

import functools
import importlib.util
import json

import numpy as np
import pytest
import torch
from cases import assert_near
from vits import family, images

from p3b.cli import main
from p3b.deploy import export
from p3b.experiments import benchmark as bench
from p3b.metrics import cost as costs
from p3b.metrics.cost import Deployed
from p3b.models.description import describe
from p3b.pruning.surgery import cut
from p3b.runs import checkpoint
from p3b.runs.job import model_and_meta
from p3b_ext import PPT, EViT, ToMe, TopK, patch

missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2}
REDUCTIONS = {
    "dense": None,
    "tome": ToMe([3]),
    "ppt": PPT(r=3, blocks=(0,), threshold=2e-3),
    "evit": EViT(keep_rate=0.6, blocks=(0,)),
    "topk by entropy": TopK(keep_rate=0.6, blocks=(0,), score="entropy_value"),
}
META = {"class_names": ["été", "b"], "mean": [0.5] * 3, "std": [0.25] * 3}
RUNTIME = {"pt2": "torch.export", "onnx": "onnxruntime"}
ONNX_RUNTIMES = [name for name in export.READERS["onnx"] if importlib.util.find_spec(name) is not None]


pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(name="deit", **options):
    """A model whose halves keep some channels, one half nothing but a constant."""
    model = family(name, **(SMALL | options))
    generator = torch.Generator().manual_seed(0)

    def some(width, count):
        return torch.randperm(width, generator=generator)[:count].sort().values.tolist()

    width = model.embed_dim
    kept = {
        f"blocks.{i}.{half}": {"in": some(width, 15), "out": some(width, 11), "inner": some(inner, inner // 2)}
        for i, block in enumerate(model.blocks)
        for half, inner in (("attn", block.attn.head_dim), ("mlp", block.mlp.fc1.out_features))
    }
    kept["blocks.1.mlp"]["inner"] = []
    cut(model, kept)
    return patch(model)


def small(reduction=None, name="deit", **options):
    return patch(family(name, **(SMALL | options)), reduction)


def pixels(batch, seed=3):
    return images(batch, 32, seed)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Makes files that take any batch, once: (name of a reduction, format) -> model, path, what `export` said."""
    made = {}

    def write(name, format):
        if (name, format) not in made:
            model, path = small(REDUCTIONS[name]), tmp_path_factory.mktemp("written") / f"model.{format}"
            found = export.export(model, path, images=[pixels(5), pixels(5)], meta=META)
            made[name, format] = model, path, found
        return made[name, format]

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "tome", "ppt", "evit"])
def test_pt2_holds_pytorchs_operators_and_takes_any_batch(name, written):
    model, path, found = written(name, "pt2")
    assert found["checks"]["torch.export"]["random"]["relative"] < 1e-4
    program = torch.export.load(path)
    used = export.operators(program)
    assert "aten.linear.default" in used and all(each.startswith("aten.") for each in used)
    assert "aten.logsumexp.default" not in used and "aten.scaled_dot_product_attention.default" in used
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    module = program.module()
    with torch.no_grad():
        for batch in (1, 7):
            assert_near(module(pixels(batch)), model(pixels(batch)), roundings=1024)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("name", ["tome", "ppt", "topk by entropy"])
def test_onnx_takes_any_batch_in_standard_operators(name, written):
    import onnx

    model, path, found = written(name, "onnx")
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"} and not proto.functions
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)  # paths of source files
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    ]
    assert shapes == [["batch", 3, 32, 32], ["batch", 10]]
    for runtime in ONNX_RUNTIMES:
        assert found["checks"][runtime]["random"]["relative"] < 1e-4
        run = export.READERS["onnx"][runtime](path, 1)
        with torch.no_grad():
            for batch in (1, 7):
                assert_near(run(pixels(batch)), model(pixels(batch)), roundings=1024)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("distilled", "pt2"),
        ("registers_dinov2", "pt2"),
        pytest.param("gap_final_norm", "onnx", marks=needs_onnx),
        pytest.param("qk_norm_scale_norm", "onnx", marks=needs_onnx),
    ],
)
def test_families(name, format, tmp_path):
    model = small(ToMe([3], source=3), name)
    checks = export.export(model, tmp_path / f"model.{format}", batch=2)["checks"]
    assert checks[RUNTIME[format]]["random"]["relative"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_pruned_models(format, tmp_path):
    model = patch(pruned(), REDUCTIONS["ppt"] if format == "onnx" else None)
    checks = export.export(model, tmp_path / f"model.{format}", batch=2)["checks"]
    assert checks[RUNTIME[format]]["random"]["relative"] < 1e-4


@needs_onnx
def test_ties_go_to_the_lower_index_in_every_runtime(tmp_path):
    class Sort(torch.nn.Module):
        def forward(self, x):
            orders = [x.argsort(dim=-1, descending=down, stable=True) for down in (False, True)]
            orders += [(x > 0).to(torch.int32).argsort(dim=-1, descending=down, stable=True) for down in (False, True)]
            return torch.stack(orders, 1).to(x.dtype)

    x = torch.randint(-2, 3, (3, 50), generator=torch.Generator().manual_seed(0)).float()
    x[0, ::3] = -torch.inf
    program = torch.export.export(Sort(), (x,))
    proto, path = export.to_onnx(program), tmp_path / "sort.onnx"
    path.write_bytes(proto.SerializeToString())
    for runtime in ONNX_RUNTIMES:
        assert torch.equal(export.READERS["onnx"][runtime](path, 1)(x), Sort()(x)), runtime


def test_half_precision(tmp_path):
    found = export.export(small(), tmp_path / "model.pt2", dtype=torch.bfloat16)
    assert "bfloat16" in found["input"]
    with torch.no_grad():
        assert export.pt2_run(tmp_path / "model.pt2", 1)(pixels(2).bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_the_file_describes_itself(format, written):
    model, path, found = written("tome", format)
    assert found == export.read_metadata(path)
    assert {key: found[key] for key in META} == META
    assert found["size"] == [3, 32, 32] and found["input"].startswith("images [batch, 3, 32, 32], float32")
    assert found["reduction"]["name"] == "ToMe" and found["reduction"]["r"] == [3]
    assert found["tokens_after_block"] == [14, 14]
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["checks"][RUNTIME[format]]["data"]["images"] == 8  # of 10: whole batches
    text = export.summary(path, found)
    assert f"{RUNTIME[format]}: largest difference of a logit" in text and "8 data images" in text
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    def wrong(path, threads, dtype):
        run = export.pt2_run(path, threads, dtype)
        return lambda x: run(x) + 0.1

    monkeypatch.setitem(export.READERS["pt2"], "torch.export", wrong)
    with pytest.raises(ValueError, match=r"export: the logits of torch\.export differ .* more than 0\.001"):
        export.export(small(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_an_operator_that_onnx_does_not_have():
    class Special(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    program = torch.export.export(Special(), (torch.ones(2),))
    with pytest.raises(ValueError, match=r"export: torch\.onnx cannot convert the model \(.*bessel_j0"):
        export.to_onnx(program)


@pytest.mark.slow
@needs_onnx
def test_a_runtime_that_cannot_read_the_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "READERS", {"onnx": {"onnxruntime": export.onnxruntime_run, "no_such_runtime": export.onnxruntime_run}}
    )
    found = export.export(small(), tmp_path / "model.onnx", dtype=torch.bfloat16)["checks"]
    assert "bfloat16" in found["onnxruntime"]["not_checked"]
    assert "not installed" in found["no_such_runtime"]["not_checked"]
    assert "not checked" in export.summary(tmp_path / "model.onnx", export.read_metadata(tmp_path / "model.onnx"))


def test_bad_input(tmp_path, monkeypatch):
    model, path = small(), tmp_path / "model.pt2"
    for batch in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="export: batch must be 1 or more"):
            export.export(model, path, batch=batch)
    with pytest.raises(ValueError, match="export: dtype must be one of float32"):
        export.export(model, path, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"output: file must end in \.onnx or \.pt2"):
        export.export(model, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"output: file must end in \.onnx for format onnx"):
        export.export(model, path, format="onnx")
    with pytest.raises(ValueError, match="export: meta must be plain JSON values"):
        export.export(model, path, meta={"mean": torch.ones(3)})
    with pytest.raises(ValueError, match="export: images has fewer than one batch of 4"):
        export.export(model, path, batch=4, images=[pixels(2)])
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="output: file must be new"):
        export.export(model, path)
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx is not installed: pip install 'p3b_ext\[export\]'"):
        export.export(model, tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a pruned model of two classes on an array set."""
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    labels = np.arange(16) % 2
    arrays = rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "two.npz", x_train=arrays, y_train=labels, x_test=arrays, y_test=labels)
    data = {"source": str(folder / "two.npz"), "img_size": [32, 32], "batch_size": 8, "crop_pct": 0.875}
    data |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    model = pruned(num_classes=2)
    model.p3b_description = describe(family("deit", **SMALL, num_classes=2))
    checkpoint.save(model, folder / "run", meta={"data": data, "class_names": ["hen", "owl"], "top1": 50.0})
    return folder / "run"


@pytest.mark.slow
def test_the_command_writes_a_runs_model(run, tmp_path, capsys):
    path = tmp_path / "new" / "two.pt2"
    flags = ["--reduction", "ppt", "--blocks", "0", "--prune-share", "0.5", "--data", "run", "--output", path]
    assert main([str(each) for each in ["export", run, *flags]]) == 0
    out = capsys.readouterr().out
    assert "same top-1 class" in out and "(16 data images)" in out and f"written to {path}" in out
    found = export.read_metadata(path)
    assert found["class_names"] == ["hen", "owl"] and found["mean"] == [0.5] * 3 and found["reduction"]["name"] == "PPT"
    assert "crop_pct" not in found  # arrays are resized whole
    assert json.dumps(found["reduction"]["threshold"])


def test_the_command_names_mistakes(run, tmp_path, capsys):
    def fails(*flags):
        assert main([str(each) for each in ["export", *flags]]) == 2
        error = capsys.readouterr().err
        assert error.startswith("p3b export: ") and error.count("\n") == 1
        return error

    path = tmp_path / "model.pt2"
    assert "r: needs a token reduction; give --reduction too" in fails(run, "--r", 3, "--output", path)
    assert "batch must be 1 or more" in fails(run, "--batch", 0, "--output", path)
    assert "exclude each other" in fails(run, "--batch", 2, "--dynamic-batch", "--output", path)
    assert "a threshold is calibrated on images: give --data" in fails(
        run, "--reduction", "ppt", "--prune-share", 0.5, "--output", path
    )
    assert "name must be one of" in fails(run, "--reduction", "tomme", "--output", path)
    assert "name must be one that timm knows" in fails("no_such_model", "--output", path)
    flags = ["vit_tiny_patch16_224", "--no-pretrained", "--data", "run", "--output", path]
    assert "a timm model has no images of its own" in fails(*flags)
    assert not path.exists()


@pytest.mark.slow
@needs_onnx
def test_bench_runs_the_models_in_other_runtimes(tmp_path):
    labels = torch.arange(9) % 10
    steps = []
    found = bench.compare(
        {"dense": family("deit", **SMALL)},
        ["topk"],
        [(pixels(9), labels)],
        batch_size=6,
        repeats=1,
        runtimes=["onnxruntime"],
        step=lambda *begun: steps.append(begun),
    )
    assert [total for _, total in steps] == [len(steps)] * len(steps)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["dense", "dense + p3b_ext", "TopK 0.70", "dense + onnxruntime", "TopK 0.70 + onnxruntime"]
    for name in ("dense", "TopK 0.70"):
        here, there = rows[name], rows[f"{name} + onnxruntime"]
        assert (here.top1, here.params, here.macs) == (there.top1, there.params, there.macs)
        assert there.peak_memory is None and there.images_per_second > 0
    bench.write(tmp_path, found, title="t", conditions="c", command="p3b bench")
    assert "| TopK 0.70 + onnxruntime" in (tmp_path / "bench.md").read_text()
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][3]["peak_memory"] is None
    assert (tmp_path / "bench.png").stat().st_size > 0


def test_bench_names_runtimes_that_it_cannot_have(run, capsys, monkeypatch):
    def fails(*flags):
        assert main(["bench", str(run), "--device", "cpu", *flags]) == 2
        return capsys.readouterr().err

    assert "names must be of onnxruntime, openvino, compile, got 'tensorrt'" in fails("--runtimes", "tensorrt")
    error = fails("--runtimes", "onnxruntime", "--dtype", "bfloat16")
    assert "dtype must be float32 for onnxruntime, got bfloat16" in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "openvino is not installed: pip install 'p3b_ext[openvino]'" in fails("--runtimes", "openvino")


def test_another_runtime_takes_batches_of_one_size():
    sizes = []

    def run(x):
        sizes.append(len(x))
        return x.flatten(1).sum(1, keepdim=True)

    model = small()
    x = pixels(10)
    torch.testing.assert_close(Deployed(model, run, 4)(x), x.flatten(1).sum(1, keepdim=True))
    assert sizes == [4, 4, 4]
    assert costs.count_params(Deployed(model, run, 4)) == costs.count_params(model)
    assert costs.count_macs(Deployed(model, run, 4), x.shape[1:]) == costs.count_macs(model, x.shape[1:]) > 0


def test_torch_compile_is_a_runtime(monkeypatch):
    # inductor takes half a minute to make C++ of it
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = small(depth=1)
    deployed = export.deploy(model, ["compile"], pixels(2))["compile"]
    with torch.inference_mode():
        assert_near(deployed(pixels(3)), model(pixels(3)), roundings=1024)


def test_what_is_known_about_a_timm_model():
    model, meta = model_and_meta("vit_tiny_patch16_224", pretrained=False, img_size=32)
    assert model.patch_embed.img_size == (32, 32)
    assert len(meta["class_names"]) == 1000 and meta["class_names"][0].startswith("tench")
    assert meta["data"]["mean"] == (0.5,) * 3 and meta["data"]["crop_pct"] == 0.9
