"""topk_tokens, prune_slots, select_tokens: hand-made cases, order of ties, values, gradients, errors."""

import numpy
import pytest
import torch
from cases import acc

import p3b_ext
from p3b_ext import reference
from p3b_ext.ops.select import keep_tokens, prune_slots, select_tokens, topk_tokens

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE_BACKENDS = [("cpu", "cpu"), ("cpu", "reference")]
if torch.cuda.is_available():
    DEVICE_BACKENDS += [("cuda", "cuda"), ("cuda", "triton"), ("cuda", "reference")]
INF = torch.inf
ops = torch.ops.p3b_ext


def name(value):
    return str(value).removeprefix("torch.")


# scores, keep, num_prefix, order, positions
LITERAL = [
    ([3, 1, 2], 2, 0, "position", [0, 2]),
    ([3, 1, 2], 2, 0, "score", [0, 2]),
    ([1, 3, 2], 2, 1, "score", [0, 2, 3]),
    ([1, 3, 2], 2, 1, "position", [0, 2, 3]),
    ([1, 2, 3], 2, 2, "score", [0, 1, 4, 3]),
    ([1, 1, 1, 1], 2, 1, "score", [0, 1, 2]),  # equal: lower position first
    ([0, 2, 2, 2, 1], 2, 0, "position", [1, 2]),
    ([0.0, -0.0, 0.0, -0.0], 3, 0, "score", [0, 1, 2]),  # -0 equals 0
    ([-0.0, 0.0], 1, 0, "position", [0]),
    ([-INF, 5, INF, -5], 3, 1, "score", [0, 3, 2, 4]),
    ([-INF, -INF], 1, 0, "position", [0]),
    ([-1, -2, -3], 1, 0, "score", [0]),
    ([4, 5], 0, 3, "position", [0, 1, 2]),
    ([4, 5], 2, 0, "score", [1, 0]),
    ([], 0, 1, "position", [0]),
    ([7], 1, 0, "score", [0]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
@pytest.mark.parametrize("scores,keep,num_prefix,order,wanted", LITERAL)
def test_topk_by_hand(scores, keep, num_prefix, order, wanted, device, backend, dtype):
    if backend in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    scores = torch.tensor([scores, scores], dtype=dtype, device=device)
    with p3b_ext.backend(backend):
        index = topk_tokens(scores, keep, num_prefix, order)
        slot = prune_slots(scores, scores.shape[1] - keep, num_prefix, order)
    assert index.dtype == torch.int64 and index.tolist() == [wanted, wanted]
    rows = [wanted.index(n) if n in wanted else -1 for n in range(num_prefix + scores.shape[1])]
    assert slot.dtype == torch.int32 and slot.tolist() == [rows, rows]


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [(3, 196), (2, 1), (0, 9), (4, 0), (1, 1023), (5, 17), (130, 2)], ids=str)
def test_ranking_is_the_reference(shape, dtype, order):
    coarse = torch.randint(-6, 6, shape).to(dtype) / 3  # many ties
    fine = torch.randn(shape, dtype=torch.float64).to(dtype)
    for scores in (coarse, fine, fine.t().contiguous().t(), torch.cat([fine, coarse], 1)[:, ::2]):
        for keep in {0, 1, scores.shape[1] // 2, scores.shape[1] * 7 // 10, scores.shape[1]}:
            if keep > scores.shape[1]:
                continue
            for num_prefix in (0, 1, 5):
                by_score = order == "score"
                wanted = reference.topk_tokens(scores, keep, num_prefix, by_score)
                assert torch.equal(ops.topk_tokens(scores, keep, num_prefix, by_score), wanted)
                r = scores.shape[1] - keep
                wanted = reference.prune_slots(scores, r, num_prefix, by_score)
                assert torch.equal(ops.prune_slots(scores, r, num_prefix, by_score), wanted)


def test_float64_scores_are_not_rounded():
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12]], dtype=torch.float64)
    assert topk_tokens(scores, 3, 0, "score").tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("B,H,N,C,keep,num_prefix", [(2, 3, 50, 24, 20, 1), (1, 1, 9, 7, 0, 3), (0, 2, 5, 4, 2, 1)])
