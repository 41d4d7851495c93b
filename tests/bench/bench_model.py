"""A whole ViT, same weights: dense, ToMe, PPT, EViT and TopK on p3b_ext against the best that others make of it.

`python tests/bench/bench_model.py [--model deit_small_patch16_224] [--batch 16] [--threads 2] [--dtype float32]` prints
a markdown table and, with --out, writes JSON. The models take turns; ratios are medians of the ratios inside a
turn, with the interval that holds their median with the coverage stated. Beside them run torch.compile with freezing;
dense, ToMe and PPT in onnxruntime and OpenVINO where these are installed (with onnx and onnxscript); and ToMe in plain
PyTorch on the same linear layers. `--profile` says where the time goes.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import p3b_ext
from p3b.deploy import export
from p3b_ext.linear import OneDnnLinear, prefer_onednn
from p3b_ext.tuning import count_macs

sys.path.insert(0, str(Path(__file__).parent))
from bench_merge import tome
from timing import Timing, machine, paired, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOME_R, PPT_R, BLOCKS, KEEP_RATE = 13, 50, (3, 6, 9), 0.7
TIMM = ("timm, fused attention", "timm, eager attention")
PATCHED, PLAIN_TOME, TOME, PPT = "p3b_ext dense", "ToMe in PyTorch", "p3b_ext ToMe", "p3b_ext PPT"
TITLES = {"compile": "torch.compile, freezing,", "onnxruntime": "onnxruntime", "openvino": "OpenVINO"}
LARGEST_ERROR = 2e-3  # of the logits in float32, relative to their largest; a benchmark of wrong answers says nothing


class PlainToMe(nn.Module):
    """ToMe in plain PyTorch (methods: Bolya et al.): matching and merging by gather and scatter, proportional attention
    as a float mask through scaled_dot_product_attention, which on a CPU is faster than the published softmax by hand
    (fused=False)."""

    def __init__(self, model: nn.Module, r: int, fused: bool = True) -> None:
        super().__init__()
        if model.num_prefix_tokens != 1:
            raise ValueError(f"bench_model: model must have one prefix token, got {model.num_prefix_tokens}")
        self.model, self.r, self.fused = model, r, fused

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        size = None
        for block in model.blocks:
            y, metric = self.attention(block.attn, block.norm1(x), size)
            x = x + block.ls1(y)
            x, total = tome(x, metric, x.new_ones(x.shape[:2]) if size is None else size, self.r)
            size = total[..., 0]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))

    def attention(self, attn: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, n, channels = x.shape
        q, k, v = attn.qkv(x).reshape(batch, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if size is None else size.log()[:, None, None, :].to(q.dtype)
        q, metric, k = attn.q_norm(q), k.mean(1), attn.k_norm(k)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale)
        else:
            logits = (q * attn.scale) @ k.transpose(-2, -1)
            y = (logits if mask is None else logits + mask).softmax(-1) @ v
        return attn.proj(y.transpose(1, 2).reshape(batch, n, channels)), metric


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the weights."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


def timm_model(model: nn.Module, fused: bool) -> nn.Module:
    model = twin(model)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def same_linears(model: nn.Module) -> nn.Module:
    """The linear layers that `patch(model, linear="auto")` would run."""
    if prefer_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model


def reductions(depth: int) -> dict[str, object]:
    blocks = tuple(block for block in BLOCKS if block < depth)
    return {
        TOME: p3b_ext.ToMe(TOME_R),
        PPT: p3b_ext.PPT(PPT_R, blocks),
        "p3b_ext EViT": p3b_ext.EViT(KEEP_RATE, blocks),
        "p3b_ext TopK": p3b_ext.TopK(KEEP_RATE, blocks),
    }


def build(model: nn.Module, images: Tensor, args: argparse.Namespace) -> tuple[dict[str, Callable], dict[str, float]]:
    """What to time, by name, and how many times fewer multiplications than dense each has."""
    functions: dict[str, Callable] = {}
    fewer: dict[str, float] = {}
    for name, fused in zip(TIMM, (True, False), strict=True):
        functions[name] = timm_model(model, fused)
    functions[PATCHED] = p3b_ext.patch(twin(model))
    dense_macs = count_macs(model)
    for name, reduction in reductions(len(model.blocks)).items():
        functions[name] = p3b_ext.patch(twin(model), reduction)
        if isinstance(reduction, p3b_ext.PPT):
            # Half of the images above the threshold in every block, so that both policies run in one batch.
            p3b_ext.calibrate(functions[name], [images], 0.5, per_block=True)
        fewer[name] = dense_macs / count_macs(model, reduction)
    functions[PLAIN_TOME] = same_linears(PlainToMe(twin(model), TOME_R))
    fewer[PLAIN_TOME] = fewer[TOME]
    check(functions, images)
    elsewhere = deployed(functions, images, args.skip)
    fewer |= {name: fewer[f"p3b_ext {name.split()[-1]}"] for name in elsewhere if not name.endswith("dense")}
    functions |= elsewhere
    return {name: bound(function, images) for name, function in functions.items()}, fewer


def bound(function: Callable, images: Tensor) -> Callable[[], object]:
    return lambda: function(images)


def check(functions: dict[str, Callable], images: Tensor) -> None:
    """Raise unless what should be equal is equal, in float32."""
    if images.dtype != torch.float32:
        return
    for ours, theirs in ((PATCHED, TIMM[0]), (TOME, PLAIN_TOME), (TIMM[1], TIMM[0])):
        a, b = functions[ours](images), functions[theirs](images)
        error = float((a - b).abs().max() / b.abs().max())
        if not error < LARGEST_ERROR:
            raise ValueError(f"bench_model: {ours} must give the logits of {theirs}, got an error of {error:.1e}")


def deployed(functions: dict[str, Callable], images: Tensor, skip: list[str]) -> dict[str, Callable]:
    """The dense model under torch.compile with freezing, and dense, ToMe and PPT in onnxruntime (float32) and OpenVINO
    (float32, or bfloat16 where the CPU has it), as far as they are installed."""
    wanted = [] if "compile" in skip else ["compile"]
    for runtime in () if "deploy" in skip else ("onnxruntime", "openvino"):
        try:
            export.check_runtimes([runtime], images.device, images.dtype)
            wanted.append(runtime)
        except ValueError as error:
            print(f"not timed: {error}\n")
    found = {}
    for name, title in ((TIMM[0], "dense"), (TOME, "ToMe"), (PPT, "PPT")):
        here = [runtime for runtime in wanted if runtime != "compile" or name == TIMM[0]]
        with contextlib.redirect_stdout(sys.stderr):
            runs = export.deploy(functions[name], here, images)
        found |= {f"{TITLES[runtime]} {title}": run for runtime, run in runs.items()}
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """Bounds that hold the median of the distribution, from order statistics, and their coverage (95 % if n allows)."""
    ordered, n = sorted(values), len(values)

    def outside(k: int) -> float:  # that the median lies beyond the k-th value from either end
        return 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    k = max((k for k in range(n // 2) if outside(k) <= 0.05), default=0)
    return ordered[k], ordered[n - 1 - k], 1 - outside(k)


def ratios(row: Timing, base: Timing) -> list[float]:
    """Times faster than the base, turn by turn."""
    return [b / a for a, b in zip(row.turns, base.turns, strict=True)]


@dataclasses.dataclass
class Line:
    """One model's figures."""

    name: str
    ms: float
    images_per_second: float
    fastest_ms: float
    times_dense: float  # than the faster of the two timm models
    low: float
    high: float
    coverage: float
    macs_ratio: float  # dense over its multiplications
    times_patched: float  # than p3b_ext's own dense model
    arrived: float | None  # times_patched over macs_ratio: what part of the saving is time
    turns: list[float]


