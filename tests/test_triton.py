"""The Triton kernels: interpreted on the CPU, run on a GPU, captured by AOTAutograd, compiled ahead of time.

Triton reads TRITON_INTERPRET when it is imported, so everything here runs in processes of its own and the rest of the
suite never sees the variable. The checks themselves: tests/triton_checks.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
pytest.importorskip("triton")


def child(*arguments: object, interpret: bool = False) -> None:
    """Run python with these arguments from the repository root; its output is the message of a failure."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "P3B_EXT_BACKEND")}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["attention", "select", "merge"])
def test_interpreter(family):
    child("-m", "pytest", TESTS / "triton_checks.py", "-k", family, interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_gpu():
    child("-m", "pytest", TESTS / "triton_checks.py")


CAPTURE = """
import torch
import triton
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
import p3b_ext.kernels
ops = torch.ops.p3b_ext_triton

class Driver:  # the analysis of what a kernel writes asks which GPU it is for
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

if not torch.cuda.is_available():
    triton.runtime.driver.set_active(Driver())

class Everything(torch.nn.Module):
    def forward(self, q, k, v, x, size, scores):
        out, lse, *aux = ops.masked_attention(q, k, v, None, size, None, 0.125, 7)
        grads = ops.masked_attention_backward(out, q, k, v, out, lse, None, size, None, 0.125, 3)
        columns = ops.attention_columns(q, k, lse, None, size, None, 0.125, 3)
        slot = ops.match_tokens(x, 8, 1, None)
        y, sizes = ops.merge_tokens(x, slot, 42, size, None, True)
        grad_x, grad_size, _ = ops.merge_tokens_backward(y, sizes, x, slot, y, size, None, True)
        index = ops.topk_tokens(scores, 9, 1, False)
        picked = ops.select_tokens_backward(ops.select_tokens(x, index), index, 50)
        restored = ops.unmerge_tokens(y, ops.prune_slots(scores, 8, 1, True), 0.0)
        return out, grads[0], grads[1], *aux, *columns, grad_x, grad_size, picked, restored

graphs = []
def keep(graph, _):
    graphs.append(graph)
    return graph

with FakeTensorMode():
    q, k, v = torch.empty(2, 50, 3, 3, 64, device="cuda", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    x = torch.empty(2, 50, 96, device="cuda", dtype=torch.bfloat16)
    size, scores = torch.empty(2, 50, device="cuda"), torch.empty(2, 49, device="cuda")
    inputs = q, k, v, x, size, scores
    shapes = [tuple(t.shape) for t in Everything()(*inputs)]  # by the fakes that triton_op derives
    rows = (2, 3, 50)
    assert shapes == [(2, 50, 3, 64), (2, 50, 3, 3, 64), (2, 50), rows, rows, (2, 50), rows, rows, (2, 50, 96), (2, 50),
                      (2, 50, 96), (2, 50, 96)], shapes
    aot_module_simplified(Everything(), inputs, fw_compiler=keep)
    program = torch.export.export(Everything(), inputs)
called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
assert {f"p3b_ext_triton.{op}.default" for op in ("masked_attention", "match_tokens", "merge_tokens", "topk_tokens",
    "select_tokens", "unmerge_tokens")} <= called, called
launches = [n for n in graphs[0].graph.nodes if "triton_kernel_wrapper" in str(n.target)]
assert len(launches) == 13, len(launches)
written = {name for n in launches for name in n.kwargs["tensors_to_clone"]}
assert written == {"out_ptr", "lse_ptr", "cls_ptr", "entropy_ptr", "square_ptr", "delta_ptr", "grad_qkv_ptr",
    "bias_part_ptr", "to_cls_ptr", "received_ptr", "best_ptr", "ordinal_ptr", "slot_ptr", "y_ptr", "size_out_ptr",
    "grad_x_ptr", "grad_size_ptr",
    "score_ptr"}, written  # topk_tokens stores where the scores say, which the analysis takes for a store into them
"""


@pytest.mark.slow
def test_capture():
    """Fakes have the right shapes, the compiler sees 13 Triton kernels instead of opaque ops, it finds that they write
    nothing but their outputs (an input taken for written would be copied before every call), and torch.export takes
    the ops as they are. No GPU needed."""
    child("-c", CAPTURE)


@pytest.mark.slow
def test_ahead_of_time(tmp_path):
    """A syntax error for the real compiler cannot hide behind the interpreter: compile for compute capability 9.0."""
    script = TESTS / "bench" / "triton_aot.py"
    child(script, "--arch", 90, "--only", "attention bf16 N17 D24 all", "--json", tmp_path / "attention.json")
    child(script, "--arch", 80, "--only", "tokens fp32 N197", "--json", tmp_path / "tokens.json")
    results = [r for f in ("attention", "tokens") for r in json.loads((tmp_path / f"{f}.json").read_text())]
    assert {r["kernel"] for r in results} == {
        *("forward", "delta", "backward", "columns"),
        *("rank", "gather_rows", "sum_rows", "best_match", "match_slots", "merge_backward"),
    }
    assert all(r["shared"] <= 99 * 1024 for r in results)  # what any GPU of compute capability 8.x allows
