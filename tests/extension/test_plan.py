"""TokenPlan and the functions that make one, against the published code's recordings and plain loops."""

import math

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vits import recorded

import p3b_ext
from p3b_ext.ops.attention import AttentionAux
from p3b_ext.ops.select import keep_tokens
from p3b_ext.plan import (
    SCORES,
    TokenPlan,
    plan_fuse,
    plan_merge,
    plan_ppt,
    plan_prune,
    score_spread,
    token_scores,
)

B, N, C, D = 3, 17, 8, 6


def by_loop(x, slot, num_out, size=None, weight=None, normalize=True):
    """What a plan means, one token at a time."""
    y, total, size_out = (torch.zeros(x.shape[0], num_out, n) for n in (x.shape[2], 1, 1))
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            if slot[b, n] >= 0:
                s = 1.0 if size is None else size[b, n]
                w = weight[b, n] if weight is not None else s
                y[b, slot[b, n]] += w * x[b, n]
                total[b, slot[b, n]] += w
                size_out[b, slot[b, n]] += s
    return (y / total if normalize else y), size_out[..., 0]


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(B, N, C, generator=g),
        "metric": torch.randn(B, N, D, generator=g),
        "size": 1 + 4 * torch.rand(B, N, generator=g),
        "scores": torch.rand(B, N - 1, generator=g),
    }


