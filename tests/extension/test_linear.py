"""Linear layers through oneDNN against PyTorch's."""

import pytest
import torch
from cases import assert_same_to_rounding
from torch import nn

import p3b_ext
import p3b_ext.linear
from p3b_ext.linear import linear


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_linear(shape, bias):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(6, 7, requires_grad=True)
    b = torch.randn(6, requires_grad=True) if bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    grad = torch.randn(*shape[:-1], 6)

    def found(f, dtype):
        """Values, gradients, and the gradients of a penalty on a gradient."""
        x, w, *b = (t.detach().to(dtype).requires_grad_() for t in leaves)
        y = f(x, w, *b)
        (slope,) = torch.autograd.grad(f(x, w, *b).sin().sum(), x, create_graph=True)
        penalty = torch.autograd.grad(slope.square().sum(), [x, w])
        return y.detach(), *torch.autograd.grad(y, [x, w, *b], grad.to(dtype)), *penalty

    theirs, truth = (found(nn.functional.linear, dtype) for dtype in (torch.float32, torch.float64))
    for mine, other, exact in zip(found(linear, torch.float32), theirs, truth, strict=True):
        assert_same_to_rounding(mine, other, exact)


def test_onednn_linear_where_it_cannot_run():
    w, b = torch.randn(6, 7), torch.randn(6)
    for x in (torch.randn(7), torch.randn(0, 7)):
        torch.testing.assert_close(linear(x, w, b), nn.functional.linear(x, w, b))
    x = torch.randn(3, 7, dtype=torch.float64)
    assert linear(x, w.double(), b.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 7), w, b).dtype == torch.bfloat16
    mapped = torch.func.vmap(lambda x: linear(x, w, b))(torch.randn(4, 3, 7))
    assert mapped.shape == (4, 3, 6)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7)
    torch.testing.assert_close(compiled(x, w, b), linear(x, w, b))


def test_preference_is_decided_once():
    first = p3b_ext.linear.prefer_onednn()
    assert first is p3b_ext.linear.prefer_onednn()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert first is False


def test_onednn_linear_keeps_tangents():
    x, tangent = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    layer = p3b_ext.linear.OneDnnLinear(8, 8).requires_grad_(False)
    _, found = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(found, tangent @ layer.weight.T)
