"""match_tokens, merge_tokens, unmerge_tokens: recorded and hand-made cases, values, gradients, errors."""

import numpy
import pytest
import torch
import vits
from cases import acc, assert_within

import p3b_ext
from p3b_ext import reference
from p3b_ext.ops.merge import match_tokens, merge_tokens, unmerge_tokens

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE_BACKENDS = [("cpu", "cpu"), ("cpu", "reference")]
if torch.cuda.is_available():
    DEVICE_BACKENDS += [("cuda", "cuda"), ("cuda", "triton"), ("cuda", "reference")]
GOLDEN = sorted(vits.GOLDEN.glob("match_*.npz"))
ops = torch.ops.p3b_ext


def name(value):
    return str(value).removeprefix("torch.")


def skip_float64_on_gpu(backend, dtype):
    if backend in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")


@pytest.fixture(params=p3b_ext.backends._C.isa_available())
def isa(request):
    p3b_ext.backends._C.set_isa(request.param)
    yield request.param
    p3b_ext.backends._C.set_isa("auto")


# Recorded outputs of the published implementation ---------------------------------------------


def test_recorded_cases_are_there():
    assert [path.name for path in GOLDEN] == ["match_0.npz", "match_1.npz", "match_2.npz", "match_3.npz"]


def check_recorded(path, device):
    data = {key: torch.from_numpy(value).to(device) for key, value in numpy.load(path).items() if value.ndim}
    r, num_prefix = (int(numpy.load(path)[key]) for key in ("r", "num_prefix"))
    slot = match_tokens(data["metric"], r, num_prefix)
    assert torch.equal(slot, data["slot_of_token"])
    y, size = merge_tokens(data["x"], slot, slot.shape[1] - r, data["size"])
    torch.testing.assert_close(y, data["merged"], rtol=0, atol=1e-5)
    torch.testing.assert_close(size, data["merged_size"], rtol=0, atol=1e-5)
    torch.testing.assert_close(unmerge_tokens(y, slot), data["unmerged"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
def test_recorded(path, device, backend):
    with p3b_ext.backend(backend):
        check_recorded(path, device)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recorded_with_every_instruction_set(path, isa):
    with p3b_ext.backend("cpu"):
        check_recorded(path, "cpu")


# match_tokens ----------------------------------------------------------------------------------

E, S, W, N, Z = [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
NE = [1.0, 1.0]
# metric, r, num_prefix, source, slot
LITERAL = [
    ([E, E], 0, 0, None, [0, 1]),
    ([E, E], 1, 0, None, [0, 0]),
    ([E], 0, 1, None, [0]),
    ([E, N, E, E], 1, 1, None, [0, 1, 2, 2]),  # 2 -> 3; rows: 0, then destinations 1, 3
    ([E, N, E, E, N, N, E], 1, 1, None, [0, 3, 4, 4, 1, 5, 2]),  # 2 ties with 4 and with 6: lower index merges
    ([E, N, E, N, NE, E], 1, 0, None, [4, 2, 0, 3, 1, 4]),  # 0 and 2 both want 5: 0 is first
    ([E, E, N, E, N, N], 2, 0, None, [1, 1, 3, 2, 0, 3]),  # 0: destinations 1 and 3 tie, lower index
    ([Z, E, Z, N], 1, 0, None, [1, 1, 0, 2]),  # zero rows: similarity 0 to all, the lowest of each
    ([W, E, S, N], 2, 0, None, [1, 0, 0, 1]),  # opposite (-1) loses to orthogonal (0)
    ([E, E, E], 0, 2, None, [0, 1, 2]),
    ([E, N, E, N], 2, 0, [0, 0, 1, 1], [0, 1, 0, 1]),
    ([E, N, E, N], 1, 1, [1, 1, 0, 1], [0, 2, 2, 1]),  # the mask of prefix tokens means nothing
    ([E, E, E, E], 3, 0, [1, 1, 1, 0], [0, 0, 0, 0]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
@pytest.mark.parametrize("metric,r,num_prefix,source,wanted", LITERAL)
def test_match_by_hand(metric, r, num_prefix, source, wanted, device, backend, dtype):
    skip_float64_on_gpu(backend, dtype)
    metric = torch.tensor([metric, metric], dtype=dtype, device=device)
    source = None if source is None else torch.tensor([source, source], dtype=torch.bool, device=device)
    with p3b_ext.backend(backend):
        slot = match_tokens(metric, r, num_prefix, source)
    assert slot.dtype == torch.int32 and slot.tolist() == [wanted, wanted]


SHAPES = [
    (3, 17, 8, 1),
    (2, 64, 33, 0),
    (1, 197, 64, 1),
    (2, 198, 24, 2),
    (1, 1, 4, 1),
    (0, 9, 5, 1),
    (2, 2, 3, 0),
    (4, 50, 1, 5),
    (1, 577, 40, 1),
]


@pytest.mark.parametrize("B,N,D,num_prefix", SHAPES)
def test_match_is_the_reference(B, N, D, num_prefix, isa):
    metric = torch.randn(B, N, D)
    views = [metric, metric.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([metric, metric], 2)[..., :D]]
    half = (N - num_prefix) // 2
    for r in sorted({0, half // 3, half}):
        wanted = reference.match_tokens(metric.double(), r, num_prefix, None)
        for view in views:
            assert torch.equal(ops.match_tokens(view, r, num_prefix, None), wanted)
        assert torch.equal(ops.match_tokens(metric.double(), r, num_prefix, None), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_match_with_a_source_mask(dtype, isa):
    metric = torch.randn(3, 41, 19).to(dtype)
    source = torch.rand(3, 41) < 0.6
    source[:, 5] = False
    r = int(source[:, 2:].sum(1).min())
    for count in (0, 1, r // 2, r):
        wanted = reference.match_tokens(metric.double(), count, 2, source)
        assert torch.equal(ops.match_tokens(metric, count, 2, source), wanted)


def test_match_settles_ties_by_position(isa):
    """Tokens out of four kinds: nearly all similarities are equal, wherever the kernel's tiles begin and end."""
    kinds = torch.eye(4) * torch.tensor([1.0, 2.0, 0.5, 4.0])  # powers of two: cosine similarities are exact
    metric = kinds[torch.randint(0, 4, (6, 101))]
    for r in (1, 13, 50):
        assert torch.equal(ops.match_tokens(metric, r, 1, None), reference.match_tokens(metric.double(), r, 1, None))


def test_match_extreme_magnitudes(isa):
    """The square of a coordinate may overflow or vanish; a zero row has similarity 0 to everything."""
    metric = torch.randn(2, 33, 12)
    metric[:, ::3] *= 1e30
    metric[:, 1::3] *= 1e-9
    metric[:, 7] = 0
    metric[:, 8] = 0
    metric[:, 11] = torch.finfo(torch.float32).max
    wanted = reference.match_tokens(metric.double(), 12, 1, None)
    assert torch.equal(ops.match_tokens(metric, 12, 1, None), wanted)


# merge_tokens and unmerge_tokens ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("device,backend", DEVICE_BACKENDS)
def test_merge_by_hand(device, backend, dtype):
    skip_float64_on_gpu(backend, dtype)
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [5.0, 0.0], [8.0, 8.0]]], dtype=dtype, device=device)
    slot = torch.tensor([[2, 0, 2, -1]], dtype=torch.int32, device=device)
    size = torch.tensor([[1.0, 5.0, 3.0, 2.0]], dtype=acc(dtype), device=device)
    weight = torch.tensor([[0.5, 2.0, -0.5, 9.0]], dtype=acc(dtype), device=device)
    cases = [
        (None, None, True, [[3, 6], [0, 0], [3, 1], [0, 0]], [1, 0, 2, 0]),
        (None, None, False, [[3, 6], [0, 0], [6, 2], [0, 0]], [1, 0, 2, 0]),
        (size, None, True, [[3, 6], [0, 0], [4, 0.5], [0, 0]], [5, 0, 4, 0]),
        (size, None, False, [[15, 30], [0, 0], [16, 2], [0, 0]], [5, 0, 4, 0]),
        (size, weight, False, [[6, 12], [0, 0], [-2, 1], [0, 0]], [5, 0, 4, 0]),
        (
            None,
            weight,
            True,
            [[3, 6], [0, 0], [-2, 1], [0, 0]],
            [1, 0, 2, 0],
        ),  # sum 0: no division
    ]
    for size_, weight_, normalize, wanted, wanted_size in cases:
        with p3b_ext.backend(backend):
            y, size_out = merge_tokens(x, slot, 4, size_, weight_, normalize)
        assert y.dtype == dtype and y[0].tolist() == wanted
        assert size_out.dtype == acc(dtype) and size_out[0].tolist() == wanted_size
    with p3b_ext.backend(backend):
        restored = unmerge_tokens(y, slot, 7.0)
    assert restored[0].tolist() == [[-2, 1], [3, 6], [-2, 1], [7, 7]]


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    wide = x.new_zeros(x.shape[0], x.shape[1] + 2, x.shape[2] + 3)
    wide[:, 1:-1, 1:-2] = x
    return [
        x,
        wide[:, 1:-1, 1:-2],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ]


MERGES = [
    (2, 17, 24, 9),
    (1, 1, 1, 1),
    (3, 40, 7, 5),
    (0, 4, 3, 2),
    (2, 6, 5, 9),
    (1, 197, 65, 181),
    (2, 9, 1, 1),
    (2, 0, 3, 2),
    (1, 5, 0, 2),
]


def through_reference(x, slot, M, size, weight, normalize, grad_y, grad_size_out, dtype):
    """y, size_out and the gradients of x, size and weight (None where absent), computed in dtype."""

    def to(t, kind):
        return None if t is None else t.to(kind)

    leaves = [to(x, dtype), to(size, acc(dtype)), to(weight, acc(dtype))]
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y, size_out = reference.merge_tokens(leaves[0], slot, M, *leaves[1:], normalize)
    loss = (y * to(grad_y, dtype)).double().sum()
    if grad_size_out is not None:
        loss = loss + (size_out * to(grad_size_out, acc(dtype))).double().sum()
    grads = iter(torch.autograd.grad(loss, [t for t in leaves if t is not None]))
    return [y.detach(), size_out.detach(), *(None if t is None else next(grads) for t in leaves)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("B,N,C,M", MERGES)
def test_merge_and_its_gradients(B, N, C, M, dtype, normalize, isa):
    """Errors at most twice those of the reference in the same dtype, both against float64."""
    x = torch.randn(B, N, C, dtype=torch.float64).to(dtype)
    slot = torch.randint(-1, M, (B, N), dtype=torch.int32)
    size = (torch.rand(B, N) * 3 + 0.5).to(acc(dtype))
    weight = (torch.rand(B, N) + 0.1).to(acc(dtype))
    grad_y, grad_size_out = torch.randn(B, M, C).to(dtype), torch.randn(B, M).to(acc(dtype))
    for size_, weight_ in ((None, None), (size, None), (None, weight), (size, weight)):
        given = x, slot, M, size_, weight_, normalize, grad_y, None if size_ is None else grad_size_out
        truth, plain = through_reference(*given, torch.float64), through_reference(*given, dtype)
        for view in layouts(x):
            y, size_out = ops.merge_tokens(view, slot, M, size_, weight_, normalize)
            grads = ops.merge_tokens_backward(
                layouts(grad_y)[2],
                grad_size_out if size_ is not None else None,
                view,
                slot,
                y,
                size_,
                weight_,
                normalize,
            )
            assert [g.numel() for g in grads[1:]] == [0 if t is None else B * N for t in (size_, weight_)]
            names = ("y", "size_out", "grad_x", "grad_size", "grad_weight")
            for what, result, want, ordinary in zip(names, (y, size_out, *grads), truth, plain, strict=True):
                if want is None:
                    continue
                kind = dtype if what in ("y", "grad_x") else acc(dtype)
                assert result.dtype == kind
                if what in ("grad_size", "grad_weight") and normalize and dtype in (torch.bfloat16, torch.float16):
                    # y is an input of the gradient and was rounded to x's dtype: one rounding of y, times grad_y
                    limit = torch.finfo(dtype).eps * 20 * max(1, C) ** 0.5
                    assert want.numel() == 0 or (result.double() - want).abs().max() <= limit, what
                else:
                    assert_within(what, result, want, ordinary, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("B,N,C,M", MERGES)
def test_unmerge_and_its_gradient(B, N, C, M, dtype, isa):
    y = torch.randn(B, M, C, dtype=torch.float64).to(dtype)
    slot = torch.randint(-1, M, (B, N), dtype=torch.int32)
    grad = torch.randn(B, N, C, dtype=torch.float64).to(dtype)
    truth = torch.zeros(B, M + 1, C, dtype=torch.float64)
    truth.scatter_add_(1, slot.long().where(slot >= 0, M)[..., None].expand(-1, -1, C), grad.double())
    for view in layouts(y):
        assert torch.equal(ops.unmerge_tokens(view, slot, 0.3), reference.unmerge_tokens(y, slot, 0.3))
    for view in layouts(grad):
        result = ops.unmerge_tokens_backward(view, slot, M)
        limit = (
            torch.finfo(dtype).eps * truth[:, :M].abs() + 40 * torch.finfo(acc(dtype)).eps
        )  # one rounding of an acc sum
        assert result.dtype == dtype and ((result.double() - truth[:, :M]).abs() <= limit).all()


def test_one_token_rows_are_copied_exactly():
    """A mean over one token is that token, bit for bit, and does not depend on its size."""
    x = torch.randn(2, 9, 33)
    slot = torch.randperm(9, dtype=torch.int32).expand(2, -1)
    size = torch.rand(2, 9, requires_grad=True) + 0.1
    y, _ = merge_tokens(x, slot, 9, size)
    assert torch.equal(y, torch.zeros_like(x).scatter(1, slot.long()[..., None].expand_as(x), x))
    assert torch.equal(unmerge_tokens(y, slot), x)
    (grad,) = torch.autograd.grad(y.sum(), size)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize, backend):
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    slot = torch.tensor([[0, 1, 2, 2, -1, 4, 4, 4, 1], [0, 0, 0, 0, 0, 0, 0, 0, -1]], dtype=torch.int32)
    size = (torch.rand(2, 9, dtype=torch.float64) + 0.5).requires_grad_()
    weight = (torch.rand(2, 9, dtype=torch.float64) + 0.5).requires_grad_()
    y = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    with p3b_ext.backend(backend):
        assert check(lambda x: merge_tokens(x, slot, 6, None, None, normalize)[0], (x,))
        assert check(lambda x, s: merge_tokens(x, slot, 6, s, None, normalize), (x, size))
        assert check(lambda x, w: merge_tokens(x, slot, 6, None, w, normalize)[0], (x, weight))
        assert check(lambda x, s, w: merge_tokens(x, slot, 6, s, w, normalize), (x, size, weight))
        assert check(lambda y: unmerge_tokens(y, slot, 0.5), (y,))


def test_opcheck():
    x = torch.randn(2, 9, 6, requires_grad=True)
    size = torch.rand(2, 9) + 1
    slot = torch.randint(-1, 5, (2, 9), dtype=torch.int32)
    weight = torch.rand(2, 9, requires_grad=True)
    torch.library.opcheck(ops.match_tokens, (x.detach(), 3, 1, None))
    torch.library.opcheck(ops.match_tokens, (x.detach(), 2, 0, (torch.arange(18) % 3 > 0).view(2, 9)))
    y, size_out = ops.merge_tokens(x.detach(), slot, 5, size, None, True)
    for args in ((None, None, True), (size.clone().requires_grad_(), None, True), (size, weight, False)):
        torch.library.opcheck(ops.merge_tokens, (x, slot, 5, *args))
    torch.library.opcheck(ops.merge_tokens_backward, (y, size_out, x.detach(), slot, y, size, None, True))
    torch.library.opcheck(ops.merge_tokens_backward, (y, None, x.detach(), slot, y, None, weight.detach(), False))
    torch.library.opcheck(ops.unmerge_tokens, (y.clone().requires_grad_(), slot, 0.5))
    torch.library.opcheck(ops.unmerge_tokens_backward, (x.detach(), slot, 5))


def test_compiles_without_a_break():
    def reduce(x, size):
        slot = match_tokens(x, 3, 1)
        y, size = merge_tokens(x, slot, x.shape[1] - 3, size)
        return unmerge_tokens(y, slot).square().sum() + size.log().sum()

    leaves = torch.randn(2, 9, 6, requires_grad=True), (torch.rand(2, 9) + 0.5).requires_grad_()
    compiled = torch.compile(reduce, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(reduce(*leaves), leaves), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("B", [1, 2, 7])
def test_equal_bits_for_every_thread_count(B):
    x, metric = torch.randn(B, 301, 129), torch.randn(B, 301, 40)
    size, weight = torch.rand(B, 301) + 1, torch.rand(B, 301)
    crowded = torch.randint(-1, 20, (B, 301), dtype=torch.int32)
    grad = torch.randn(B, 20, 129)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            slot = ops.match_tokens(metric, 70, 1, None)
            y, total = ops.merge_tokens(x, crowded, 20, size, weight, True)
            grads = ops.merge_tokens_backward(grad, total, x, crowded, y, size, weight, True)
            results.append(
                [
                    slot,
                    y,
                    total,
                    *grads,
                    ops.unmerge_tokens(y, crowded, 0.0),
                    ops.unmerge_tokens_backward(x, crowded, 20),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Errors ----------------------------------------------------------------------------------------

X = torch.randn(2, 6, 3)
SLOT = torch.zeros(2, 6, dtype=torch.int32)
ONES = torch.ones(2, 6)
NAN = X.clone()
NAN[1, 3, 2] = torch.nan
ALL = torch.ones(2, 6, dtype=torch.bool)
FEW = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
BAD = [
    (lambda: match_tokens(X[0], 1), ValueError, "match_tokens: metric must be"),
    (lambda: match_tokens(X.int(), 1), TypeError, "match_tokens: metric must be float32, .*, got torch.int32"),
    (lambda: match_tokens(X, 3), ValueError, "match_tokens: r must be between 0 and 2, got 3"),
    (lambda: match_tokens(X, -1), ValueError, "match_tokens: r must be between 0 and 2, got -1"),
    (lambda: match_tokens(X, 1, 7), ValueError, "match_tokens: num_prefix must be between 0 and 6, got 7"),
    (lambda: match_tokens(NAN, 1), ValueError, "match_tokens: metric must be .*NaN"),
    (
        lambda: match_tokens(X, 1, 0, ALL.int()),
        TypeError,
        "source must have dtype torch.bool, got torch.int32",
    ),
    (
        lambda: match_tokens(X, 1, 0, ALL[:, :5]),
        ValueError,
        r"source must have shape \[2, 6\], got \[2, 5\]",
    ),
    (lambda: match_tokens(X, 2, 0, FEW), ValueError, "match_tokens: "),
    (lambda: match_tokens(X, 1, 3, FEW), ValueError, "match_tokens: "),
    (lambda: match_tokens(X, 1, 0, ALL), ValueError, "match_tokens: source must"),
    (lambda: merge_tokens(X[0], SLOT, 2), ValueError, "merge_tokens: x must be"),
    (lambda: merge_tokens(X, SLOT.long(), 2), TypeError, "merge_tokens: slot must be an int32 tensor, got torch.int64"),
    (lambda: merge_tokens(X, SLOT[:, :5], 2), ValueError, r"merge_tokens: slot must be \[2, 6\], got shape \[2, 5\]"),
    (lambda: merge_tokens(X, SLOT + 2, 2), ValueError, "merge_tokens: slot must be"),
    (lambda: merge_tokens(X, SLOT - 2, 2), ValueError, "merge_tokens: slot must be"),
    (lambda: merge_tokens(X, SLOT, 0), ValueError, "merge_tokens: slot must be"),
    (lambda: merge_tokens(X, SLOT, -1), ValueError, "merge_tokens: num_out must be at least 0, got -1"),
    (
        lambda: merge_tokens(X, SLOT, 1, ONES[:, :5]),
        ValueError,
        r"size must have shape \[2, 6\], got \[2, 5\]",
    ),
    (lambda: merge_tokens(X, SLOT, 1, ONES * 0), ValueError, "merge_tokens: size must be"),
    (lambda: merge_tokens(X, SLOT, 1, -ONES), ValueError, "merge_tokens: size must be"),
    (lambda: merge_tokens(X, SLOT, 1, ONES * torch.nan), ValueError, "merge_tokens: size must be"),
    (lambda: merge_tokens(X, SLOT, 1, ONES * torch.inf), ValueError, "merge_tokens: size must be .*finite"),
    (lambda: merge_tokens(X, SLOT, 1, None, ONES * torch.inf), ValueError, "merge_tokens: weight must be finite"),
    (lambda: match_tokens(X * torch.inf, 1), ValueError, "match_tokens: metric must be finite"),
    (lambda: unmerge_tokens(X, SLOT, "a"), TypeError, "unmerge_tokens: fill must be a number, got str"),
    (lambda: unmerge_tokens(X, SLOT + 6), ValueError, "unmerge_tokens: slot must be"),
    (lambda: unmerge_tokens(X, SLOT - 2), ValueError, "unmerge_tokens: slot must be"),
    (lambda: unmerge_tokens(X[:, :0], SLOT), ValueError, "unmerge_tokens: slot must be"),
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


def test_first_bad_element_is_named():
    metric = torch.randn(9, 30, 4)
    metric[6, 3, 1], metric[4, 21, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="metric must be finite, got NaN or infinity in image 4, token 21"):
        match_tokens(metric, 3)
    size = torch.ones(9, 30)
    size[8, 2], size[5, 29] = 0, -1.5
    with pytest.raises(ValueError, match=r"size must be positive and finite, got -1\.5 in image 5, token 29"):
        merge_tokens(metric, torch.zeros(9, 30, dtype=torch.int32), 1, size)
    with pytest.raises(ValueError, match=r"weight must be finite, got -?nan in image 0, token 0"):
        merge_tokens(metric, torch.zeros(9, 30, dtype=torch.int32), 1, None, size * torch.nan)


def test_raw_ops_check_for_themselves():
    backward = ops.merge_tokens_backward
    for call in (
        lambda: ops.match_tokens(X, 3, 1, None),
        lambda: ops.match_tokens(X, 1, 1, ALL[:, :5]),
        lambda: ops.merge_tokens(X, SLOT.long(), 1, None, None, True),
        lambda: ops.merge_tokens(X, SLOT, 1, ONES.double(), None, True),
        lambda: ops.merge_tokens(X, SLOT, 1, None, ONES[:1], True),
        lambda: backward(X[:, :2], None, X, SLOT + 2, X[:, :2], None, None, True),
        lambda: backward(X[:, :2], None, X, SLOT, X[:, :1], None, None, True),
        lambda: backward(X[:, :2], ONES, X, SLOT, X[:, :2], ONES, None, True),
        lambda: ops.unmerge_tokens(X, SLOT.long(), 0.0),
        lambda: ops.unmerge_tokens_backward(X, SLOT + 2, 2),
        lambda: ops.unmerge_tokens_backward(X, SLOT[:, :5], 2),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"_(tokens|backward): .* must "):
            call()