def lines(found: dict[str, Timing], fewer: dict[str, float], batch: int) -> list[Line]:
    best = min(TIMM, key=lambda name: found[name].ms)
    rows = []
    for name, timing in found.items():
        against, own = ratios(timing, found[best]), ratios(timing, found[PATCHED])
        macs = fewer.get(name, 1.0)
        times_patched = statistics.median(own)
        rows.append(
            Line(
                name + (" (best dense timm)" if name == best else ""),
                timing.ms,
                1e3 * batch / timing.ms,
                timing.fastest,
                statistics.median(against),
                *interval(against),
                macs,
                times_patched,
                times_patched / macs if name in fewer and not name.startswith(tuple(TITLES.values())) else None,
                timing.turns,
            )
        )
    return rows


HEADER = ["model", "ms", "img/s", "fastest ms", "times best dense timm", "interval", "MACs ratio"]
HEADER += ["times p3b_ext dense", "of the MACs ratio"]


def show(rows: list[Line]) -> str:
    cells = []
    for row in rows:
        part = "" if row.arrived is None else f"{100 * row.arrived:.0f} %"
        spread = f"{row.low:.2f} to {row.high:.2f}"
        cells.append([row.name, row.ms, row.images_per_second, row.fastest_ms, row.times_dense, spread])
        cells[-1] += [row.macs_ratio, row.times_patched, part]
    return table(HEADER, cells)