def test_keep_is_score_rank_and_select(B, H, N, C, keep, num_prefix, order, dtype, device, backend):
    if backend in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    x = torch.randn(B, N, C, dtype=torch.float64).to(dtype).to(device).requires_grad_()
    attention = torch.rand(B, H, N, dtype=torch.float64).to(acc(dtype)).to(device)
    norm = torch.rand(B, N, dtype=torch.float64).to(acc(dtype)).to(device)
    for value_norm, scores in ((norm, attention.mean(1) * norm), (None, attention.mean(1))):
        with p3b_ext.backend(backend):
            wanted = topk_tokens(scores[:, num_prefix:], keep, num_prefix, order)
            y, index = keep_tokens(x, attention, value_norm, keep, num_prefix, order)
            (grad,) = torch.autograd.grad(y.float().square().sum(), x)
            (want,) = torch.autograd.grad(select_tokens(x, wanted).float().square().sum(), x)
        assert torch.equal(index, wanted) and not index.requires_grad
        assert torch.equal(y, x.gather(1, wanted[..., None].expand(-1, -1, C)))
        assert torch.equal(grad, want)


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """x [B, N, C] with other strides."""
    wide = x.new_zeros(x.shape[0], x.shape[1] + 2, x.shape[2] + 3)
    wide[:, 1:-1, 1:-2] = x
    return {
        "contiguous": x,
        "sliced": wide[:, 1:-1, 1:-2],
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    "B,N,M,C", [(2, 17, 9, 24), (1, 1, 1, 1), (3, 5, 12, 7), (0, 4, 2, 3), (2, 6, 0, 5), (1, 197, 138, 65)]
)
def test_select_is_gather(B, N, M, C, dtype, device, backend):
    if backend in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    x = torch.randn(B, N, C, dtype=torch.float64).to(dtype).to(device)
    index = torch.randint(0, N, (B, M), device=device)  # with repetitions
    wanted = x.gather(1, index[..., None].expand(-1, -1, C))
    for layout, view in strided(x).items():
        with p3b_ext.backend(backend):
            assert torch.equal(select_tokens(view, index), wanted), layout
    if B > 1:
        same = x[:1].expand(B, -1, -1)
        rows = index[:1].expand(B, -1)
        with p3b_ext.backend(backend):
            assert torch.equal(select_tokens(same, rows), wanted[:1].expand(B, -1, -1))


def test_select_backward_by_hand():
    grad = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]])
    index = torch.tensor([[2, 0, 2]])
    wanted = [[[2.0, 20.0], [0.0, 0.0], [5.0, 50.0], [0.0, 0.0]]]
    assert ops.select_tokens_backward(grad, index, 4).tolist() == wanted
    assert ops.select_tokens_backward(grad[:, :0], index[:, :0], 2).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_select_backward_adds_up(dtype):
    B, N, M, C = 3, 11, 40, 37
    grad = torch.randn(B, M, C, dtype=torch.float64).to(dtype)
    index = torch.randint(0, N, (B, M))
    truth = torch.zeros(B, N, C, dtype=torch.float64)
    truth.scatter_add_(1, index[..., None].expand(-1, -1, C), grad.double())
    for layout, view in strided(grad).items():
        result = ops.select_tokens_backward(view, index, N)
        assert result.dtype == dtype
        limit = torch.finfo(dtype).eps * truth.abs() + 20 * torch.finfo(acc(dtype)).eps  # one rounding of an acc sum
        assert ((result.double() - truth).abs() <= limit).all(), layout


@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
def test_select_backward_of_a_long_index(device, backend):
    """More rows than the shared memory of a GPU's block has room for; sums of eighths are exact."""
    x = torch.zeros(1, 5, 3, device=device, requires_grad=True)
    index = torch.randint(0, 5, (1, 20_000))
    grad = torch.randint(-16, 17, (1, 20_000, 3)) / 8
    with p3b_ext.backend(backend):
        select_tokens(x, index.to(device)).backward(grad.to(device))
    wanted = torch.zeros(1, 5, 3).scatter_add_(1, index[..., None].expand(-1, -1, 3), grad)
    assert torch.equal(x.grad.cpu(), wanted)


