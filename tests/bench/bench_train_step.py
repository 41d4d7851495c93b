"""One training step: plain fine-tuning (stock timm, patched) against P3B with its probes.

Run: python tests/bench/bench_train_step.py [--model deit_small_patch16_224] [--batch 8] [--threads 2] [--profile]
The models' steps are interleaved and the median of each is printed in milliseconds, with its ratio to the patched
plain step; beside it the MiB that a step holds at its worst moment, and those of weights and optimizer state (the
probes' included).
"""

import argparse
import copy
import statistics
import time

import timm
import torch
from timm.layers import set_fused_attn

import p3b
from p3b.metrics.cost import allocated_peak
from p3b.training.prune import PruningPhase
from p3b.training.step import Meter, Step, create_optimizer
from p3b_ext.patch import patch

VARIANTS = {
    "p3b, default probes": {},
    "p3b, quarter of the batch": {"probe_share": 0.25},
    "p3b, linear patch probe": {"patch_probe": "linear"},
    "p3b, exact (conv, full batch)": {"patch_probe": "conv", "probe_share": 1.0, "probe_every": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-exact", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    set_fused_attn(True)
    model = timm.create_model(options.model, num_classes=options.classes)
    size = model.patch_embed.img_size
    images, labels = torch.randn(options.batch, 3, *size), torch.randint(0, options.classes, (options.batch,))
    device, config = torch.device("cpu"), p3b.Config(start_epoch=0, sparse_epoch=1, final_epoch=1, device="cpu")
    meter = Meter(device)

    steps, phases = {}, {}
    for name, twin in (("timm", copy.deepcopy(model)), ("patched", patch(copy.deepcopy(model)))):
        steps[f"plain, {name}"] = Step(twin.train(), create_optimizer(twin, config, 5e-4), config, device)
    for name, settings in VARIANTS.items():
        if options.skip_exact and "exact" in name:
            continue
        run = PruningPhase(patch(copy.deepcopy(model)), p3b.Config.from_dict(config.to_dict() | settings), 100)
        run.model.train()
        run.gates.set(torch.rand_like(run.gates.values))
        steps[name], phases[name] = run.train_step, run

    if options.profile:
        profile(steps["p3b, default probes"], images, labels, meter)
        return
    times = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step([(images, labels)], meter)
            if repeat:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(times["plain, patched"])
    print(f"{options.model}, batch {options.batch}, {size[0]}x{size[1]}, float32, {options.threads} threads")
    for name, values in times.items():
        middle, step = statistics.median(values), steps[name]
        peak = allocated_peak(lambda step=step: step([(images, labels)], meter), device) / 2**20
        weights, state = held(phases[name].step if name in phases else step)
        print(
            f"{name:32s} {middle:9.1f} ms   {middle / base:5.2f} x   step {peak:7.1f} MiB   "
            f"weights {weights:6.1f} MiB   optimizer {state:6.1f} MiB"
        )


def held(step: Step) -> tuple[float, float]:
    """MiB of the weights and of the optimizers' state, of the method's too."""
    optimizers = [step.optimizer, *(step.run.method.optimizers if step.run else [])]
    weights = sum(p.nbytes for o in optimizers for group in o.param_groups for p in group["params"])
    state = sum(t.nbytes for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t))
    return weights / 2**20, state / 2**20


def profile(step: Step, images: torch.Tensor, labels: torch.Tensor, meter: Meter) -> None:
    step([(images, labels)], meter)
    with torch.profiler.profile() as record:
        step([(images, labels)], meter)
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


if __name__ == "__main__":
    main()
