"""Every compiled op on small odd shapes, compared with the reference: short enough to run under compute-sanitizer."""

import argparse
import sys

import torch
from cases import AttentionCase

import p3b_ext
from p3b_ext.ops.merge import match_tokens, merge_tokens, unmerge_tokens
from p3b_ext.ops.select import keep_tokens, prune_slots, select_tokens, topk_tokens
from p3b_ext.plan import plan_ppt

NAMES = ("lse", "cls_attention", "entropy", "value_norm", "to_cls", "received")
CASES = [
    AttentionCase(2, 2, 17, 24, mask="some", sizes=5, gate="HD"),
    AttentionCase(1, 3, 197, 64, mask="all", sizes=9, gate="D"),
    AttentionCase(1, 1, 33, 13, "sliced", gate="pruned"),
    AttentionCase(1, 1, 450, 64, sizes=3),
    AttentionCase(1, 2, 65, 128, "contiguous", mask="some", gate="D"),
]
failures: list[str] = []


def close(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    limit = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(got.float(), want.float(), rtol=limit, atol=limit, msg=lambda m: f"{name}: {m}")


def both(run, device: str) -> None:
    """run() on the compiled backend and on the reference; every tensor must agree."""
    results = {}
    for backend in ("cuda" if device == "cuda" else "cpu", "reference"):
        with p3b_ext.backend(backend):
            results[backend] = run()
    (name, got), (_, want) = results.items()
    for key, value in got.items():
        try:
            if value.is_floating_point():
                close(key, value, want[key], run.dtype)
            else:
                torch.testing.assert_close(value, want[key], rtol=0, atol=0)
        except AssertionError as error:
            failures.append(f"{name} {run.dtype} {run.label} {key}: {error}")


class Attention:
    def __init__(self, case: AttentionCase, dtype: torch.dtype, device: str):
        self.label, self.dtype = str(case), dtype
        self.inputs = case.inputs(dtype, device=device)
        self.grad = torch.randn(case.B, case.H, case.N, case.D, device=device).to(dtype)

    def __call__(self) -> dict:
        t = {
            n: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
            for n, x in self.inputs.items()
        }
        rest = {n: t[n] for n in ("key_mask", "token_size", "channel_gate")}
        out, aux = p3b_ext.masked_attention(t["q"], t["k"], t["v"], **rest, aux=NAMES)
        wanted = [n for n in ("q", "k", "v", "token_size", "channel_gate") if t[n] is not None]
        grads = torch.autograd.grad(out, [t[n] for n in wanted], self.grad)
        return {"out": out} | aux._asdict() | {f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}


class Tokens:
    def __init__(self, n: int, c: int, dtype: torch.dtype, device: str):
        self.label, self.dtype = f"N{n} C{c}", dtype
        self.x = torch.randn(2, n, c, device=device).to(dtype)
        self.metric = torch.randn(2, n, 40, device=device)
        self.keys = torch.randn(2, 3, n, 16, device=device)
        # The second image spreads: one is merged, the other pruned.
        self.spread = torch.rand(2, n - 1, device=device) * torch.tensor([[0.01], [1.0]], device=device)
        self.attention, self.norm = torch.rand(2, 3, n, device=device), torch.rand(2, n, device=device)
        self.scores = torch.rand(2, n - 1, device=device).to(dtype)
        self.size = torch.rand(2, n, device=device) + 1

    def __call__(self) -> dict:
        n = self.x.shape[1]
        x, size = self.x.detach().requires_grad_(), self.size.detach().requires_grad_()
        slot = match_tokens(self.metric, n // 3)
        y, sizes = merge_tokens(x, slot, n - n // 3, size=size)
        index = topk_tokens(self.scores, n // 2, order="score")
        chosen, positions = keep_tokens(x, self.attention, self.norm, n // 2)
        mixed = plan_ppt(self.spread, self.keys, n // 4, 0.01).slot
        kept, back = select_tokens(x, index), unmerge_tokens(y, slot)
        total = (
            (y.float() ** 2).sum()
            + (sizes**2).sum()
            + (kept.float() ** 2).sum()
            + (chosen.float() ** 2).sum()
            + (back.float() ** 2).sum()
        )
        grad_x, grad_size = torch.autograd.grad(total, (x, size))
        result = {"slot": slot, "y": y, "sizes": sizes, "index": index, "kept": kept, "back": back}
        result |= {"chosen": chosen, "positions": positions, "mixed": mixed, "of_keys": match_tokens(self.keys, n // 3)}
        return result | {"slots": prune_slots(self.scores, n // 4), "grad_x": grad_x, "grad_size": grad_size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    calls = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for run in [
            *(Attention(c, dtype, device) for c in CASES),
            Tokens(17, 24, dtype, device),
            Tokens(50, 7, dtype, device),
        ]:
            both(run, device)
            calls += 1
    for failure in failures:
        print(failure)
    print(f"{calls} calls, {len(failures)} results differ from the reference")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