@pytest.mark.parametrize("isa", p3b_ext.backends._C.isa_available())
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_instruction_set(isa, dtype):
    grad = torch.randn(2, 33, 53).to(dtype)
    index = torch.randint(0, 5, (2, 33))
    truth = torch.zeros(2, 5, 53, dtype=torch.float64).scatter_add_(
        1, index[..., None].expand(-1, -1, 53), grad.double()
    )
    p3b_ext.backends._C.set_isa(isa)
    try:
        result = ops.select_tokens_backward(grad, index, 5).double()
    finally:
        p3b_ext.backends._C.set_isa("auto")
    assert ((result - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 40 * torch.finfo(acc(dtype)).eps).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 3, 3, 6], [1, 1, 1, 0]])
    with p3b_ext.backend(backend):
        assert torch.autograd.gradcheck(lambda x: select_tokens(x, index), (x,))


def test_gradient_of_expanded_grad():
    x = torch.randn(2, 7, 5, requires_grad=True)
    index = torch.tensor([[0, 3, 3], [1, 1, 1]])
    select_tokens(x, index).sum().backward()  # the incoming gradient has strides 0
    counts = torch.stack([row.bincount(minlength=7) for row in index])
    assert torch.equal(x.grad, counts[..., None].expand(-1, -1, 5).float())


@pytest.mark.slow
def test_opcheck():
    x = torch.randn(2, 9, 6, requires_grad=True)
    index = torch.randint(0, 9, (2, 5))
    scores = torch.randn(2, 8)
    torch.library.opcheck(ops.topk_tokens, (scores, 3, 1, False))
    torch.library.opcheck(ops.topk_tokens, (scores, 3, 0, True))
    torch.library.opcheck(ops.prune_slots, (scores, 3, 1, False))
    torch.library.opcheck(ops.select_tokens, (x, index))
    torch.library.opcheck(ops.select_tokens_backward, (torch.randn(2, 5, 6), index, 9))


