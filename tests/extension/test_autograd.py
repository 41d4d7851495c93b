"""The differentiable ops under torch.func and forward-mode AD."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

import p3b_ext
from p3b_ext.ops.attention import packed_attention
from p3b_ext.ops.merge import merge_tokens, unmerge_tokens
from p3b_ext.ops.select import select_tokens

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the batching fallback

B, N, M, C = 2, 5, 3, 4
SLOT = torch.tensor([[0, 0, 1, 2, 1], [1, -1, 2, 0, 0]], dtype=torch.int32)
INDEX = torch.tensor([[0, 1, 4], [3, 2, 0]])
SIZE, GATE = torch.tensor([[1.0, 2, 1, 3, 1], [2, 1, 1, 1, 4]]), torch.tensor([1.0, 0.5, 0, 2])


def attention(x):
    q = x.reshape(B, N, 2, 2).transpose(1, 2)
    return p3b_ext.masked_attention(q, q * 2, q.cos(), token_size=SIZE, channel_gate=GATE[:2], aux=["cls_attention"])[0]


def packed(x):
    return packed_attention(torch.stack([x, x.sin(), x.cos()], 2)[:, :, :, None], key_mask=SLOT >= 0)


OPS = {
    "masked_attention": attention,
    "packed_attention": packed,
    "select_tokens": lambda x: select_tokens(x, INDEX),
    "merge_tokens": lambda x: merge_tokens(x, SLOT, M, size=x.square().sum(-1) + 1)[0],
    "unmerge_tokens": lambda x: unmerge_tokens(x[:, :M], SLOT, 1.0),
}
every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture
def x():
    return torch.randn(B, N, C)


@every_op
def test_reverse_mode(op, x):
    def loss(x):
        return OPS[op](x).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(x), expected)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(jacrev(loss)(x), expected)
    xs = torch.stack([x, x.flip(1)])
    torch.testing.assert_close(vmap(grad(loss))(xs), torch.stack([grad(loss)(x), grad(loss)(x.flip(1))]))
    torch.testing.assert_close(grad(lambda xs: vmap(loss)(xs).sum())(xs), vmap(grad(loss))(xs))
    torch.testing.assert_close(vmap(OPS[op])(xs)[1], OPS[op](xs[1]))


@every_op
def test_reverse_mode_compiles(op, x):
    torch.compiler.reset()

    def loss(x):
        return OPS[op](x).square().sum()

    def gradient(x):
        return torch.autograd.grad(loss(x), x)[0]

    with forward_ad.dual_level():  # nothing has a tangent
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(gradient(leaf), grad(loss)(x))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], gradient(leaf))


@every_op
def test_forward_mode_is_refused(op, x):
    def loss(x):
        return OPS[op](x).square().sum()

    message = op.replace("packed", "masked") + r': forward-mode derivatives .*backend\("reference"\)'
    with pytest.raises(NotImplementedError, match=message):
        jvp(OPS[op], (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        OPS[op](forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match=message):
        hessian(loss)(x)
    with p3b_ext.backend("reference"):
        tangent = jvp(loss, (x,), (x,))[1]
    torch.testing.assert_close(tangent, (grad(loss)(x) * x).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [True, False])
def test_forward_mode_is_refused_under_compile(x, fullgraph):
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=fullgraph, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))
    match = "forward-mode derivatives|torch.func.jvp.compiled_fn. function from eager mode is not supported"
    with pytest.raises(Exception, match=match):
        jvp(compiled, (x,), (x,))
    tangent = torch.compile(lambda x: jvp(attention, (x,), (x,))[1], fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match="forward-mode derivatives"):
        tangent(x)


@every_op
def test_second_derivatives_are_refused(op, x):
    def slope(x):
        return grad(lambda x: OPS[op](x).square().sum())(x).square().sum()

    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad(slope)(x)
