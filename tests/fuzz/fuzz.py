"""Random calls of the CPU ops, each compared with the float64 reference; run.sh builds and preloads the sanitizers.

A new op joins with a function that draws its arguments and one that computes them in float64, in OPS at the bottom.
A case of its own is `python tests/fuzz/fuzz.py --library build/fuzz/lib --seed SEED --first NUMBER --calls 1`.
"""

import argparse
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

DTYPES = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3, torch.float64: 1e-12}  # relative error
ROOT = Path(__file__).parents[2]


def load(name: str, path: Path):
    """A module by its file: the package itself would load the ops of its own build."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load("p3b_reference", ROOT / "p3b_ext" / "reference.py")


class Draw:
    """Random choices of one case, from its own seed."""

    def __init__(self, seed: int, number: int):
        self.random = Random(seed * 1_000_003 + number)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.dtype = self.random.choice(list(DTYPES))

    def maybe(self, chance: float = 0.5) -> bool:
        return self.random.random() < chance

    def upto(self, most: int, least: int = 1) -> int:
        return self.random.randint(least, most)

    def tokens(self) -> int:
        return self.random.choice([1, 2, 17, 50, 197, self.upto(64), self.upto(64), self.upto(64), self.upto(260)])

    def batch(self) -> int:
        return 0 if self.maybe(0.02) else self.upto(3)

    def acc(self) -> torch.dtype:
        return reference.acc_dtype(self.dtype)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def uniform(self, *shape: int, least: float = 0.0, most: float = 1.0) -> Tensor:
        return (torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (most - least) + least).to(
            self.acc()
        )

    def strided(self, x: Tensor) -> Tensor:
        """The same values in another memory layout whose last axis stays contiguous."""
        kind = self.upto(4)
        if kind == 1 or x.dim() < 2:
            return x.contiguous()
        if kind == 2:  # every other row of a larger buffer, from an odd offset
            rows = [*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1]]
            buffer = torch.full(rows, torch.nan if x.is_floating_point() else 0).to(x.dtype)
            view = buffer[..., 1::2, :]
            view.copy_(x)
            return view
        if kind == 3 and x.shape[0] > 0:  # one image for the whole batch
            return x[:1].expand(x.shape).contiguous()[:1].expand(x.shape)
        order = [*range(x.dim() - 2, -1, -1), x.dim() - 1]
        return x.permute(order).contiguous().permute(order)


@dataclass
class Case:
    """Arguments of an op, its float64 results, and per result the error allowed."""

    args: tuple
    wanted: tuple
    tolerance: tuple
    error: str | None = None  # the ValueError that the call must raise instead


@dataclass
class Op:
    draw: Callable[[Draw, "Machine"], Case]
    weight: int = 1


@dataclass
class Machine:
    isa: str  # the instruction set that this case runs with


def double(x):
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def scale_of(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


# ---- attention ---------------------------------------------------------------------------------------------------


@dataclass
class AttentionCase:
    q: Tensor
    k: Tensor
    v: Tensor
    extras: tuple  # key_mask, token_size, channel_gate
    scale: float
    exact: float  # allowed error of sums in acc dtype
    rounded: float  # allowed error of results in the storage dtype
    logit: float  # largest logit

    @property
    def inputs(self) -> tuple:
        return self.q, self.k, self.v


def draw_attention(d: Draw, machine: Machine) -> AttentionCase:
    B, H, N, D = d.batch(), d.upto(3), d.tokens(), d.random.choice([8, 24, 40, 64, 64, 80, d.upto(130)])
    if d.maybe(0.6):
        q, k, v = d.normal(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (d.strided(d.normal(B, H, N, D)) for _ in range(3))
    if d.maybe(0.1):  # logits far beyond what exp of a float32 can hold
        q, k = q * d.random.choice([4, 20]), k * d.random.choice([0.1, 20])
    mask = torch.rand(B, N, generator=d.generator) > d.random.choice([0.0, 0.3, 0.9, 1.0]) if d.maybe() else None
    size = d.uniform(B, N, least=1.0, most=d.random.choice([1.0, 9.0, 1e4])) if d.maybe() else None
    if size is not None and d.maybe(0.3):
        size = size.t().contiguous().t()
    gate = None
    if d.maybe():
        gate = d.uniform(*((H, D) if d.maybe() else (D,)), most=1.5)
        if d.maybe(0.3):
            gate[..., : d.upto(D)] = 0
    scale = d.random.choice([D**-0.5, D**-0.5, 1.0, -0.3])
    logit = scale_of(reference._logits(*map(double, (q, k, mask, size, gate)), scale)) if B else 0.0
    exact = DTYPES[torch.float64] if d.dtype == torch.float64 else DTYPES[torch.float32]
    exact *= 1 + logit / 8  # a logit is rounded to 2^-24 of itself, and p with it
    rounded = max(DTYPES[d.dtype], exact)
    if machine.isa == "avx512_bf16" and d.dtype == torch.bfloat16:  # p, and gated inputs, are rounded to bfloat16
        rounded *= 3
        exact = max(exact, 0.01 * (1 + logit)) if gate is not None else exact
        rounded = max(rounded, exact)
    return AttentionCase(q, k, v, (mask, size, gate), scale, exact, rounded, logit)


def masked_attention(d: Draw, machine: Machine) -> Case:
    c = draw_attention(d, machine)
    aux = d.upto(7, 0)
    mask, size, gate = c.extras
    if size is not None and size.numel() and d.maybe(0.05):
        size[-1, d.upto(size.shape[1]) - 1] = d.random.choice([0.0, -1.0, torch.nan, -torch.inf])
        return Case((*c.inputs, mask, size, gate, c.scale, aux), (), (), error="token_size must be > 0 and finite, got")
    args = (*c.inputs, mask, size, gate, c.scale, aux)
    out, lse, cls, entropy, norm = reference.masked_attention(*map(double, args))
    floor = 1e-3 + 0.1 * scale_of(reference._gated(double(c.v), double(gate)))
    tolerance = (
        c.rounded * max(floor, scale_of(out)),
        c.exact * max(1.0, scale_of(lse)),
        c.exact,
        c.exact * max(1.0, c.logit),
        c.exact * max(1e-3, scale_of(norm)),
    )
    return Case(args, (out, lse, cls, entropy, norm), tolerance)


def masked_attention_packed(d: Draw, machine: Machine) -> Case:
    case = masked_attention(d, machine)
    qkv = torch.stack([t.transpose(1, 2) for t in case.args[:3]], 2)
    if d.maybe():  # q, k and v one after the other in memory, or the heads outermost
        order = d.random.choice([(2, 0, 1, 3, 4), (3, 0, 2, 1, 4)])
        qkv = qkv.permute(order).contiguous().permute([order.index(axis) for axis in range(5)])
    return Case((qkv, *case.args[3:]), case.wanted, case.tolerance, case.error)


def masked_attention_backward(d: Draw, machine: Machine) -> Case:
    c = draw_attention(d, machine)
    B, H, N, D = c.q.shape
    grad = d.normal(B, N, H, D)
    if d.maybe(0.1):
        grad = grad[:1, :1].expand(B, N, H, D) if B else grad
    leaves = [None if t is None else double(t).requires_grad_() for t in (*c.inputs, *c.extras[1:])]
    q, k, v, size, gate = leaves
    out, lse, *_ = reference.masked_attention(q, k, v, c.extras[0], size, gate, c.scale, 0)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, wanted, double(grad), allow_unused=True)
    grads = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)}
    grad_qkv = torch.stack([grads[id(t)] for t in (q, k, v)]).permute(1, 3, 0, 2, 4)
    none, which = torch.empty(0, dtype=torch.float64), d.upto(3, 0)
    grad_size = none if size is None or not which & reference.TOKEN_SIZE else grads[id(size)]
    grad_gate = none if gate is None or not which & reference.CHANNEL_GATE else grads[id(gate)]
    # With a saturated softmax the gradient is a difference of numbers as large as grad_out * v * k.
    dp = D**0.5 * scale_of(grad) * scale_of(c.v) * (1.5 if gate is not None else 1)
    floor = 1e-3 + 0.3 * scale_of(grad) + 0.1 * abs(c.scale) * dp * max(scale_of(c.q), scale_of(c.k))
    shape = max(floor, scale_of(grad_qkv))
    tolerance = (
        c.rounded * shape,
        (c.rounded if machine.isa == "avx512_bf16" else c.exact) * max(dp, scale_of(grad_size)) * H,
        (c.rounded if machine.isa == "avx512_bf16" else c.exact) * max(shape * (B * H * N) ** 0.5, scale_of(grad_gate)),
    )
    saved = (out.detach().to(d.dtype), lse.detach().to(d.acc()))
    return Case((grad, *c.inputs, *saved, *c.extras, c.scale, which), (grad_qkv, grad_size, grad_gate), tolerance)


def attention_columns(d: Draw, machine: Machine) -> Case:
    c = draw_attention(d, machine)
    which = d.upto(3, 0)
    lse = reference.masked_attention(*map(double, (*c.inputs, *c.extras)), c.scale, 0)[1]
    wanted = reference.attention_columns(*map(double, (c.q, c.k, lse, *c.extras)), c.scale, which)
    return Case((c.q, c.k, lse.to(d.acc()), *c.extras, c.scale, which), wanted, (2 * c.exact, 2 * c.exact))


# ---- select ------------------------------------------------------------------------------------------------------


def draw_scores(d: Draw) -> tuple[Tensor, int]:
    scores = d.normal(d.batch(), d.tokens())
    if d.maybe(0.3):  # ties
        scores = scores.round()
    if d.maybe(0.1):
        scores[torch.rand(scores.shape, generator=d.generator) < 0.1] = d.random.choice(
            [torch.nan, -torch.inf, torch.inf]
        )
    return scores, d.upto(2, 0)


def topk_tokens(d: Draw, machine: Machine) -> Case:
    scores, prefix = draw_scores(d)
    args = (scores, d.upto(scores.shape[1], 0), prefix, d.maybe())
    error = "scores must not be NaN" if scores.isnan().any() else None
    return Case(args, (reference.topk_tokens(*args),), (0.0,), error)


def prune_slots(d: Draw, machine: Machine) -> Case:
    scores, prefix = draw_scores(d)
    args = (scores, d.upto(scores.shape[1], 0), prefix, d.maybe())
    error = "scores must not be NaN" if scores.isnan().any() else None
    return Case(args, (reference.prune_slots(*args),), (0.0,), error)


def draw_index(d: Draw, B: int, N: int) -> Tensor:
    return torch.randint(0, N, (B, d.upto(N + 2, 0)), generator=d.generator)  # repeats allowed


def select_tokens(d: Draw, machine: Machine) -> Case:
    x = d.strided(d.normal(d.batch(), d.tokens(), d.upto(100)))
    args = (x, draw_index(d, *x.shape[:2]))
    return Case(args, (double(reference.select_tokens(*args)),), (0.0,))


def select_tokens_backward(d: Draw, machine: Machine) -> Case:
    B, N, C = d.batch(), d.tokens(), d.upto(100)
    index = draw_index(d, B, N)
    grad = d.strided(d.normal(B, index.shape[1], C))
    x = torch.zeros(B, N, C, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(reference.select_tokens(x, index), x, double(grad))
    return Case((grad, index, N), (wanted,), (DTYPES[d.dtype] * max(1.0, scale_of(wanted)),))


# ---- merge -------------------------------------------------------------------------------------------------------


def draw_slots(d: Draw, B: int, N: int) -> tuple[Tensor, int]:
    M = d.upto(N)
    return torch.randint(-1 if d.maybe() else 0, M, (B, N), generator=d.generator, dtype=torch.int32), M


def draw_merge(d: Draw) -> tuple[Tensor, Tensor, int, Tensor | None, Tensor | None, bool]:
    x = d.strided(d.normal(d.batch(), d.tokens(), d.upto(100)))
    slot, M = draw_slots(d, *x.shape[:2])
    size = d.uniform(*x.shape[:2], least=1.0, most=5.0) if d.maybe() else None
    weight = d.uniform(*x.shape[:2], least=0.1) if d.maybe() else None
    return x, slot, M, size, weight, d.maybe()


def merge_tokens(d: Draw, machine: Machine) -> Case:
    args = draw_merge(d)
    y, size_out = reference.merge_tokens(*map(double, args))
    sums = DTYPES[torch.float64 if d.dtype == torch.float64 else torch.float32]
    return Case(args, (y, size_out), (DTYPES[d.dtype] * max(1.0, scale_of(y)), sums * max(1.0, scale_of(size_out))))


def merge_tokens_backward(d: Draw, machine: Machine) -> Case:
    x, slot, M, size, weight, normalize = draw_merge(d)
    leaves = [None if t is None else double(t).requires_grad_() for t in (x, size, weight)]
    y, size_out = reference.merge_tokens(leaves[0], slot, M, leaves[1], leaves[2], normalize)
    grad_y = d.strided(d.normal(*y.shape))
    grad_size_out = d.normal(*size_out.shape, dtype=d.acc()) if d.maybe() else None
    wanted = [t for t in leaves if t is not None]
    pairs = [(y, double(grad_y))] + ([(size_out, double(grad_size_out))] if grad_size_out is not None else [])
    pairs = [(t, g) for t, g in pairs if t.requires_grad]
    grads = torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    grads = iter(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))
    results = tuple(torch.empty(0, dtype=torch.float64) if t is None else next(grads) for t in leaves)
    rounding = DTYPES[d.dtype] * x.shape[-1] ** 0.5  # y is given as it was rounded
    tolerance = tuple(rounding * max(1.0, scale_of(t)) * 2 for t in results)
    args = (grad_y, grad_size_out, x, slot, y.detach().to(d.dtype), size, weight, normalize)
    return Case(args, results, tolerance)


def unmerge_tokens(d: Draw, machine: Machine) -> Case:
    B, N = d.batch(), d.tokens()
    slot, M = draw_slots(d, B, N)
    args = (d.strided(d.normal(B, M, d.upto(100))), slot, d.random.choice([0.0, -1.5]))
    return Case(args, (double(reference.unmerge_tokens(*args)),), (0.0,))


def unmerge_tokens_backward(d: Draw, machine: Machine) -> Case:
    B, N, C = d.batch(), d.tokens(), d.upto(100)
    slot, M = draw_slots(d, B, N)
    grad = d.strided(d.normal(B, N, C))
    y = torch.zeros(B, M, C, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(reference.unmerge_tokens(y, slot, 0.0), y, double(grad))
    return Case((grad, slot, M), (wanted,), (DTYPES[d.dtype] * max(1.0, scale_of(wanted)),))


def match_tokens(d: Draw, machine: Machine) -> Case:
    """Rows of a signed identity matrix, some of them shared: similarities -1, 0 and 1, exact in every dtype."""
    B, N, D = d.batch(), d.tokens(), d.upto(80)
    channel = torch.randint(0, D, (B, N, 1), generator=d.generator)
    sign = torch.randint(0, 2, (B, N, 1), generator=d.generator) * 2.0 - 1.0
    metric = d.strided(torch.zeros(B, N, D, dtype=d.dtype).scatter_(2, channel, sign.to(d.dtype)))
    prefix = d.upto(min(2, N), 0)
    source = None
    most = (N - prefix) // 2
    if d.maybe(0.3):
        source = torch.zeros(B, N, dtype=torch.bool)
        count = d.upto(max(1, N // 2), 0)
        for b in range(B):
            source[b, d.random.sample(range(prefix, N), min(count, N - prefix))] = True
        most = min(count, N - prefix)
    destinations = N - prefix - most
    args = (metric, d.upto(most, 0) if destinations > 0 else 0, prefix, source)
    return Case(args, (reference.match_tokens(*map(double, args)),), (0.0,))


OPS = {
    "masked_attention": Op(masked_attention, 4),
    "masked_attention_packed": Op(masked_attention_packed, 2),
    "masked_attention_backward": Op(masked_attention_backward, 4),
    "attention_columns": Op(attention_columns, 2),
    "topk_tokens": Op(topk_tokens),
    "prune_slots": Op(prune_slots),
    "select_tokens": Op(select_tokens),
    "select_tokens_backward": Op(select_tokens_backward),
    "match_tokens": Op(match_tokens),
    "merge_tokens": Op(merge_tokens),
    "merge_tokens_backward": Op(merge_tokens_backward),
    "unmerge_tokens": Op(unmerge_tokens),
    "unmerge_tokens_backward": Op(unmerge_tokens_backward),
}


def wrong(got, case: Case) -> str | None:
    """What is wrong with the results of a call, in words."""
    got = got if isinstance(got, tuple) else (got,)
    for i, (x, y, tolerance) in enumerate(zip(got, case.wanted, case.tolerance, strict=True)):
        if x.shape != y.shape:
            return f"result {i} has shape {list(x.shape)}, must be {list(y.shape)}"
        x, y = x.double(), y.double()
        # Minus infinity and infinity must be themselves; a difference with NaN is never small enough.
        off = ~((x == y) | ((x - y).abs() <= tolerance))
        if off.any():
            at = tuple(off.nonzero()[0].tolist())
            return f"result {i} at {list(at)} is {float(x[at])!r}, must be {float(y[at])!r} +- {tolerance:.3g}"
    return None


def run(op, case: Case, check_threads: bool) -> str | None:
    """One call; None where it does what it must."""
    try:
        got = op(*case.args)
    except (ValueError, RuntimeError) as error:
        if case.error and case.error in str(error):
            return None
        return f"raised {type(error).__name__}: {str(error).splitlines()[0]}"
    if case.error:
        return f"must raise ... {case.error} ..."
    if check_threads:
        threads = torch.get_num_threads()
        torch.set_num_threads(5 - threads)
        again = op(*case.args)
        torch.set_num_threads(threads)
        for i, (x, y) in enumerate(zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, again)), strict=True)):
            if not torch.equal(x.nan_to_num(), y.nan_to_num()):
                return f"result {i} differs between {threads} and {5 - threads} threads"
    return wrong(got, case)


def describe(args: tuple) -> str:
    def one(x):
        return f"{str(x.dtype)[6:]}{list(x.shape)} by {list(x.stride())}" if isinstance(x, Tensor) else repr(x)

    return ", ".join(map(one, args))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="folder with the built p3b_ext/_C*.so")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--ops", default="", help="comma-separated names; default: all with a CPU kernel")
    options = parser.parse_args()
    extension = load("_C", next(options.library.glob("p3b_ext/_C*.so")))
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # fills fresh memory with NaN: whatever is left unwritten shows
    torch.set_num_threads(2)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in options.ops.split(",") if n] or [n for n in OPS if has_kernel(f"p3b_ext::{n}", "CPU")]
    weights = [OPS[name].weight for name in names]
    isas = extension.isa_available()
    counts, failures, start = Counter(), 0, time.time()
    for number in range(options.first, options.first + options.calls):
        d = Draw(options.seed, number)
        name = d.random.choices(names, weights)[0]
        machine = Machine(d.random.choice([*isas, isas[-1]]))
        extension.set_isa(machine.isa)
        case = OPS[name].draw(d, machine)
        what = run(getattr(torch.ops.p3b_ext, name), case, check_threads=d.maybe(0.2))
        counts[name] += 1
        if what:
            failures += 1
            print(f"case {number}, {name} on {machine.isa}: {what}\n  {describe(case.args)}", flush=True)
            if failures == 10:
                break
        done = number + 1 - options.first
        if done % 10_000 == 0 and done < options.calls:
            print(f"fuzz: {done} calls, {failures} wrong so far", flush=True)
    by_op = ", ".join(f"{name} {counts[name]}" for name in names)
    took = time.time() - start
    print(f"fuzz: {sum(counts.values())} calls in {took:.0f} s, {failures} wrong, on {', '.join(isas)}; {by_op}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