@pytest.mark.parametrize("case", range(4))
def test_merge_is_tome(case):
    z = {name: torch.from_numpy(value) for name, value in recorded(f"match_{case}").items()}
    plan = plan_merge(z["metric"], int(z["r"]), int(z["num_prefix"]))
    assert torch.equal(plan.slot, z["slot_of_token"])
    merged, size = plan.apply(z["x"], z["size"])
    torch.testing.assert_close(merged, z["merged"], atol=1e-5, rtol=0)
    torch.testing.assert_close(size, z["merged_size"], atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.restore(merged), z["unmerged"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
def test_prefix_is_never_merged_and_comes_out_first(data, num_prefix):
    plan = plan_merge(data["metric"], 100, num_prefix)  # far more than there are: clamped as published
    assert plan.num_out == N - (N - num_prefix) // 2
    assert torch.equal(plan.slot[:, :num_prefix], torch.arange(num_prefix, dtype=torch.int32).expand(B, -1))
    assert (plan.slot[:, num_prefix:] >= num_prefix).all()


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_every_kth_token_is_a_destination(data, k, num_prefix):
    plan = plan_merge(data["metric"], N, num_prefix, source=k)
    destinations = [n for n in range(num_prefix, N) if n % k == k - 1]
    assert plan.num_out == num_prefix + len(destinations)
    unit = torch.nn.functional.normalize(data["metric"], dim=-1)
    for b in range(B):
        for n in range(num_prefix, N):
            best = n if n in destinations else max(destinations, key=lambda d: (unit[b, n] @ unit[b, d]).item())
            assert plan.slot[b, n] == num_prefix + destinations.index(best)


def test_every_second_token_is_the_default(data):
    assert torch.equal(plan_merge(data["metric"], 5, source=2).slot, plan_merge(data["metric"], 5).slot)


def test_random_sources_all_merge_and_repeat_with_the_generator(data):
    first, second = (
        plan_merge(data["metric"], 9, source="random", generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first.slot, second.slot)
    assert first.num_out == N - 9
    for b in range(B):
        assert sorted(set(first.slot[b].tolist())) == list(range(N - 9))
    other = plan_merge(data["metric"], 9, source="random", generator=torch.Generator().manual_seed(8))
    assert not torch.equal(first.slot, other.slot)


def test_a_mask_of_sources(data):
    source = torch.rand(B, N) < 0.6
    source[:, 0] = False
    plan = plan_merge(data["metric"], 4, source=source)
    merged = torch.stack([plan.slot[b].bincount(minlength=N - 4) for b in range(B)])
    assert merged.shape[1] == N - 4 and (merged.sum(1) == N).all()
    with pytest.raises(ValueError, match=r"match_tokens: .*source"):
        plan_merge(data["metric"], 4, source=torch.zeros(B, N, dtype=torch.bool))


@pytest.mark.parametrize("order", ["position", "score"])
def test_prune_drops_the_lowest(data, order):
    plan = plan_prune(data["scores"], 6, order=order)
    y, size = plan.apply(data["x"], data["size"])
    for b in range(B):
        ranked = sorted(range(N - 1), key=lambda i: (-data["scores"][b, i].item(), i))[: N - 7]
        kept = [0] + [1 + i for i in (ranked if order == "score" else sorted(ranked))]
        assert torch.equal(y[b], data["x"][b, kept]) and torch.equal(size[b], data["size"][b, kept])
        assert plan.slot[b].tolist() == [kept.index(n) if n in kept else -1 for n in range(N)]


def test_equal_scores_keep_the_lower_position():
    plan = plan_prune(torch.ones(1, 6), 2)
    assert plan.slot.tolist() == [[0, 1, 2, 3, 4, -1, -1]]


def test_fuse_is_evit(data):
    plan = plan_fuse(data["scores"], 10)
    y, size = plan.apply(data["x"], data["size"])
    kept = data["scores"].topk(10).indices
    assert y.shape == (B, 12, C)
    for b in range(B):
        lost = [i for i in range(N - 1) if i not in kept[b].tolist()]
        fused = sum(data["scores"][b, i] * data["x"][b, 1 + i] for i in lost)
        torch.testing.assert_close(y[b, -1], fused)
        assert torch.equal(y[b, 1:-1], data["x"][b, 1 + kept[b].sort().values])
        torch.testing.assert_close(size[b, -1], sum(data["size"][b, 1 + i] for i in lost))
    assert plan_fuse(data["scores"], N - 1).num_out == N


@pytest.mark.parametrize("n,r", [(16, 3), (17, 5), (16, 8)])
def test_merge_without_a_prefix_keeps_positions(n, r):
    """Published ToMe lists unmerged sources by descending similarity there; all else is the same."""
    metric = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(3))
    plan = plan_merge(metric, r, num_prefix=0)
    unit = torch.nn.functional.normalize(metric, dim=-1)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    differs = False
    for b in range(2):
        order = best[b].argsort(descending=True)
        unmerged, merged = (2 * order[r:]).tolist(), order[:r].tolist()
        rows = {token: row for row, token in enumerate([*sorted(unmerged), *range(1, n, 2)])}
        expected = [rows.get(token) for token in range(n)]
        for source in merged:
            expected[2 * source] = rows[2 * int(partner[b, source]) + 1]
        assert plan.slot[b].tolist() == expected
        differs = differs or unmerged != sorted(unmerged)
    assert differs or 2 * r == n


@pytest.mark.parametrize("criterion", ["variance", "cv2"])
def test_ppt_chooses_per_image(data, criterion):
    scores = data["scores"] / data["scores"].sum(1, keepdim=True)
    spread = score_spread(scores, criterion)
    expected = scores.var(1) if criterion == "variance" else scores.var(1) * (N - 1) ** 2
    torch.testing.assert_close(spread, expected)
    threshold = spread.median().item()
    plan = plan_ppt(scores, data["metric"], 5, threshold, criterion=criterion)
    prune, merge = plan_prune(scores, 5, order="score"), plan_merge(data["metric"], 5)
    assert 0 < (spread >= threshold).sum() < B  # both policies in one batch
    for b in range(B):
        assert torch.equal(plan.slot[b], (prune if spread[b] >= threshold else merge).slot[b])
    y, size = plan.apply(data["x"], data["size"])
    expected = by_loop(data["x"], plan.slot, plan.num_out, data["size"])
    torch.testing.assert_close((y, size), expected)
    assert plan_ppt(scores, data["metric"], 99, 0.0).num_out == N - (N - 1) // 2
    assert torch.equal(plan_ppt(scores, data["metric"], 5, math.inf).slot, merge.slot)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_apply_is_what_the_map_says(data, normalize, weighted):
    slot = torch.randint(-1, 4, (B, N), dtype=torch.int32)
    slot[:, :4] = torch.arange(4, dtype=torch.int32)
    weight = torch.rand(B, N) if weighted else None
    plan = TokenPlan(slot, 4, weight, normalize)
    for size in (None, data["size"]):
        torch.testing.assert_close(plan.apply(data["x"], size), by_loop(data["x"], slot, 4, size, weight, normalize))


def _plans(kind, metric, scores):
    if kind == "merge":
        return plan_merge(metric, 4)
    if kind == "prune":
        return plan_prune(scores, 4)
    return plan_fuse(scores, scores.shape[1] - 4)


@pytest.mark.parametrize("first", ["merge", "prune", "fuse"])
@pytest.mark.parametrize("second", ["merge", "prune", "fuse"])
def test_composition_is_one_after_the_other(data, first, second):
    one = _plans(first, data["metric"], data["scores"])
    y, size = one.apply(data["x"], data["size"])
    two = _plans(second, data["metric"][:, : one.num_out], data["scores"][:, : one.num_out - 1])
    if {first, second} == {"merge", "fuse"}:
        with pytest.raises(NotImplementedError, match="a mean inside a weighted sum"):
            one.compose(two)
        return
    both = one.compose(two)
    expected = two.apply(y, size)
    torch.testing.assert_close(both.apply(data["x"], data["size"]), expected)
    gone = one.slot < 0
    assert (both.slot[gone] == -1).all()
    torch.testing.assert_close(both.restore(expected[0], fill=7.0)[gone], torch.full_like(data["x"], 7.0)[gone])


def test_scores(data):
    attention = torch.rand(B, 2, N, N).softmax(-1)
    value_norm = torch.rand(B, N) + 0.1
    entropy = -(attention * attention.log()).sum(-1)
    aux = AttentionAux(
        cls_attention=attention[:, :, 0],
        entropy=entropy,
        value_norm=value_norm,
        to_cls=attention[..., 0],
        received=attention.mean(2),
    )
    expected = {
        "cls_value": attention[:, :, 0].sum(1) * value_norm,
        "entropy_value": entropy.mean(1) * value_norm,
        "cls": attention[:, :, 0].mean(1),
        "to_cls": attention[..., 0].mean(1),
        "received": attention.mean((1, 2)),
    }
    assert set(expected) == set(SCORES)
    for method, score in expected.items():
        for num_prefix in (1, 2):
            behind = score[:, num_prefix:]
            result = token_scores(aux, method, num_prefix)
            torch.testing.assert_close(result, behind / behind.sum(1, keepdim=True))
            torch.testing.assert_close(result.sum(1), torch.ones(B))
    zero = token_scores(AttentionAux(cls_attention=torch.zeros(1, 2, 5)), "cls")
    torch.testing.assert_close(zero, torch.full((1, 4), 0.25))


def test_scores_come_from_the_side_outputs():
    q, k, v = torch.randn(3, 2, 2, 9, 4).unbind(0)
    for method, names in SCORES.items():
        _, aux = p3b_ext.masked_attention(q, k, v, aux=names)
        torch.testing.assert_close(token_scores(aux, method).sum(1), torch.ones(2))


def test_keys_of_all_heads_are_averaged():
    keys = torch.randn(3, 4, 21, 8)
    scores = torch.rand(3, 20)
    assert torch.equal(plan_merge(keys, 6).slot, plan_merge(keys.mean(1), 6).slot)
    threshold = score_spread(scores).median().item()
    assert torch.equal(plan_ppt(scores, keys, 6, threshold).slot, plan_ppt(scores, keys.mean(1), 6, threshold).slot)
    with pytest.raises(ValueError, match="plan_merge: metric must have at least one head"):
        plan_merge(keys[:, :0], 6)


def test_gradients_reach_x_and_size(data):
    x, size = data["x"].double().requires_grad_(), data["size"].double().requires_grad_()
    plan = plan_merge(data["metric"], 5)
    assert torch.autograd.gradcheck(plan.apply, (x, size))
    pruned = plan_prune(data["scores"], 5)
    assert torch.autograd.gradcheck(pruned.apply, (x, size))
    y = torch.randn(B, plan.num_out, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.restore, (y,))
    fused = plan_fuse(data["scores"], 8, weight=data["scores"])
    assert torch.autograd.gradcheck(lambda x: fused.apply(x)[0], (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_sizes_in_float32(data, dtype):
    plan = plan_merge(data["metric"].to(dtype), 5)
    y, size = plan.apply(data["x"].to(dtype), data["size"])
    assert y.dtype == dtype and size.dtype == torch.float32


def test_one_image_of_one_token_and_empty_batches():
    for batch, n in ((1, 1), (0, 5)):
        x = torch.randn(batch, n, C)
        for plan in (
            plan_merge(torch.randn(batch, n, D), 3),
            plan_prune(torch.rand(batch, n - 1), 0),
            plan_ppt(torch.rand(batch, n - 1), torch.randn(batch, n, D), 3, 1e-4),
        ):
            y, size = plan.apply(x)
            assert y.shape[:2] == size.shape == (batch, plan.num_out)
            assert plan.restore(y).shape == x.shape


def _everything(x, metric, scores, size):
    merged, sizes = plan_merge(metric, 4).apply(x, size)
    mixed = plan_ppt(scores[:, : merged.shape[1] - 1], merged, 3, 0.05, criterion="cv2")
    y, sizes = mixed.apply(merged, sizes)
    z, _ = plan_prune(scores[:, : y.shape[1] - 1], 2).apply(y, sizes)
    fused, _ = plan_fuse(scores[:, : z.shape[1] - 1], 3).apply(z)
    return fused, plan_merge(metric, 4).compose(mixed).restore(y)


def test_compiles_whole(data):
    arguments = data["x"], data["metric"], data["scores"], data["size"]
    compiled = torch.compile(_everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), _everything(*arguments))


def test_compiles_with_symbolic_sizes_and_numbers():
    def plans(scores, metric, threshold):
        return plan_ppt(scores, metric, 4, threshold).slot, plan_merge(metric, 4, source="random").slot

    compiled = torch.compile(plans, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, threshold in ((3, 0.08), (2, 0.01)):
        scores, metric = torch.rand(batch, N - 1), torch.randn(batch, N, 6)
        slot, merged = compiled(scores, metric, threshold)
        assert torch.equal(slot, plan_ppt(scores, metric, 4, threshold).slot)
        assert (merged.max(1).values == N - 5).all()


def test_exports(data):
    class Model(torch.nn.Module):
        def forward(self, x, metric, scores, size):
            return _everything(x, metric, scores, size)

    arguments = data["x"], data["metric"], data["scores"], data["size"]
    program = torch.export.export(Model(), arguments)
    torch.testing.assert_close(program.module()(*arguments), _everything(*arguments))


def test_bad_input(data):
    x, metric, scores, size = data["x"], data["metric"], data["scores"], data["size"]
    plan = plan_merge(metric, 4)
    for call, error, text in [
        (lambda: plan_merge(metric, -1), ValueError, "plan_merge: r must be at least 0, got -1"),
        (lambda: plan_prune(scores, -1), ValueError, "plan_prune: r must be at least 0, got -1"),
        (lambda: plan_ppt(scores, metric, -1, 0.1), ValueError, "plan_ppt: r must be at least 0, got -1"),
        (lambda: plan_merge(metric, math.nan), TypeError, "plan_merge: r must be an int, got float"),
        (lambda: plan_ppt(scores, metric, 2, math.nan), ValueError, "plan_ppt: threshold must be a number, got nan"),
        (lambda: plan_ppt(scores, metric[:, 1:], 2, 0.1), ValueError, "plan_ppt: scores must have shape"),
        (
            lambda: plan_ppt(scores, metric, 2, 0.1, criterion="std"),
            ValueError,
            "score_spread: criterion must be one of",
        ),
        (lambda: plan_merge(metric, 2, source="odd"), ValueError, "plan_merge: source must be None"),
        (lambda: plan_merge(metric, 2, generator=3), TypeError, "plan_merge: generator must be a torch.Generator"),
        (lambda: plan_merge(metric, 2, 2**63), ValueError, f"plan_merge: num_prefix must be between 0 and {N}, got 92"),
        (lambda: plan_prune(scores, 2, 2**63), ValueError, "plan_prune: num_prefix must be between 0 and 2147483647"),
        (lambda: plan_fuse(scores, 2, 2**63), ValueError, "plan_fuse: num_prefix must be between 0 and 2147483647"),
        (lambda: plan_merge(metric, 2, source=1), ValueError, "plan_merge: source must be at least 2, got 1"),
        (lambda: plan_merge(metric[0], 2), ValueError, "plan_merge: metric must be"),
        (lambda: plan_merge(metric.long(), 2), TypeError, "plan_merge: metric must be float32"),
        (lambda: plan_prune(scores, 2, order="best"), ValueError, "topk_tokens: order must be one of"),
        (lambda: plan_prune(scores.masked_fill(scores > 0.9, math.nan), 2), ValueError, "topk_tokens: scores"),
        (lambda: plan_fuse(scores, N), ValueError, "plan_fuse: keep must be between 0 and 16, got 17"),
        (lambda: plan_fuse(scores, 4, weight=[1.0]), TypeError, "plan_fuse: weight must be a tensor"),
        (lambda: plan_fuse(scores, 4, weight=scores.long()), TypeError, "plan_fuse: weight must be float32"),
        (lambda: plan.apply(x[:2]), ValueError, r"TokenPlan.apply: x must be \[3, 17, C\]"),
        (lambda: plan.apply(x, size[:2]), ValueError, "TokenPlan.apply: size must have shape"),
        (lambda: plan.apply(x, size - 4), ValueError, "size must be"),
        (lambda: plan_prune(scores, 2).apply(x, size - 4), ValueError, "size must be"),
        (lambda: plan.restore(x), ValueError, r"TokenPlan.restore: y must be \[3, 13, C\]"),
        (lambda: plan.compose(plan), ValueError, r"TokenPlan.compose: then must be a plan for \[3, 13\] tokens"),
        (lambda: plan.compose(plan.slot), TypeError, "TokenPlan.compose: then must be a TokenPlan"),
        (lambda: plan.restore(plan.apply(x)[0], "a"), TypeError, "TokenPlan.restore: fill must be a number, got str"),
        (
            lambda: plan.compose(TokenPlan(plan.slot[:, :13] + 9, 13)),
            ValueError,
            r"TokenPlan.compose: then.slot must be b",
        ),
        (
            lambda: TokenPlan(plan.slot, 5).compose(plan_prune(scores[:, :4], 1)),
            ValueError,
            "compose: slot must be betwe",
        ),
        (lambda: plan_ppt(scores, metric, 2, None), TypeError, "plan_ppt: threshold must be a number, got NoneType"),
        (lambda: plan_ppt(scores, metric, 2, "a"), TypeError, "plan_ppt: threshold must be a number, got str"),
        (
            lambda: plan_ppt(scores, metric, 2, size),
            ValueError,
            r"threshold must be a number or \[3\], got shape \[3, 17",
        ),
        (
            lambda: plan_ppt(scores, metric, 2, size[0] > 1),
            TypeError,
            "threshold must hold real numbers, got torch.bool",
        ),
        (lambda: plan_ppt(scores, metric, 2, size[:, 0] * math.nan), ValueError, "threshold must be numbers, not NaN"),
        (lambda: plan.apply(x, size * math.inf), ValueError, "size must be .*finite"),
        (lambda: plan_prune(scores, 2).apply(x, size * math.inf), ValueError, "size must be > 0 and finite"),
        (lambda: plan_prune(scores, True), TypeError, "plan_prune: r must be an int, got bool"),
        (lambda: token_scores(None, "cls"), TypeError, "token_scores: aux must be an AttentionAux, got NoneType"),
        (lambda: token_scores(AttentionAux(), "cls"), ValueError, "token_scores: aux must hold cls_attention"),
        (lambda: token_scores(AttentionAux(), "best"), ValueError, "token_scores: method must be one of"),
    ]:
        with pytest.raises(error, match=text):
            call()
    for num_prefix in (0, 5):
        with pytest.raises(ValueError, match=f"num_prefix must be between 1 and 4, got {num_prefix}"):
            token_scores(AttentionAux(cls_attention=torch.rand(1, 1, 4)), "cls", num_prefix)


def test_numpy_numbers(data):
    x, metric, scores = data["x"], data["metric"], data["scores"]
    four, one, tenth = numpy.int64(4), numpy.uint8(1), numpy.float32(0.1)
    for ours, expected in [
        (plan_prune(scores, four, one), plan_prune(scores, 4)),
        (plan_fuse(scores, four, one), plan_fuse(scores, 4)),
        (plan_merge(metric, four, one), plan_merge(metric, 4)),
        (plan_merge(metric, four, source=four), plan_merge(metric, 4, source=4)),
        (plan_ppt(scores, metric, four, tenth, one), plan_ppt(scores, metric, 4, 0.1)),
    ]:
        assert torch.equal(ours.slot, expected.slot) and ours.num_out == expected.num_out
        assert type(ours.num_out) is int
    y = expected.apply(x)[0]
    torch.testing.assert_close(expected.restore(y, tenth), expected.restore(y, 0.1))


def test_paths_of_the_cuda_backend_without_a_gpu(monkeypatch):
    """Its fused ops on pretended tensors: what they are given, and the shapes and types that they put out."""
    monkeypatch.setattr(p3b_ext.backends, "choose", lambda op, x, family: "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 9, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        attention, norm = torch.rand(2, 3, 9, device="cuda"), torch.rand(2, 9, device="cuda")
        for value_norm in (norm, None):
            y, index = keep_tokens(x, attention, value_norm, 4)
            assert y.shape == (2, 5, 8) and y.dtype == x.dtype and y.requires_grad
            assert index.shape == (2, 5) and index.dtype == torch.int64 and not index.requires_grad
        keys, scores = torch.randn(2, 3, 9, 16, device="cuda", dtype=torch.float16), torch.rand(2, 8, device="cuda")
        for metric in (keys, keys[:, 0]):
            plans = [plan_merge(metric, 3), plan_ppt(scores, metric, 3, 0.1)]
            plans += [plan_ppt(scores.half(), metric, 3, scores[:, 0], criterion="cv2")]
            assert all(plan.slot.shape == (2, 9) and plan.slot.dtype == torch.int32 for plan in plans)
            assert all(plan.num_out == 6 for plan in plans)
        with pytest.raises(ValueError, match="criterion must be one of"):
            plan_ppt(scores, keys, 3, 0.1, criterion="std")


def test_side_outputs_of_different_calls_are_refused():
    rows, norm = torch.rand(2, 3, 5), torch.rand(2, 5)
    for aux, message in (
        (AttentionAux(cls_attention=rows[0], value_norm=norm), "cls_attention must be \\[B, H, N\\], got shape"),
        (AttentionAux(cls_attention=rows, value_norm=norm[:, 1:]), "value_norm must have shape \\[2, 5\\], got "),
    ):
        with pytest.raises(ValueError, match=message):
            token_scores(aux, "cls_value")
    with pytest.raises(ValueError, match="method must be one of"):
        token_scores(AttentionAux(cls_attention=rows), ["cls"])


def test_plans_apply_where_no_value_can_be_looked_at():
    """Under vmap and for fake tensors a check of values has nothing to read."""
    scores, x, size = torch.rand(4, 16), torch.randn(4, 17, 8), torch.rand(4, 17) + 0.5
    plan = plan_prune(scores, 5, 1)
    expected = plan.apply(x, size)
    found = torch.func.vmap(lambda scale: plan.apply(x * scale, size))(torch.ones(2))
    assert all(torch.equal(part[0], whole) for part, whole in zip(found, expected, strict=True))
    with FakeTensorMode() as mode:
        y, _ = plan_prune(mode.from_tensor(scores), 5, 1).apply(mode.from_tensor(x), mode.from_tensor(size))
        assert y.shape == expected[0].shape
