# SPDX-License-Identifier: MIT
"""Export of a model to one file that runs without this software: ONNX, or PyTorch's `.pt2` (torch.export).

The graph is traced with the reference ops, so that it consists of standard operators only, with token reduction too.
The file's metadata has class names, preprocessing and the results of the checks: differences of the logits between the
PyTorch model and torch.export, onnxruntime and OpenVINO, where these are installed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import itertools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b_ext

from ..files import write_atomically
from ..metrics.cost import Deployed, count_macs, count_params
from ..models.token_reduction import settings_of

FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METADATA = "p3b.json"  # extra file of a .pt2; an .onnx file has the same keys in its metadata
INPUT, OUTPUT, BATCH = "images", "logits", "batch"
LARGEST_ONNX = 2**31 - 1  # largest protobuf message in bytes
# Largest difference of a logit, relative to the largest logit, for the median image. Rounding may change which tokens
# are merged or pruned, and then a single image differs more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
CHECK_IMAGES, MAX_CHECK_IMAGES = 8, 256


def export(
    model: VisionTransformer,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    images: Iterable[Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
    step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Exports a model, pruned or not, with or without a token reduction, to one file; returns its metadata.

    The input are images [B, C, H, W] of `dtype`, normalised with the mean and std in `meta`, the output logits
    [B, classes]. The file is written completely or not at all.

    path: a new file. format: "onnx" or "pt2"; None: by the ending of the path. batch: fixed batch size; None: any
    batch size. images: batches to check the logits on, besides random ones. meta: plain JSON values for the file's
    metadata. step: called with a short text before each stage.

    Raises ValueError for a file that exists, an invalid batch, a runtime whose logits differ, and a package that is not
    installed.
    """
    path = Path(path).expanduser()
    format = _format(path, format)
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"export: batch must be 1 or more, or None for any, got {batch!r}")
    if dtype not in TOLERANCE:
        raise ValueError(f"export: dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if path.exists() or path.is_symlink():
        raise ValueError(f"output: file must be new, got {path}, which exists; choose another name or remove it")
    if format == "onnx":
        require("onnx", "onnxscript")
    report = step or (lambda text: None)
    model = copy.deepcopy(model).to("cpu", dtype).eval()
    report("trace the model")
    program = trace(model, batch)
    described = describe(model, batch, dtype, meta or {})
    if format == "onnx":
        report("convert to ONNX")
        exported = to_onnx(program)
    else:
        exported = program
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        _write(exported, temporary, described)
        described["checks"] = check(model, temporary, format, batch, images, report)
        _write(exported, temporary, described)

    write_atomically(path, write)
    return described


def trace(model: VisionTransformer, batch: int | None = None) -> torch.export.ExportedProgram:
    """torch.export of a model on the CPU in eval mode, with the reference ops; batch None: any batch size.

    Raises ValueError where the graph has operators that are not PyTorch's own.
    """
    image = _random_images(model, batch or 2)
    shapes = None if batch else ({0: torch.export.Dim(BATCH, min=1)},)
    with torch.no_grad(), p3b_ext.backend("reference"), _quiet():
        program = torch.export.export(model, (image,), dynamic_shapes=shapes)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has paths of this machine
    foreign = sorted(name for name in operators(program) if not name.startswith("aten."))
    if foreign:
        raise ValueError(f"export: the graph has operators that are not PyTorch's own: {', '.join(foreign)}")
    return program


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """Names of a program's operators, as "aten.linear.default", without Python's functions on shapes."""
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {str(target) for target in calls if isinstance(target, torch._ops.OpOverload)}


def to_onnx(program: torch.export.ExportedProgram) -> Any:
    """The onnx.ModelProto of a program, with ONNX's standard operators only."""
    require("onnx", "onnxscript")
    import onnx

    with _quiet(), contextlib.redirect_stdout(io.StringIO()):
        try:
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ValueError(f"export: torch.onnx cannot convert the model ({reason}); try --format pt2") from error
    proto = exported.model_proto
    foreign = {node.domain for node in proto.graph.node} - {"", "ai.onnx"}
    if foreign or proto.functions:
        raise ValueError(f"export: the graph has operators that are not ONNX's own: {', '.join(sorted(foreign))}")
    # Metadata with paths of this machine, and shapes, which every runtime infers itself.
    for message in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del message.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_param = BATCH
    if proto.ByteSize() > LARGEST_ONNX:
        raise ValueError(
            f"export: the ONNX file has {proto.ByteSize():,} bytes, above the limit of 2 GiB; "
            "--dtype float16 halves it, --format pt2 has no limit"
        )
    onnx.checker.check_model(proto)
    return proto


def _stable_sort() -> Callable[..., Any]:
    """ONNX for torch.sort(stable=True) along the last axis, which torch.onnx lacks.

    ONNX defines that TopK puts the lower index first among equal values, but OpenVINO does not; so ties are broken with
    unique integer keys.
    """
    from onnxscript import opset18 as op

    floats = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
    int64 = 7

    def sort(self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        if dim not in (-1, len(self.shape) - 1):
            raise NotImplementedError(f"export: sort must be along the last axis, got {dim} of {len(self.shape)}")
        n = int(self.shape[-1])
        count, factor = op.Constant(value_ints=[n]), op.Constant(value_int=n)
        if self.dtype.name not in floats:
            position = op.Constant(value_ints=list(range(n)))
            wide = op.Mul(op.Cast(self, to=int64), factor)
            key = op.Sub(wide, position) if descending else op.Add(wide, position)
            _, index = op.TopK(key, count, axis=-1, largest=int(descending), sorted=1)
            return op.GatherElements(self, index, axis=-1), index
        values, index = op.TopK(self, count, axis=-1, largest=int(descending), sorted=1)
        first, last, axis = (op.Constant(value_ints=[i]) for i in (0, n - 1, -1))
        before, after = op.Slice(values, first, last, axis), op.Slice(values, op.Constant(value_ints=[1]), count, axis)
        changes = op.Cast(op.Not(op.Equal(before, after)), to=int64)
        ends = [0] * len(self.shape)
        changes = op.Pad(changes, op.Constant(value_ints=[*ends[:-1], 1, *ends]))
        group = op.CumSum(changes, op.Constant(value_int=-1))  # one number for equal values
        key, _ = op.TopK(op.Add(op.Mul(group, factor), index), count, axis=-1, largest=0, sorted=1)
        return values, op.Mod(key, factor)

    return sort


def describe(
    model: VisionTransformer, batch: int | None, dtype: torch.dtype, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The metadata of the file, as plain JSON values."""
    reduction = p3b_ext.current_reduction(model)
    size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    batch_size = batch or BATCH
    shape = f"[{batch_size}, {', '.join(map(str, size))}]"
    described = {
        "made_by": f"p3b {p3b_ext.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        "input": f"{INPUT} {shape}, {str(dtype)[6:]}: (pixel / 255 - mean) / std",
        "output": f"{OUTPUT} [{batch_size}, {model.num_classes}], before the softmax",
        "size": list(size),
        "params": count_params(model),
        "macs": count_macs(model, size),
        **meta,
    }
    if reduction is not None:
        described["reduction"] = {"name": type(reduction).__name__, **settings_of(reduction)}
        described["tokens_after_block"] = [after for _, after in p3b_ext.token_counts(model)]
    try:
        return json.loads(json.dumps(described, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"export: meta must be plain JSON values, got {error}") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of an exported file: class names, mean, std, size, reduction, checks, ..."""
    path = Path(path)
    if _format(path, None) == "onnx":
        require("onnx")
        import onnx

        properties = onnx.load(path).metadata_props
        return {each.key: json.loads(each.value) for each in properties}
    files = {METADATA: ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files[METADATA])


def check(
    model: VisionTransformer,
    path: Path,
    format: str,
    batch: int | None,
    images: Iterable[Tensor] | None = None,
    step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compares a file with the model that it was exported from, in every runtime for its format.

    Uses random images, in two batch sizes where any is allowed, and up to 256 of `images`. Returns for each runtime the
    largest difference of a logit, absolute and relative to the largest logit, and the share of images with the same
    top-1 class; or, under "not_checked", why it did not run. Raises ValueError where the median image differs by more
    than TOLERANCE.
    """
    parameter = next(model.parameters())
    sets = {"random": list(_random_images(model, batch or CHECK_IMAGES).split(batch or 5))}
    if images is not None:
        size = batch or CHECK_IMAGES
        batches_of_data = itertools.islice(_batches(images, size), max(1, MAX_CHECK_IMAGES // size))
        sets["data"] = [each.to(parameter.dtype) for each in batches_of_data]
        if not sets["data"]:
            raise ValueError(f"export: images has fewer than one batch of {size}")
    expected = {}
    with torch.inference_mode():
        for name, batches in sets.items():
            expected[name] = torch.cat([model(each) for each in batches]).float()
    results: dict[str, Any] = {}
    for runtime, load in READERS[format].items():
        if step is not None:
            step(f"check with {runtime}")
        if runtime != "torch.export" and importlib.util.find_spec(runtime) is None:
            results[runtime] = {"not_checked": "not installed"}
            continue
        try:
            run = load(path, torch.get_num_threads(), parameter.dtype)
            logits = {name: torch.cat([run(each) for each in batches]).float() for name, batches in sets.items()}
        except Exception as error:  # each runtime raises different errors
            results[runtime] = {"not_checked": " ".join(str(error).split())[:300]}
            continue
        results[runtime] = {name: _difference(logits[name], expected[name]) for name in sets}
        for name, difference in results[runtime].items():
            if not difference["relative_of_median_image"] <= TOLERANCE[parameter.dtype]:
                raise ValueError(
                    f"export: the logits of {runtime} differ from the model's by "
                    f"{difference['relative_of_median_image']:.2g} of the largest on {name} images, more than "
                    f"{TOLERANCE[parameter.dtype]:g}"
                )
    return results


def _difference(logits: Tensor, expected: Tensor) -> dict[str, float]:
    each = (logits - expected).abs().amax(1)
    scale = expected.abs().max()
    return {
        "images": len(each),
        "largest_difference": each.max().item(),
        "relative": (each.max() / scale).item(),
        "relative_of_median_image": (each.median() / scale).item(),
        "same_top1": (logits.argmax(1) == expected.argmax(1)).double().mean().item(),
    }


# Runtimes ------------------------------------------------------------------------------------------------------------

Run = Callable[[Tensor], Tensor]


def pt2_run(path: str | os.PathLike[str], threads: int, dtype: torch.dtype = torch.float32) -> Run:
    """A .pt2 file as a function of images, in PyTorch."""
    buffer = io.BytesIO(Path(path).read_bytes())  # torch.export.load checks the ending of a path
    module = torch.export.load(buffer).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run


def onnxruntime_run(path: str | os.PathLike[str], threads: int, dtype: torch.dtype = torch.float32) -> Run:
    """An .onnx file as a function of images, in onnxruntime on the CPU."""
    require("onnxruntime")
    import onnxruntime

    if dtype == torch.bfloat16:
        raise NotImplementedError("onnxruntime: dtype must be float32 or float16 on the CPU, got bfloat16")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its idle threads would otherwise spin while other runtimes are timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def openvino_run(path: str | os.PathLike[str], threads: int, dtype: torch.dtype = torch.float32) -> Run:
    """An .onnx file as a function of images, in OpenVINO on the CPU; dtype bfloat16: computes in bfloat16.

    Raises NotImplementedError for bfloat16 on a CPU without instructions for it.
    """
    require("openvino")
    import openvino

    if dtype == torch.bfloat16 and not _openvino_has_bfloat16():
        raise NotImplementedError("openvino: this CPU has no bfloat16 instructions")
    core = openvino.Core()
    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(os.fspath(path)), "CPU", settings).create_infer_request()

    def run(images: Tensor) -> Tensor:
        images = images.float() if dtype == torch.bfloat16 else images
        return torch.from_numpy(request.infer({0: images.numpy()}, share_inputs=True)[0].copy())

    return run


def _openvino_has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compiled_run(model: nn.Module, images: Tensor) -> Run:
    """torch.compile of a model for one input shape, with its weights as constants."""
    import torch._inductor.config as config

    function = torch.compile(model, dynamic=False)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():  # in every call, or it would be compiled twice
            return function(images)

    with config.patch(freezing=True), _quiet():
        run(images)
    return run


def deploy(model: VisionTransformer, runtimes: Iterable[str], images: Tensor) -> dict[str, Deployed]:
    """A model in each of `runtimes` ("onnxruntime", "openvino", "compile"), called like the model itself.

    The model is put in eval mode. images [B, C, H, W]: a batch of the size to compile for, in the model's dtype. The
    runtimes use PyTorch's number of threads. For bfloat16 openvino computes in bfloat16 from a float32 file.

    Raises ValueError for an unknown name, a runtime that is not installed, a dtype that it does not support, and logits
    that differ from the model's.
    """
    runtimes, dtype = list(runtimes), images.dtype
    model.eval()
    check_runtimes(runtimes, images.device, dtype)
    deployed: dict[str, Deployed] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for name in runtimes:
            if name == "compile":
                run = compiled_run(model, images)
            else:
                if not path.exists():
                    program = trace(copy.deepcopy(model).float().eval(), len(images))
                    path.write_bytes(to_onnx(program).SerializeToString())
                run = READERS["onnx"][name](path, torch.get_num_threads(), dtype)
            deployed[name] = Deployed(model, run, len(images))
    with torch.inference_mode():
        expected = model(images).float()
        for name, other in deployed.items():
            error = _difference(other(images).float(), expected)["relative_of_median_image"]
            if not error <= TOLERANCE[dtype]:
                difference = f"by {error:.2g} of the largest"
                raise ValueError(f"runtimes: the logits of {name} differ from the model's {difference}")
    return deployed


def check_runtimes(runtimes: Iterable[str], device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError unless all of these runtimes are installed and support the device and dtype."""
    for name in runtimes:
        if name not in RUNTIMES:
            raise ValueError(f"runtimes: names must be of {', '.join(RUNTIMES)}, got {name!r}")
        if name == "compile":
            continue
        if device.type != "cpu":
            raise ValueError(f"runtimes: device must be cpu for {name}, got {device}")
        if dtype not in RUNTIMES[name]:
            known = " or ".join(str(each)[6:] for each in RUNTIMES[name])
            raise ValueError(f"runtimes: dtype must be {known} for {name}, got {str(dtype)[6:]}")
        require(name, "onnx", "onnxscript")
        if name == "openvino" and dtype == torch.bfloat16 and not _openvino_has_bfloat16():
            raise ValueError("runtimes: dtype must be float32 for openvino on a CPU without bfloat16, got bfloat16")


# Runtimes of `deploy`, and the dtypes that they support.
RUNTIMES = {
    "onnxruntime": (torch.float32,),
    "openvino": (torch.float32, torch.bfloat16),
    "compile": tuple(TOLERANCE),
}
# Runtimes that `check` uses for each format.
READERS: dict[str, dict[str, Callable[..., Run]]] = {
    "pt2": {"torch.export": pt2_run},
    "onnx": {"onnxruntime": onnxruntime_run, "openvino": openvino_run},
}


def require(*packages: str) -> None:
    """Raises ValueError, with the pip command, for the first of these packages that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            extra = "openvino" if package == "openvino" else "export"
            raise ValueError(f"{package} is not installed: pip install 'p3b_ext[{extra}]'")


def summary(path: Path, described: Mapping[str, Any]) -> str:
    """The exported file and the results of its checks, in a few lines."""
    lines = [f"{described['input']}", f"{described['output']}"]
    lines.append(f"{described['params'] / 1e6:.3f} M parameters, {described['macs'] / 1e9:.4f} GMACs an image")
    for runtime, result in described["checks"].items():
        if "not_checked" in result:
            lines.append(f"{runtime}: not checked ({result['not_checked']})")
            continue
        for kind, each in result.items():
            lines.append(
                f"{runtime}: largest difference of a logit {each['largest_difference']:.1e} "
                f"({each['relative']:.1e} of the largest logit), same top-1 class {100 * each['same_top1']:.1f} % "
                f"({each['images']} {kind} images)"
            )
    return "\n".join([*lines, f"\nwritten to {path} ({path.stat().st_size / 1e6:.1f} MB)"])


def _format(path: Path, format: str | None) -> str:
    known = {ending: name for name, ending in FORMATS.items()}
    if format is None:
        format = known.get(path.suffix)
        if format is None:
            raise ValueError(f"output: file must end in {' or '.join(known)}, got {path}; or give --format")
    if format not in FORMATS:
        raise ValueError(f"format: name must be one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix != FORMATS[format]:  # torch.export and other runtimes depend on the ending
        raise ValueError(f"output: file must end in {FORMATS[format]} for format {format}, got {path}")
    return format


def _write(exported: Any, path: Path, described: Mapping[str, Any]) -> None:
    if isinstance(exported, torch.export.ExportedProgram):
        # To a buffer, since PyTorch warns about the ending of the temporary file.
        buffer = io.BytesIO()
        torch.export.save(exported, buffer, extra_files={METADATA: json.dumps(described, indent=1)})
        path.write_bytes(buffer.getbuffer())
        return
    import onnx

    onnx.helper.set_model_props(exported, {key: json.dumps(value) for key, value in described.items()})
    path.write_bytes(exported.SerializeToString())


def _random_images(model: VisionTransformer, count: int) -> Tensor:
    size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return images.to(next(model.parameters()).dtype)


def _batches(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Batches of one size; an incomplete last one is dropped."""
    kept: list[Tensor] = []
    for each in images:
        kept.extend(each.cpu())
        while len(kept) >= size:
            yield torch.stack(kept[:size])
            del kept[:size]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings and log messages of torch.export and torch.onnx."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
