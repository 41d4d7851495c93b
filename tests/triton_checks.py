"""What test_triton.py asks of the Triton kernels, in a process of its own: TRITON_INTERPRET must be set (or not) before
triton is imported. By hand: TRITON_INTERPRET=1 pytest tests/triton_checks.py, or without the variable on a GPU."""

import os

import pytest
import torch
from cases import AttentionCase, assert_within, float64
from torch.utils.flop_counter import FlopCounterMode

import p3b_ext
import p3b_ext.kernels
from p3b_ext import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
attention, select, merge = p3b_ext.kernels.attention, p3b_ext.kernels.select, p3b_ext.kernels.merge
pytestmark = pytest.mark.usefixtures("poison")

ATTENTION = [
    AttentionCase(2, 2, 17, 24, mask="some", sizes=5, gate="HD"),
    AttentionCase(1, 1, 1, 8, gate="D"),
    AttentionCase(1, 2, 2, 16, "contiguous"),
    AttentionCase(2, 2, 50, 64, mask="all"),
    AttentionCase(2, 1, 50, 40, "sliced", mask="all", sizes=1e4, gate="pruned"),
    AttentionCase(1, 1, 81, 72, "expanded", sizes=9),
    AttentionCase(1, 1, 65, 128, gate="D"),
    AttentionCase(1, 2, 23, 13, mask="some", gate="pruned"),
    AttentionCase(1, 1, 9, 1),
    AttentionCase(0, 2, 5, 8, mask="some", sizes=2, gate="HD"),
]
HALVES = [
    AttentionCase(1, 1, 197, 64, mask="some", sizes=9, gate="D"),
    AttentionCase(1, 2, 50, 40, "sliced", mask="all", gate="pruned"),
    AttentionCase(1, 1, 17, 24),
    AttentionCase(1, 1, 35, 80, sizes=3),
]
if INTERPRETED:
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _dot(self, a, b, d, *rest):
        """The interpreter multiplies the bit patterns of bfloat16 operands; give it their values."""
        if a.dtype.scalar == interpreter.tl.bfloat16:
            a, b = self.cast_impl(a, interpreter.tl.float32), self.cast_impl(b, interpreter.tl.float32)
        return _create_dot(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = _dot


def name(value):
    return str(value).removeprefix("torch.")


def attention_all(ops, inputs, grad_out, aux=7, which=3):
    """Every output and gradient of the attention family, by name; `ops` is the reference or the Triton module."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    rest = inputs["key_mask"], inputs["token_size"], inputs["channel_gate"], q.shape[-1] ** -0.5
    if ops is reference:
        q, k, v, size, gate = (
            None if t is None else t.detach().requires_grad_() for t in (q, k, v, inputs["token_size"], rest[2])
        )
        outputs = reference.masked_attention(q, k, v, rest[0], size, gate, rest[3], aux)
        wanted = [t for t in (q, k, v, size, gate) if t is not None]
        grads = iter(torch.autograd.grad(outputs[0], wanted, grad_out))
        grad_qkv = torch.stack([next(grads).transpose(1, 2) for _ in range(3)], 2)
        grads = [grad_qkv, *(q.new_empty(0) if t is None else next(grads) for t in (size, gate))]
    else:
        outputs = attention.masked_attention(q, k, v, *rest, aux)
        grads = attention.masked_attention_backward(grad_out, q, k, v, outputs[0], outputs[1], *rest, 3)
    columns = ops.attention_columns(q, k, outputs[1], *rest, which)
    names = "out lse cls_attention entropy value_norm grad_qkv grad_token_size grad_channel_gate to_cls received"
    return dict(zip(names.split(), [t.detach() for t in (*outputs, *grads, *columns)], strict=True))


def yardstick(inputs, grad_out):
    """The same names from what a PyTorch user writes, in the inputs' own dtype."""
    names = [n for n in ("q", "k", "v", "token_size", "channel_gate") if inputs[n] is not None]
    leaf = {n: inputs[n].detach().requires_grad_() for n in names}
    q, k, v = leaf["q"], leaf["k"], leaf["v"]
    if "channel_gate" in leaf:
        gate = leaf["channel_gate"].to(q.dtype)
        q, k, v = (x * (gate if gate.dim() == 1 else gate[:, None]) for x in (q, k, v))
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if "token_size" in leaf:
        s = s + leaf["token_size"].log()[:, None, None, :].to(s.dtype)
    mask = inputs["key_mask"]
    if mask is not None:
        s = s.masked_fill(~mask[:, None, None, :], torch.finfo(s.dtype).min)
    p = s.softmax(-1) if mask is None else s.softmax(-1) * mask.any(-1)[:, None, None, None]
    out = (p @ v).transpose(1, 2)
    grads = dict(zip(names, torch.autograd.grad(out, list(leaf.values()), grad_out), strict=True))
    s, p, none = s.detach(), p.detach(), out.new_empty(0)
    return {
        "out": out.detach(),
        "lse": s.logsumexp(-1),
        "cls_attention": p[:, :, 0],
        "entropy": torch.special.entr(p).sum(-1),
        "value_norm": v.detach().square().sum((1, 3)).sqrt(),
        "grad_qkv": torch.stack([grads[n].transpose(1, 2) for n in "qkv"], 2),
        "grad_token_size": grads.get("token_size", none),
        "grad_channel_gate": grads.get("channel_gate", none),
        "to_cls": p[..., 0],
        "received": p.mean(2),
    }


CASES = [(c, torch.float32) for c in ATTENTION] + [(c, t) for c in HALVES for t in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("case,dtype", CASES, ids=name)
def test_attention(case, dtype):
    inputs = case.inputs(dtype, device=DEVICE)
    grad_out = torch.randn(case.B, case.N, case.H, case.D, dtype=torch.float64).to(dtype).to(DEVICE)
    result = attention_all(attention, inputs, grad_out)
    truth = attention_all(reference, float64(inputs), grad_out.double())
    torchs = yardstick(inputs, grad_out)
    for key, value in result.items():
        assert value.dtype == (dtype if key in ("out", "grad_qkv") else torch.float32), key
        assert_within(key, value, truth[key], torchs[key], dtype)


def test_attention_without_extras():
    """Side outputs and gradients that were not asked for are empty, and asking changes no bit of the rest."""
    inputs = AttentionCase(1, 2, 17, 24, mask="some").inputs(torch.float32, device=DEVICE)
    grad_out = torch.randn(1, 17, 2, 24).to(DEVICE)
    everything = attention_all(attention, inputs, grad_out)
    plain = attention_all(attention, inputs, grad_out, 0, 0)
    for key, value in plain.items():
        if key in ("out", "lse", "grad_qkv"):
            assert torch.equal(value, everything[key]), key
        else:
            assert value.shape == (0,), key


@pytest.mark.parametrize("case,dtype", [(c, t) for c, t in CASES if c.mask], ids=name)
def test_attention_never_reads_masked_keys(case, dtype):
    """NaN in masked keys and their values reaches nothing but the norms of those values."""
    inputs = case.inputs(dtype, device=DEVICE)
    grad_out = torch.randn(case.B, case.N, case.H, case.D).to(DEVICE, dtype)
    want = attention_all(attention, inputs, grad_out)
    masked = ~inputs["key_mask"][:, None, :, None]
    poisoned = {n: inputs[n].masked_fill(masked, torch.nan) for n in ("k", "v")}
    result = attention_all(attention, inputs | poisoned, grad_out)
    for key, value in result.items():
        if key == "value_norm":
            assert torch.equal(value.isnan(), ~inputs["key_mask"])
        else:
            torch.testing.assert_close(value, want[key])


def test_attention_extreme_logits():
    """Logits of +-1e4, where only differences of the exponents survive, and rows whose lse is strongly negative."""
    inputs = AttentionCase(1, 1, 33, 32, logits=1e4 / 32**0.5).inputs(torch.float32, device=DEVICE)
    inputs["token_size"] = torch.full((1, 33), 1e-38, device=DEVICE)
    grad_out = torch.randn(1, 33, 1, 32).to(DEVICE)
    result = attention_all(attention, inputs, grad_out)
    truth = attention_all(reference, float64(inputs), grad_out.double())
    torchs = yardstick(inputs, grad_out)
    for key in ("out", "lse", "cls_attention", "entropy"):
        assert_within(key, result[key], truth[key], torchs[key], torch.float32)
    assert all(value.isfinite().all() for value in result.values())


def test_attention_grad_out_strides_and_repeats():
    """An expanded grad_out is read through its strides; a second run gives the same bits; packed equals unpacked."""
    case = AttentionCase(1, 2, 34, 24, sizes=4, gate="HD")
    inputs = case.inputs(torch.float32, device=DEVICE)
    row = torch.randn(1, 1, 2, 24).to(DEVICE)
    first = attention_all(attention, inputs, row.expand(1, 34, 2, 24))
    second = attention_all(attention, inputs, row.repeat(1, 34, 1, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    qkv = torch.stack([inputs[n].transpose(1, 2) for n in "qkv"], 2)
    rest = inputs["key_mask"], inputs["token_size"], inputs["channel_gate"], 24**-0.5, 7
    packed = attention.masked_attention_packed(qkv, *rest)
    plain = attention.masked_attention(*(inputs[n] for n in "qkv"), *rest)
    assert all(torch.equal(a, b) for a, b in zip(packed, plain, strict=True))


def test_attention_refuses():
    x = torch.zeros(1, 1, 2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="masked_attention: q must be float32"):
        attention.masked_attention(x, x, x, None, None, None, 1.0, 0)
    x = torch.zeros(1, 1, 2, 136, device=DEVICE)
    with pytest.raises(NotImplementedError, match="at most 128 channels wide"):
        attention.masked_attention(x, x, x, None, None, None, 1.0, 0)


def tied_scores(n, dtype):
    """Three images of scores with many ties, NaN, both zeros and infinities."""
    scores = torch.randn(3, n).mul(3).round().div(3).to(dtype)
    scores[0, :: max(n // 3, 1)] = torch.nan
    scores[1, -1] = -torch.inf
    scores[1, n // 2] = torch.inf
    scores[2, n // 2] = -0.0
    return scores.to(DEVICE)


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize(
    "n,dtype",
    [(1, torch.float32), (17, torch.bfloat16), (50, torch.float16), (196, torch.float32), (196, torch.float64)],
    ids=name,
)
def test_select_ranks(n, dtype, by_score):
    scores = tied_scores(n, dtype)
    for prefix, keep in ((1, n), (2, (n + 1) // 2), (0, 0)):
        expected = reference.topk_tokens(scores, keep, prefix, by_score)
        assert torch.equal(select.topk_tokens(scores, keep, prefix, by_score), expected)
        expected = reference.prune_slots(scores, n - keep, prefix, by_score)
        assert torch.equal(select.prune_slots(scores, n - keep, prefix, by_score), expected)


def test_select_ranks_of_strided_many_and_no_scores():
    scores = tied_scores(50, torch.float32)
    strided = torch.stack([scores, -scores], 2)[..., 0]
    assert torch.equal(select.topk_tokens(strided, 9, 1, True), reference.topk_tokens(scores, 9, 1, True))
    many = tied_scores(select.MAX_RANKED + 3, torch.float32)
    assert torch.equal(select.prune_slots(many, 5, 1, False), reference.prune_slots(many, 5, 1, False))
    assert select.topk_tokens(scores[:0], 9, 1, True).shape == (0, 10)
    assert select.prune_slots(scores[:0], 9, 1, True).shape == (0, 51)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
@pytest.mark.parametrize("shape", [(2, 1, 8, 1), (2, 17, 24, 9), (1, 50, 1030, 3)], ids=str)
def test_select_tokens(shape, dtype):
    batch, n, c, m = shape
    x = torch.randn(batch, n, 2 * c, dtype=torch.float64).to(dtype).to(DEVICE)[..., :c]
    index = torch.randint(n, (batch, m)).to(DEVICE)  # with repeats
    assert torch.equal(select.select_tokens(x, index), reference.select_tokens(x, index))
    grad = torch.randn(batch, m, c, dtype=torch.float64).to(dtype).to(DEVICE)
    zeros = torch.zeros(batch, n, c, dtype=dtype, device=DEVICE)
    truth = zeros.double().scatter_add(1, index[..., None].expand(-1, -1, c), grad.double())
    torchs = zeros.scatter_add(1, index[..., None].expand(-1, -1, c), grad)
    assert_within("grad_x", select.select_tokens_backward(grad, index, n), truth, torchs, dtype)


def test_select_nothing():
    x = torch.randn(2, 5, 8).to(DEVICE)
    index = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    assert select.select_tokens(x, index).shape == (2, 0, 8)
    assert select.select_tokens(x[:0], index[:0]).shape == (0, 0, 8)
    assert torch.equal(select.select_tokens_backward(x[:, :0], index, 5), torch.zeros_like(x))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("shape", [(2, 1, 8), (1, 50, 72), (2, 67, 16)], ids=str)
@pytest.mark.parametrize("random_source", [False, True])
def test_merge_match(shape, prefix, random_source):
    batch, n, d = shape
    metric = torch.randn(batch, n, 2 * d).to(DEVICE)[..., :d]
    position = torch.arange(n)
    source = torch.rand(batch, n) < 0.6 if random_source else (position % 2 == 0).expand(batch, n).clone()
    source[:, -1] = False
    others = int((~source & (position >= prefix)).sum(1).min())
    r = min(5, int((source & (position >= prefix)).sum(1).min())) if others else 0
    given = source.to(DEVICE) if random_source else None
    assert torch.equal(merge.match_tokens(metric, r, prefix, given), reference.match_tokens(metric, r, prefix, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name)
def test_merge_match_ties(dtype):
    """Rows of four +-1 among zeros have norm 2, so every similarity is exact and most of them tie."""
    metric = torch.zeros(3, 50, 8)
    for row in metric.view(-1, 8):
        row[torch.randperm(8)[:4]] = torch.randint(2, (4,)).float() * 2 - 1
    metric = metric.to(dtype).to(DEVICE)
    for r, prefix in ((0, 1), (7, 1), (24, 1), (9, 0)):
        expected = reference.match_tokens(metric, r, prefix, None)
        assert torch.equal(merge.match_tokens(metric, r, prefix, None), expected)


def random_slots(batch, n, m, dropped):
    slot = torch.randint(m, (batch, n), dtype=torch.int32)
    if dropped:
        slot[:, ::3] = -1
    return slot.to(DEVICE)


@pytest.mark.parametrize(
    "weights", ["", "size", "weight", "both", "zero"], ids=lambda w: w or "plain"
)  # zero: weights that sum to nothing
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("shape,dtype", [((2, 9, 24, 5), torch.float32), ((1, 17, 70, 21), torch.bfloat16)], ids=str)
def test_merge_tokens(shape, dtype, weights, normalize):
    batch, n, c, m = shape
    x = torch.randn(batch, n, 2 * c, dtype=torch.float64).to(dtype).to(DEVICE)[..., :c]
    slot = random_slots(batch, n, m, dropped=normalize)
    size = (torch.rand(batch, n) * 4 + 0.5).to(DEVICE) if weights in ("size", "both") else None
    weight = torch.randn(batch, n).to(DEVICE) if weights in ("weight", "both") else None
    if weights == "zero":
        weight = torch.zeros(batch, n, device=DEVICE)
    grad_y = torch.randn(batch, m, c, dtype=torch.float64).to(dtype).to(DEVICE)
    grad_sizes = torch.randn(batch, m).to(DEVICE)

    def autograd(cast):
        tensors = [None if t is None else cast(t).detach().requires_grad_() for t in (x, size, weight)]
        y, sizes = reference.merge_tokens(tensors[0], slot, m, *tensors[1:], normalize)
        wanted = [t for t in tensors if t is not None]
        outputs, grads = [y], [cast(grad_y)]
        if size is not None:
            outputs, grads = [y, sizes], [cast(grad_y), cast(grad_sizes)]
        return [y, sizes, *torch.autograd.grad(outputs, wanted, grads)]

    y, sizes = merge.merge_tokens(x, slot, m, size, weight, normalize)
    grads = merge.merge_tokens_backward(
        grad_y, None if size is None else grad_sizes, x, slot, y, size, weight, normalize
    )
    assert [g.shape == (0,) for g in grads[1:]] == [size is None, weight is None]
    results = [y, sizes, *(g for g in grads if g.shape != (0,))]
    for key, *tensors in zip(
        ("y", "sizes", "grad_x", "grad", "grad"),
        results,
        autograd(torch.Tensor.double),
        autograd(lambda t: t),
        strict=False,
    ):
        result, truth, torchs = (t.detach() for t in tensors)
        # A size's or weight's gradient sees y rounded to the dtype of x, as autograd of a half-precision merge would.
        slack = torch.finfo(dtype).eps * c**0.5 if key == "grad" else 0.0
        assert_within(key, result, truth, torchs, dtype, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_unmerge_tokens(dtype):
    y = torch.randn(2, 9, 24, dtype=torch.float64).to(dtype).to(DEVICE)
    slot = random_slots(2, 17, 9, dropped=True)
    for fill in (0.0, -1.5, torch.inf):
        assert torch.equal(merge.unmerge_tokens(y, slot, fill), reference.unmerge_tokens(y, slot, fill))
    grad = torch.randn(2, 17, 24, dtype=torch.float64).to(dtype).to(DEVICE)
    leaf = y.double().requires_grad_()
    truth = torch.autograd.grad(reference.unmerge_tokens(leaf, slot, 0.0), leaf, grad.double())[0]
    leaf = y.detach().requires_grad_()
    torchs = torch.autograd.grad(reference.unmerge_tokens(leaf, slot, 0.0), leaf, grad)[0]
    assert_within("grad_y", merge.unmerge_tokens_backward(grad, slot, 9), truth, torchs, dtype)


def test_merge_nothing():
    x = torch.randn(2, 5, 8).to(DEVICE)
    slot = torch.full((2, 5), -1, dtype=torch.int32, device=DEVICE)
    y, sizes = merge.merge_tokens(x, slot, 3, None, None, True)
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(sizes, torch.zeros_like(sizes))
    y, sizes = merge.merge_tokens(x[:0], slot[:0], 3, None, None, True)
    assert y.shape == (0, 3, 8) and sizes.shape == (0, 3)
    assert torch.equal(merge.unmerge_tokens(y[:0], slot[:0], 1.0), x[:0])
    assert merge.match_tokens(x[:0], 2, 1, None).shape == (0, 5)


# Registration ------------------------------------------------------------------------------------------------------

# Fake tensors have no memory that the interpreter could read; test_triton.test_capture asks the rest without a GPU.
CHECKED = ("test_schema", "test_autograd_registration")
CHECKED += () if INTERPRETED else ("test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(op, *args):
    torch.library.opcheck(getattr(torch.ops.p3b_ext_triton, op), args, test_utils=CHECKED)


def with_gradient(t):
    return None if t is None else t.detach().requires_grad_()


def test_attention_gradients_that_nobody_wants():
    inputs = AttentionCase(2, 2, 5, 8, mask="some", sizes=3, gate="HD").inputs(torch.float32, device=DEVICE)
    q, k, v, *rest = (inputs[n] for n in ("q", "k", "v", "key_mask", "token_size", "channel_gate"))
    out, lse, *_ = attention.masked_attention(q, k, v, *rest, 0.3, 0)
    grad_out = torch.randn_like(out)
    everything = attention.masked_attention_backward(grad_out, q, k, v, out, lse, *rest, 0.3, 3)
    for which in range(3):
        grads = attention.masked_attention_backward(grad_out, q, k, v, out, lse, *rest, 0.3, which)
        for found, want, wanted in zip(grads, everything, (True, which & 1, which & 2), strict=True):
            assert torch.equal(found, want) if wanted else found.shape == (0,)


def test_attention_opcheck():
    inputs = AttentionCase(2, 2, 5, 8, mask="some", sizes=3, gate="HD").inputs(torch.float32, device=DEVICE)
    q, k, v, mask, size, gate = (inputs[n] for n in ("q", "k", "v", "key_mask", "token_size", "channel_gate"))
    opcheck("masked_attention", *map(with_gradient, (q, k, v)), mask, *map(with_gradient, (size, gate)), 0.3, 7)
    out, lse, *_ = attention.masked_attention(q, k, v, mask, size, gate, 0.3, 0)
    opcheck("masked_attention_backward", torch.randn_like(out), q, k, v, out, lse, mask, size, gate, 0.3, 3)
    opcheck("attention_columns", q, k, lse, mask, size, gate, 0.3, 3)
    qkv = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)
    opcheck("masked_attention_packed", with_gradient(qkv), mask, size, gate, 0.3, 7)


def test_attention_flops():
    q, k, v = torch.randn(3, 2, 2, 5, 8).to(DEVICE).unbind(0)
    with p3b_ext.backend("triton"), FlopCounterMode(display=False) as counter:
        p3b_ext.masked_attention(q.requires_grad_(), k, v).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * 2 * 5 * 5 * 8


def test_select_and_merge_opcheck():
    scores, x = torch.randn(2, 9).to(DEVICE), torch.randn(2, 10, 8).to(DEVICE)
    opcheck("topk_tokens", scores, 4, 1, False)
    opcheck("prune_slots", scores, 4, 1, True)
    index = select.topk_tokens(scores, 4, 1, False)
    opcheck("select_tokens", with_gradient(x), index)
    opcheck("select_tokens_backward", torch.randn(2, 5, 8).to(DEVICE), index, 10)
    slot, size = merge.match_tokens(x, 3, 1, None), torch.rand(2, 10).to(DEVICE) + 1
    opcheck("match_tokens", x, 3, 1, None)
    opcheck("merge_tokens", with_gradient(x), slot, 7, with_gradient(size), None, True)
    y, sizes = merge.merge_tokens(x, slot, 7, size, None, True)
    opcheck("merge_tokens_backward", torch.randn_like(y), sizes, x, slot, y, size, None, True)
    opcheck("unmerge_tokens", with_gradient(y), slot, 0.0)
    opcheck("unmerge_tokens_backward", x, slot, 7)


def test_select_and_merge_and_attention_by_public_functions():
    """Choice of the backend, checks and gradients: the same results and gradients as the reference backend."""
    found = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        qkv = torch.randn(2, 17, 3, 2, 8).to(DEVICE).requires_grad_()
        size = (torch.rand(2, 17).to(DEVICE) + 1).requires_grad_()
        gate = torch.rand(2, 8).to(DEVICE).requires_grad_()
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with p3b_ext.backend(backend):
            out, aux = p3b_ext.masked_attention(
                q, k, v, token_size=size, channel_gate=gate, aux=("cls_attention", "value_norm", "received")
            )
            x = out.transpose(1, 2).flatten(2)
            y, sizes = p3b_ext.plan_merge(k.detach().mean(1), 4).apply(x, size)
            scores = p3b_ext.token_scores(aux, "cls_value")
            kept = p3b_ext.select_tokens(x, p3b_ext.topk_tokens(scores, 5))
            back = p3b_ext.plan_prune(scores, 6).restore(kept.new_ones(2, 11, 1) * kept.mean())
            grads = torch.autograd.grad(
                y.square().sum() + sizes.log().sum() + kept.sum() + back.sum(), (qkv, size, gate)
            )
        found[backend] = [t.detach() for t in (out, aux.received, y, sizes, kept, back, *grads)]
    for got, wanted in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