@pytest.mark.slow
def test_compiles_without_a_break():
    def reduce(x, scores):
        return select_tokens(x, topk_tokens(scores, 4, 1)).square().sum()

    x = torch.randn(2, 9, 6, requires_grad=True)
    scores = torch.randn(2, 8)
    compiled = torch.compile(reduce, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(reduce(x, scores), x)[0]
    assert torch.equal(torch.autograd.grad(compiled(x, scores), x)[0], wanted)


@pytest.mark.parametrize("B", [1, 2, 7])
def test_equal_bits_for_every_thread_count(B):
    scores = torch.randint(0, 50, (B, 300)).float()
    x = torch.randn(B, 301, 129)
    index = torch.randint(0, 301, (B, 700))
    grad = torch.randn(B, 700, 129)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            kept = ops.topk_tokens(scores, 150, 1, True)
            results.append((kept, ops.select_tokens(x, kept), ops.select_tokens_backward(grad, index, 301)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


S = torch.randn(2, 5)
X = torch.randn(2, 5, 3)
I64 = torch.zeros(2, 4, dtype=torch.int64)
BAD = [
    (lambda: topk_tokens(S[0], 1), ValueError, "topk_tokens: scores must be"),
    (lambda: topk_tokens(S.long(), 1), TypeError, "topk_tokens: scores must be float32, .*, got torch.int64"),
    (lambda: topk_tokens(S, 6), ValueError, "topk_tokens: keep must be between 0 and 5, got 6"),
    (lambda: topk_tokens(S, -1), ValueError, "topk_tokens: keep must be between 0 and 5, got -1"),
    (lambda: topk_tokens(S, 1.0), TypeError, "topk_tokens: keep must be an int, got float"),
    (lambda: topk_tokens(S, True), TypeError, "topk_tokens: keep must be an int, got bool"),
    (lambda: topk_tokens(S, torch.tensor(1)), TypeError, "topk_tokens: keep must be an int, got Tensor"),
    (
        lambda: select_tokens(X.to_sparse(), I64),
        TypeError,
        "select_tokens: x must be a dense tensor, got torch.sparse_coo",
    ),
    (lambda: select_tokens(X, I64.to_sparse()), TypeError, "select_tokens: index must be a dense tensor"),
    (lambda: topk_tokens(S, 1, -1), ValueError, "topk_tokens: num_prefix must be between 0 and 2147483647, got -1"),
    (lambda: topk_tokens(S, 1, 2**63), ValueError, "topk_tokens: num_prefix must be between 0 and 2147483647, got 92"),
    (lambda: prune_slots(S, 1, 2**31), ValueError, "num_prefix must be between 0 and 2147483647, got 2147483648"),
    (lambda: topk_tokens(S, 1, 1, "best"), ValueError, "topk_tokens: order must be one of position, score, got 'best'"),
    (lambda: topk_tokens(S.masked_fill(S > -9, torch.nan), 1), ValueError, "topk_tokens: scores must .*NaN"),
    (lambda: prune_slots(S, 6), ValueError, "prune_slots: r must be between 0 and 5, got 6"),
    (lambda: prune_slots(S.masked_fill(S > -9, torch.nan), 1), ValueError, "prune_slots: scores must .*NaN"),
    (lambda: select_tokens(X, I64.int()), TypeError, "select_tokens: index must be an int64 tensor, got torch.int32"),
    (lambda: select_tokens(X, I64[:1]), ValueError, r"select_tokens: index must be \[2, M\], got shape \[1, 4\]"),
    (lambda: select_tokens(X[0], I64), ValueError, "select_tokens: x must be"),
    (lambda: select_tokens(X, I64 + 5), ValueError, "select_tokens: index must be"),
    (lambda: select_tokens(X, I64 - 1), ValueError, "select_tokens: index must be"),
    (lambda: select_tokens(X[:, :0], I64), ValueError, "select_tokens: index must be"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("call,error,text", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, text, backend):
    with p3b_ext.backend(backend), pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("call,error,text", BAD, ids=range(len(BAD)))
def test_bad_input_under_compile(call, error, text):
    """The same sentence reaches a user of torch.compile, from the tracer or from the op."""
    torch._dynamo.reset()
    with pytest.raises(Exception, match=text):
        torch.compile(call, backend="eager")()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numpy_integers(backend):
    two, one = numpy.int32(2), numpy.int64(1)
    with p3b_ext.backend(backend):
        assert torch.equal(topk_tokens(S, two, one), topk_tokens(S, 2, 1))
        assert torch.equal(prune_slots(S, two, one), prune_slots(S, 2, 1))


def test_first_bad_element_is_named():
    scores = torch.zeros(40, 300)
    scores[31, 7] = scores[12, 250] = torch.nan
    with pytest.raises(ValueError, match="topk_tokens: scores must not be NaN, got NaN in image 12, score 250"):
        topk_tokens(scores, 3)
    index = torch.zeros(2, 5000, dtype=torch.int64)
    index[1, 4000], index[1, 4500] = 9, -1
    with pytest.raises(ValueError, match="select_tokens: index must be from 0 to 2, got 9 in image 1, row 4000"):
        select_tokens(torch.zeros(2, 3, 4), index)


def test_raw_ops_check_for_themselves():
    grad = torch.randn(2, 4, 3)
    for call in (
        lambda: ops.topk_tokens(S, 6, 1, False),
        lambda: ops.topk_tokens(S, 1, -1, False),
        lambda: ops.prune_slots(S.long(), 1, 1, False),
        lambda: ops.select_tokens(X, I64.int()),
        lambda: ops.select_tokens_backward(grad, I64 + 2, 2),
        lambda: ops.select_tokens_backward(grad, I64 - 1, 2),
        lambda: ops.select_tokens_backward(grad, I64[:, :3], 2),
        lambda: ops.select_tokens_backward(grad, I64, -1),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"_(tokens|slots|backward): .* must "):
            call()
