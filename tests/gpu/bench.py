"""Kernels and whole models on a GPU beside the strongest alternatives.

    bench.py {attention,tokens,models,training,compiled} --output FILE

A case is timed in CUDA graphs: cold, over sets of buffers that together exceed twice the L2 cache, and warm, over one.
The figure is the median of several replays, per call. Copy bandwidth and bf16 rate are measured in the same run;
`share` is the bound that they give over the cold time. Every baseline is forced; one that cannot run is listed with
its reason.
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import p3b_ext
from p3b_ext.ops.merge import match_tokens, merge_tokens
from p3b_ext.ops.select import keep_tokens, select_tokens, topk_tokens
from p3b_ext.plan import plan_ppt, score_spread
from p3b_ext.tuning import count_macs

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from bench_merge import tome
from bench_model import PlainToMe, twin

Call = Callable[[], object]
ALL_AUX = ("lse", "cls_attention", "entropy", "value_norm")
KINDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def not_run(error: Exception) -> str:
    lines = str(error).splitlines()
    return f" (not run: {type(error).__name__}: {lines[0][:100] if lines else ''})"


class Bench:
    def __init__(self, device: str, quick: bool, output: Path | None = None):
        self.device, self.quick, self.output, self.rows = device, quick, output, []
        self.gpu = device == "cuda"
        self.native = ["cuda", "triton"] if self.gpu else ["cpu"]
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size if self.gpu else 1 << 20
        self.bandwidth = self.rate = float("nan")
        # One stream for everything: a backward runs where its forward ran, and a capture must not meet the default one.
        self.stream = torch.cuda.Stream() if self.gpu else None
        if self.stream:
            torch.cuda.set_stream(self.stream)

    def graph(self, calls: list[Call]) -> Call:
        """All calls as one CUDA graph; on a CPU just all calls."""
        if not self.gpu:
            return lambda: [call() for call in calls]
        for _ in range(2):
            for call in calls:
                call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for call in calls:
                call()
        return graph.replay

    def time(self, calls: list[Call], replays: int = 15) -> float:
        """Median seconds of one call."""
        replay = self.graph(calls)
        return statistics.median(self.seconds(replay) for _ in range(2 if self.quick else replays)) / len(calls)

    def seconds(self, run: Call) -> float:
        """Of one call of run, on the GPU between two events."""
        if not self.gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peaks(self) -> None:
        size = 1 << (10 if self.quick else 29)
        x = torch.empty(size, device=self.device, dtype=torch.bfloat16).normal_()
        y = torch.empty_like(x)
        self.bandwidth = 4 * size / self.time([lambda: y.copy_(x)])
        n = 64 if self.quick else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.rate = 2 * n**3 / self.time([lambda: a @ b])
        print(f"copy {self.bandwidth / 1e12:.2f} TB/s, bf16 product {self.rate / 1e12:.0f} TFLOP/s", flush=True)

    def compare(
        self,
        case: str,
        sets: list,
        ours: dict,
        baselines: dict,
        bytes_: float,
        flops: float = 0.0,
        plain: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """Time functions of one set of buffers; sets are rotated where cold. Returns the cold times of ours.

        Ours are named "backend" or "backend + features"; `over_plain` relates the latter to the former, or to `plain`.
        """
        bound = max(bytes_ / self.bandwidth, flops / self.rate)
        found: list[dict] = []
        for what, make in [*ours.items(), *baselines.items()]:
            row = {"case": case, "what": what, "bound_us": round(bound * 1e6, 1)}
            try:
                calls = [make(s) for s in sets]
                row["cold_us"] = round(self.time(calls) * 1e6, 1)
                row["warm_us"] = round(self.time(calls[:1] * len(calls)) * 1e6, 1)
                row["share"] = round(bound * 1e6 / row["cold_us"], 3)
            except Exception as error:
                row["what"] += not_run(error)
                if self.gpu:
                    torch.cuda.synchronize()
            row["ours"] = what in ours
            found.append(row)
        best = min((r["cold_us"] for r in found if not r["ours"] and "cold_us" in r), default=None)
        for row in found:
            if row["ours"] and best and row.get("cold_us"):
                row["times_best_baseline"] = round(best / row["cold_us"], 3)
        times = {r["what"]: r["cold_us"] for r in found if r["ours"] and "cold_us" in r}
        for row in found:
            base = (plain or times).get(row["what"].split(" + ")[0])
            if row["what"] in times and base and (plain or " + " in row["what"]):
                row["over_plain"] = round(row["cold_us"] / base, 3)
            print(row, flush=True)
        self.add(found)
        return times

    def add(self, rows: list) -> None:
        """Keep rows, and write all so far: a stage that runs out of time is killed."""
        self.rows += rows
        if self.output:
            found = {"copy_bytes_per_s": self.bandwidth, "bf16_flop_per_s": self.rate, "rows": self.rows}
            self.output.write_text(json.dumps(found, indent=1) + "\n")

    def sets(self, bytes_: float, make: Call) -> list:
        return [make() for _ in range(2 if self.quick else min(16, max(2, int(2 * self.l2 / bytes_) + 1)))]


def on(backend: str, call: Call) -> Call:
    def run():
        with p3b_ext.backend(backend):
            return call()

    return run


def sdpa(kind: SDPBackend, q, k, v, mask=None) -> Call:
    def run():
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return run


def eager(q, k, v, mask=None) -> Call:
    def run():
        s = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (s if mask is None else s + mask).softmax(-1) @ v

    return run


@functools.cache
def compiled_flex() -> Callable:
    """FlexAttention, compiled once for each shape, with sizes and with gradients: more often than dynamo's limit of 8,
    after which it would silently time the uncompiled one."""
    torch._dynamo.config.recompile_limit = 64
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q, k, v, log_size):
        score_mod = None if log_size is None else (lambda score, b, h, i, j: score + log_size[b, j])
        return flex_attention(q, k, v, score_mod=score_mod)

    return torch.compile(attend, dynamic=False)


def flex(q, k, v, log_size=None) -> Call:
    return lambda: compiled_flex()(q, k, v, log_size)


def backward(forward: Call, wanted: list, grad: torch.Tensor) -> Call:
    out = forward()
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def attention(bench: Bench) -> None:
    shapes = [(256, 12, 197, 64), (64, 12, 577, 64), (32, 12, 1025, 64), (512, 12, 50, 64)]
    for shape in [(1, 2, 17, 8)] if bench.quick else shapes:
        attention_case(bench, *shape)


def attention_case(bench: Bench, B: int, H: int, N: int, D: int) -> None:
    case, tensor, flops = f"B{B} H{H} N{N} D{D} bf16", 2.0 * B * H * N * D, 4.0 * B * H * N * N * D
    kinds = {f"SDPA {kind.name.lower()}": kind for kind in KINDS}
    attend = p3b_ext.masked_attention

    def make() -> dict:
        qkv = torch.randn(B, N, 3, H, D, device=bench.device, dtype=torch.bfloat16)
        q, k, v = (t.detach() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0))
        size = torch.randint(1, 5, (B, N), device=bench.device).float()
        bias = size.log().to(torch.bfloat16)[:, None, None, :].expand(B, H, N, N)
        grad = torch.randn(B, N, H, D, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        gate = torch.ones(H, D, device=bench.device, requires_grad=True)
        return dict(x=(q, k, v), size=size, log_size=size.log(), bias=bias, grad=grad, leaves=leaves, gate=gate)

    def plain(b: str):
        return lambda s: on(b, lambda: attend(*s["x"]))

    def with_aux(b: str):
        return lambda s: on(b, lambda: attend(*s["x"], aux=ALL_AUX))

    def with_sizes(b: str):
        return lambda s: on(b, lambda: attend(*s["x"], token_size=s["size"]))

    def gradients(b: str):
        return lambda s: on(b, backward(on(b, lambda: attend(*s["leaves"])), s["leaves"], s["grad"]))

    def gate_gradients(b: str):
        def of(s: dict) -> Call:
            forward = on(b, lambda: attend(*s["leaves"], channel_gate=s["gate"]))
            return on(b, backward(forward, [*s["leaves"], s["gate"]], s["grad"]))

        return of

    sets = bench.sets(4 * tensor, make)
    ours = {b: plain(b) for b in bench.native} | {f"{b} + 4 side outputs": with_aux(b) for b in bench.native}
    base = {n: lambda s, kind=kind: sdpa(kind, *s["x"]) for n, kind in kinds.items()}
    base |= {"flex": lambda s: flex(*s["x"]), "eager": lambda s: eager(*s["x"])}
    times = bench.compare(f"{case} forward", sets, ours, base, 4 * tensor, flops)

    ours = {b: with_sizes(b) for b in bench.native}
    base = {n: lambda s, kind=kind: sdpa(kind, *s["x"], s["bias"]) for n, kind in kinds.items()}
    base |= {"flex": lambda s: flex(*s["x"], s["log_size"]), "eager": lambda s: eager(*s["x"], s["bias"])}
    bench.compare(f"{case} forward, sizes", sets, ours, base, 4 * tensor, flops, times)

    ours = {b: gradients(b) for b in bench.native}
    ours |= {f"{b} + gate gradients": gate_gradients(b) for b in bench.native}
    base = {
        n: lambda s, kind=kind: backward(sdpa(kind, *s["leaves"]), s["leaves"], s["grad"]) for n, kind in kinds.items()
    }
    base["flex"] = lambda s: backward(flex(*s["leaves"]), s["leaves"], s["grad"])
    base["eager"] = lambda s: backward(eager(*s["leaves"]), s["leaves"], s["grad"])
    bench.compare(f"{case} backward", sets, ours, base, 8 * tensor, 2.5 * flops)


def tokens(bench: Bench) -> None:
    for shape in [(2, 17, 16, 3)] if bench.quick else [(256, 197, 768, 16), (256, 197, 384, 13)]:
        tokens_case(bench, *shape)


def tokens_case(bench: Bench, B: int, N: int, C: int, r: int) -> None:
    M, K = N - r, 1 + (N - 1) * 7 // 10
    compiled = torch.compile(tome, dynamic=False)

    def make() -> dict:
        x = torch.randn(B, N, C, device=bench.device, dtype=torch.bfloat16)
        D = min(C, 64)
        keys = torch.randn(B, N, C // D, D, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)
        size, attention = torch.ones(B, N, device=bench.device), torch.rand(B, C // D, N, device=bench.device)
        norm = torch.rand(B, N, device=bench.device)
        found = dict(x=x, keys=keys, metric=keys.mean(1), size=size, attention=attention, norm=norm)
        return found | dict(scores=(attention.mean(1) * norm)[:, 1:].contiguous())

    def merge(b: str, metric: str = "metric"):
        return lambda s: on(b, lambda: merge_tokens(s["x"], match_tokens(s[metric], r), M, size=s["size"]))

    def select(b: str):
        return lambda s: on(b, lambda: select_tokens(s["x"], topk_tokens(s["scores"], K - 1)))

    def keep(b: str):
        return lambda s: on(b, lambda: keep_tokens(s["x"], s["attention"], s["norm"], K - 1))

    def ppt(b: str):
        def run(s: dict) -> Call:
            return on(b, lambda: plan_ppt(s["scores"], s["keys"], r, s["threshold"]).apply(s["x"], s["size"]))

        return lambda s: run(s | {"threshold": score_spread(s["scores"]).median().item()})

    def score_topk_and_gather(s: dict) -> Call:
        def run():
            index = (s["attention"].mean(1) * s["norm"])[:, 1:].topk(K - 1, -1).indices + 1
            index = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
            return s["x"].gather(1, index[..., None].expand(-1, -1, C))

        return run

    def topk_and_gather(s: dict) -> Call:
        def run():
            index = s["scores"].topk(K - 1, -1).indices + 1
            index = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
            return s["x"].gather(1, index[..., None].expand(-1, -1, C))

        return run

    bytes_ = 2.0 * B * C * (N + M)
    sets = bench.sets(bytes_, make)
    base = {
        "PyTorch": lambda s: lambda: tome(s["x"], s["metric"], s["size"], r),
        "PyTorch compiled": lambda s: lambda: compiled(s["x"], s["metric"], s["size"], r),
    }
    bench.compare(f"B{B} C{C} {N}->{M} match + merge", sets, {b: merge(b) for b in bench.native}, base, bytes_)
    base = {
        "PyTorch": lambda s: lambda: tome(s["x"], s["keys"].mean(1), s["size"], r),
        "PyTorch compiled": lambda s: lambda: compiled(s["x"], s["keys"].mean(1), s["size"], r),
    }
    case, of_keys = f"B{B} C{C} {N}->{M}", 2.0 * B * N * C
    bench.compare(
        f"{case} keys + match + merge", sets, {b: merge(b, "keys") for b in bench.native}, base, bytes_ + of_keys
    )
    bench.compare(f"{case} PPT, half pruned", sets, {b: ppt(b) for b in bench.native}, {}, bytes_ + of_keys / 2)
    case, base = f"B{B} C{C} {N}->{K}", {"score + topk + gather": score_topk_and_gather}
    bench.compare(f"{case} score + select", sets, {b: keep(b) for b in bench.native}, base, 4.0 * B * C * K)
    base = {"topk + gather": topk_and_gather}
    bench.compare(f"B{B} C{C} {N}->{K} select", sets, {b: select(b) for b in bench.native}, base, 4.0 * B * C * K)


MODELS = ["deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224"]


def models(bench: Bench) -> None:
    """Whole models, captured: dense with each SDPA backend, ours, and ToMe in plain PyTorch."""
    for name in ["vit_tiny_patch16_224"] if bench.quick else MODELS:
        ours, plain, fewer = model_case(bench, name)
        kinds = {f"timm, {kind.name.lower()}": on_sdpa(kind, plain["timm"]) for kind in KINDS}
        rest = {what: model for what, model in plain.items() if what != "timm"}
        add_models(bench, name, kinds | ours | rest, kinds, fewer)


def compiled(bench: Bench) -> None:
    """The same through torch.compile. One model after the other: minutes, and what is cut short keeps its rows."""
    for name in ["vit_tiny_patch16_224"] if bench.quick else MODELS:
        ours, plain, fewer = model_case(bench, name)
        for what, model in ({"timm": plain["timm"]} | ours | plain).items():
            torch._dynamo.reset()  # models share forwards, and dynamo gives up after 8 versions of one
            run = torch.compile(model, dynamic=False)
            add_models(bench, name, {f"{what}, compiled": run}, {"timm, compiled": run}, fewer)


def model_case(bench: Bench, name: str) -> tuple[dict, dict, dict]:
    """Ours and plain PyTorch's by name, on the same weights, and how many times fewer MACs than dense those have."""
    import timm

    torch.manual_seed(0)
    with torch.device(bench.device):  # drawing the weights of ViT-L on a CPU takes seconds
        model = timm.create_model(name).to(torch.bfloat16).eval()
    depth, r = len(model.blocks), 8 if "large" in name else 13
    tome_r, ppt = p3b_ext.ToMe(r=r), p3b_ext.PPT(r=50, blocks=tuple(depth * i // 4 for i in (1, 2, 3)))
    ours = {"dense, patched": p3b_ext.patch(twin(model))}
    ours |= {f"ToMe r={r}": p3b_ext.patch(twin(model), tome_r), "PPT r=50": p3b_ext.patch(twin(model), ppt)}
    # Half of the images above the threshold in every block, so that both policies run in one batch.
    p3b_ext.calibrate(ours["PPT r=50"], [images_of(bench)], 0.5, per_block=True)
    plain = {"timm": model, "ToMe in PyTorch, softmax as published": PlainToMe(twin(model), r, fused=False)}
    plain["ToMe in PyTorch, SDPA"] = PlainToMe(twin(model), r)
    dense = count_macs(model)
    fewer = {"ToMe": dense / count_macs(model, tome_r), "PPT": dense / count_macs(model, ppt)}
    return ours, plain, fewer


def images_of(bench: Bench) -> torch.Tensor:
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (2 if bench.quick else 256, 3, 224, 224)
    return torch.randn(shape, generator=generator, device=bench.device, dtype=torch.bfloat16)


def on_sdpa(kind: SDPBackend, model: Callable) -> Callable:
    def run(images: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kind):
            return model(images)

    return run


def add_models(bench: Bench, name: str, runs: dict, dense: dict, fewer: dict) -> None:
    """Time models; `times_best_baseline` and `share` (of that times the MACs ratio) relate to the best of `dense`."""
    images, found = images_of(bench), []
    for what, model in runs.items():
        row = {"case": f"{name} batch {len(images)} bf16", "what": what}
        row["macs_ratio"] = round(fewer.get(what.split()[0], 1.0), 3)
        try:
            with torch.inference_mode():
                seconds = bench.time([functools.partial(model, images)], replays=7)
            row |= {"cold_us": round(seconds * 1e6), "images_per_s": round(len(images) / seconds, 1)}
        except Exception as error:
            row["what"] += not_run(error)
        found.append(row)
    same = [row for row in [*bench.rows, *found] if row["case"] == found[0]["case"]]
    rates = [row["images_per_s"] for row in same if row["what"] in dense and "images_per_s" in row]
    for row in found:
        if rates and "images_per_s" in row:
            row["times_best_baseline"] = round(row["images_per_s"] / max(rates), 3)
            row["share"] = round(row["images_per_s"] / (max(rates) * row["macs_ratio"]), 3)
        print(row, flush=True)
    bench.add(found)


def training(bench: Bench) -> None:
    """A training step in bfloat16 autocast: plain (timm, patched) and with P3B's gates and probes. Not captured."""
    import timm

    import p3b
    from p3b.training.prune import PruningPhase
    from p3b.training.step import Meter, Step, create_optimizer

    name, batch = ("vit_tiny_patch16_224", 2) if bench.quick else ("deit_small_patch16_224", 256)
    torch.manual_seed(0)
    model, device = timm.create_model(name, num_classes=100).to(bench.device), torch.device(bench.device)
    config = p3b.Config(start_epoch=0, sparse_epoch=1, final_epoch=1, device=bench.device, amp="bfloat16")
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels, meter = torch.randint(0, 100, (batch,), device=device), Meter(device)
    for what in ("plain, timm", "plain, patched", "P3B"):
        row = {"case": f"{name} training step, batch {batch}", "what": what}
        try:
            twin = copy.deepcopy(model)
            twin = twin if what == "plain, timm" else p3b_ext.patch(twin)
            if what == "P3B":
                run = PruningPhase(twin, config, 100)
                run.gates.set(torch.rand_like(run.gates.values))
                step = run.train_step
            else:
                step = Step(twin, create_optimizer(twin, config, 5e-4), config, device)
            twin.train()
            for _ in range(1 if bench.quick else 5):
                step([(images, labels)], meter)
            turns = [
                bench.seconds(lambda step=step: step([(images, labels)], meter))
                for _ in range(2 if bench.quick else 20)
            ]
            row["cold_us"] = round(statistics.median(turns) * 1e6)
            if not bench.rows or "cold_us" in bench.rows[0]:
                row["times_best_baseline"] = round((bench.rows or [row])[0]["cold_us"] / row["cold_us"], 3)
        except Exception as error:
            row["what"] += not_run(error)
        print(row, flush=True)
        bench.add([row])


SUITES = {"attention": attention, "tokens": tokens, "models": models, "training": training, "compiled": compiled}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that the script runs")
    options = parser.parse_args()
    bench = Bench(options.device, options.quick, options.output)
    bench.peaks()
    SUITES[options.suite](bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