# Parts of a model's time by the name of the operator that spends it; the first pattern that fits.
PARTS = {
    "attention": ("attention", "softmax", "bmm"),
    "linear": ("linear", "addmm", "aten::mm"),
    "token plan": ("match", "merge", "select_tokens", "rank", "topk", "sort", "scatter", "gather", "p3b_ext::"),
    "norm": ("norm",),
    "GELU": ("gelu",),
    "patch embedding": ("conv",),
}


def profile(functions: dict[str, Callable], names: tuple[str, ...], repeats: int = 3) -> str:
    """Milliseconds of one forward pass by part, of the fastest of a few."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains about missing GPUs
    rows = []
    for name in names:
        passes = []
        for _ in range(repeats):
            with torch.autograd.profiler.profile() as record:
                functions[name]()
            parts = dict.fromkeys([*PARTS, "rest"], 0.0)
            for event in record.key_averages():
                part = next((p for p, patterns in PARTS.items() if any(t in event.key for t in patterns)), "rest")
                parts[part] += event.self_cpu_time_total / 1e3
            passes.append([*parts.values(), sum(parts.values())])
        rows.append([name, *min(passes, key=lambda values: values[-1])])
    return table(["ms of one pass", *PARTS, "rest", "sum"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--turns", type=int, default=11, help="timed passes of each model")
    parser.add_argument("--skip", default="", help="of compile,deploy")
    parser.add_argument("--cpu-time", action="store_true", help="time that the process computed, for --threads 1")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--out", metavar="FILE", help="JSON")
    args = parser.parse_args()
    args.skip = args.skip.split(",")
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    results = []
    for dtype in args.dtype.split(","):
        model = timm.create_model(args.model).eval().to(DTYPES[dtype])
        images = torch.randn(args.batch, *model.pretrained_cfg["input_size"]).to(DTYPES[dtype])
        with torch.no_grad():
            functions, fewer = build(model, images, args)
            found = paired(functions, 0.0, args.turns, clock)
            rows = lines(found, fewer, args.batch)
            load = os.getloadavg()
            title = f"{args.model}, batch {args.batch}, {dtype}, random weights and images; {machine()}"
            how = f"{args.turns} turns, {'CPU time' if args.cpu_time else 'wall time'}, load average {load[0]:.1f}"
            how += f", interval coverage {100 * rows[0].coverage:.0f} %, oneDNN linears {prefer_onednn()}"
            print(title, how, show(rows), sep="\n\n", end="\n\n", flush=True)
            if args.profile:
                print(profile(functions, (TIMM[0], PATCHED, TOME, PPT, PLAIN_TOME)), end="\n\n", flush=True)
        faster = statistics.median(ratios(found[TOME], found[PLAIN_TOME]))
        print(f"{TOME}: {faster:.2f} times {PLAIN_TOME} on the same linears\n", flush=True)
        results.append(
            {"title": title, "how": how, "dtype": dtype, "rows": [dataclasses.asdict(row) for row in rows]}
            | {"times_plain_tome": faster, "load": load, "torch": torch.__version__, "timm": timm.__version__}
        )
    if args.out:
        text = json.dumps({"command": " ".join(sys.argv), "results": results}, indent=1)
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
