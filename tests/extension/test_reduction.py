"""ToMe, PPT, EViT, TopK in a model: the published code's recordings, counts and costs, settings from a target."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from cases import assert_near
from torch import nn
from vits import family, images, recorded, recorded_model, vit

import p3b_ext
import p3b_ext.modules
from p3b_ext.patch import patch, token_map
from p3b_ext.plan import plan_prune, score_spread, token_scores
from p3b_ext.reduction import PPT, EViT, ToMe, TopK
from p3b_ext.tuning import at_cost, calibrate, count_macs, score_spreads, solve_r, token_counts


def final_sizes(model, x):
    """Logits, and how many first-layer tokens each final token stands for."""
    with torch.no_grad():
        logits = model(x)
    slots = token_map(model).long()
    rows = token_counts(model)[-1][1]
    return logits, torch.stack([s[s >= 0].bincount(minlength=rows) for s in slots]), slots


@pytest.mark.parametrize("name", ["cls_prop", "cls_plain", "dist_prop", "dist_plain"])
def test_tome_is_the_published_one(name):
    case = recorded(f"tome_{name}")
    model, x = recorded_model(case), torch.from_numpy(case["input"])
    with torch.no_grad():
        assert_near(patch(model)(x), torch.from_numpy(case["logits_dense"]))
    patch(model, ToMe(int(case["r"]), proportional=name.endswith("prop")), trace=True)
    logits, size, slots = final_sizes(model, x)
    assert_near(logits, torch.from_numpy(case["logits"]))
    assert torch.equal(size.float(), torch.from_numpy(case["size"]))
    assert torch.equal(slots.int(), torch.from_numpy(case["slot_of_token"]))


@pytest.mark.parametrize("name", ["ppt_0", "ppt_1"])
def test_ppt_is_the_published_one(name):
    case, seen = recorded(name), []

    class Spread(PPT):
        def plan(self, block, depth, aux, metric, num_prefix):
            seen.append(score_spread(token_scores(aux, self.score, num_prefix)))
            return super().plan(block, depth, aux, metric, num_prefix)

    model, x = recorded_model(case), torch.from_numpy(case["input"])
    ppt = Spread(int(case["r"]), case["locations"].tolist(), float(case["threshold"]))
    logits, size, _ = final_sizes(patch(model, ppt, trace=True), x)
    assert_near(logits, torch.from_numpy(case["logits"]))
    assert torch.equal(size.float(), torch.from_numpy(case["size"]))
    torch.testing.assert_close(torch.stack(seen), torch.from_numpy(case["score_variance"]), atol=0, rtol=1e-4)
    pruned = case["is_pruned"]
    assert pruned.any() and not pruned.all(0).all()  # both policies in the recorded batch
    # Images pruned at least once have lost patches for good, the others have all of them.
    assert torch.equal(size.sum(1) < 65, torch.from_numpy(pruned.any(0)))


def test_schedules():
    assert ToMe(13).schedule(12) == [13] * 12
    assert ToMe((13, -1.0)).schedule(12) == [int(26 - 26 / 11 * i) for i in range(12)]
    assert ToMe((16, 0.5)).schedule(3) == [8, 16, 24]
    assert ToMe([5, 4]).schedule(4) == [5, 4, 0, 0]
    assert ToMe(3).schedule(1) == [3]
    model = patch(vit(), ToMe([0, 20, 3]), trace=True)
    assert token_counts(model) == [(65, 65), (65, 45), (45, 42), (42, 42)]
    _, _, slots = final_sizes(model, images())
    assert slots.max() == 41
    assert torch.equal(token_map(model, 0), torch.arange(65).int().expand(3, -1))
    assert token_map(model, 1).max() == 44 and torch.equal(token_map(model, 2), token_map(model, 3))


@pytest.mark.parametrize("source", [3, "random"])
def test_tome_variants_run_in_a_model(source):
    model = patch(vit(), ToMe(10, source=source), trace=True)
    final_sizes(model, images())
    assert token_map(model).max() == token_counts(model)[-1][1] - 1


def test_counts_and_costs_are_the_published_ones():
    model = timm.create_model("deit_small_patch16_224")
    assert [n for _, n in token_counts(model, EViT(0.7))][3::3] == [140, 100, 72]
    assert [n for _, n in token_counts(model, PPT(50))][3::3] == [147, 97, 49]  # the last 50 clamped to 48
    giga = {
        None: 4.599,
        ToMe(13): 2.703,
        ToMe(16): 2.291,
        EViT(0.9): 4.022,
        EViT(0.8): 3.477,
        EViT(0.7): 3.029,
        EViT(0.6): 2.635,
        EViT(0.5): 2.309,
        PPT(50): 2.941,
    }
    for reduction, expected in giga.items():
        assert count_macs(model, reduction) / 1e9 == pytest.approx(expected, abs=1e-3)
    assert solve_r(model, 1.7) == 13 and solve_r(model, 1 / 1.7) == 13
    assert solve_r(model, 1.0) == 0
    assert solve_r(model, 0.65, PPT(score="received")) == solve_r(patch(model, PPT()), 0.65)


@pytest.mark.parametrize("reduction", [ToMe(), ToMe((13, -0.5)), PPT(blocks=(1, 2))], ids=repr)
@pytest.mark.parametrize("ratio", [0.95, 0.8, 1.4])
def test_solve_r_is_the_smallest_that_is_cheap_enough(reduction, ratio):
    def with_r(r):
        return dataclasses.replace(reduction, r=(r, -0.5) if isinstance(reduction.r, tuple) else r)

    model = vit()
    wanted = count_macs(model) * (1 / ratio if ratio > 1 else ratio)
    r = solve_r(model, ratio, reduction)
    assert count_macs(model, with_r(r)) <= wanted < count_macs(model, with_r(r - 1))


@pytest.mark.parametrize("reduction", [EViT(blocks=(1, 2)), TopK(blocks=(0, 1)), ToMe(source=3), PPT(blocks=(1,))])
@pytest.mark.parametrize("ratio", [0.9, 0.75])
def test_at_cost_comes_close_from_below(reduction, ratio):
    model = vit()
    solved = at_cost(model, ratio, reduction)
    assert type(solved) is type(reduction)
    assert 0.95 * ratio <= count_macs(model, solved) / count_macs(model) <= ratio


@pytest.mark.parametrize("score", ["cls_value", "entropy_value", "cls", "to_cls", "received"])
@pytest.mark.parametrize("criterion", ["variance", "cv2"])
def test_calibrate_meets_the_share(score, criterion):
    batches = [images(6, seed=s) for s in range(4)]
    model = patch(vit(), PPT(r=8, blocks=(1, 3), score=score, criterion=criterion), trace=True)
    threshold = calibrate(model, batches, 0.25, per_block=True)
    assert len(threshold) == 2
    pruned = {1: 0, 3: 0}
    for x in batches:
        with torch.no_grad():
            model(x)
        for block in (1, 3):
            dropped = (token_map(model, block) < 0).sum(1)
            lost_before = (token_map(model, block - 1) < 0).sum(1)
            pruned[block] += int((dropped - lost_before >= 8).sum())
    # Dropping a merged token in block 3 loses more than one patch, so never fewer than r.
    assert pruned == {1: 6, 3: 6}


def test_calibrate_one_threshold_for_all_blocks():
    batches = [(images(6, seed=s), torch.zeros(6)) for s in range(3)]
    model = patch(vit().train(), PPT(r=8, blocks=(0, 2)), linear="torch")
    assert calibrate(model, batches, 1.0) == 0.0
    threshold = calibrate(model, batches, 0.5)
    model.eval()
    patch(model, PPT(r=8, blocks=(0, 2), threshold=threshold), trace=True)
    pruned = 0
    for x, _ in batches:
        with torch.no_grad():
            model(x)
        lost = [(token_map(model, block) < 0).sum(1) for block in (0, 2)]
        pruned += int((lost[0] > 0).sum() + (lost[1] > lost[0]).sum())
    assert 15 <= pruned <= 21  # of 36
    model.train()
    calibrate(model, batches, 0.5)
    assert model.training and p3b_ext.current_reduction(model) == PPT(r=8, blocks=(0, 2), threshold=threshold)


class Interrupted:
    """Batches, before the second of which another thread does something."""

    def __init__(self, batches, other):
        self.batches, self.other, self.found = batches, other, None

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == 1 and self.found is None:
                with ThreadPoolExecutor(1) as thread:
                    self.found = thread.submit(self.other).result()
            yield batch


@pytest.mark.parametrize("training", [True, False])
def test_threads_calibrate_on_one_model(training):
    batches, ppt = [images(4, seed=s) for s in range(3)], PPT(r=8, blocks=(0, 2), threshold=1e-4)
    wanted = calibrate(patch(vit(), ppt), batches, 0.5)
    other_ppt = dataclasses.replace(ppt, score="received", threshold=0.0)
    model = patch(vit(drop_path_rate=0.5), ppt)
    with torch.no_grad():
        expected, spreads = model(batches[0]), score_spreads(model, batches, other_ppt)
    model.train(training)
    model.blocks[1].eval()

    def other():
        with torch.no_grad():
            logits = model(batches[0])
        return logits, score_spreads(model, batches, other_ppt), calibrate(model, batches, 0.25, per_block=True)

    loader = Interrupted(batches, other)
    assert calibrate(model, loader, 0.5) == wanted
    logits, other_spreads, other_threshold = loader.found
    assert torch.equal(logits, expected)  # by its own threshold, and in eval mode
    assert all(torch.equal(spreads[block], other_spreads[block]) for block in (0, 2))
    assert other_threshold == calibrate(patch(vit(), ppt), batches, 0.25, per_block=True)
    assert p3b_ext.current_reduction(model).threshold == wanted  # the last one to finish
    assert model.training is model.blocks[0].training is training and not model.blocks[1].training


def test_score_spreads():
    model, batches = patch(vit(), PPT(r=8, blocks=(0, 2), threshold=0.0)), [images(2), images(3, seed=2)]
    ppt = PPT(r=8, blocks=(2, 0), threshold=math.inf, criterion="cv2")
    spreads = score_spreads(model, batches, ppt)
    assert set(spreads) == {0, 2} and spreads[2].shape == (5,) and spreads[2].dtype == torch.float32
    for call, error, text in [
        (lambda: score_spreads(model, batches, ToMe()), TypeError, "score_spreads: ppt must be a PPT, got ToMe"),
        (lambda: score_spreads(model, [], ppt), ValueError, "score_spreads: loader must give at least one image"),
        (lambda: score_spreads(model, [images(2)[:0]], ppt), ValueError, "loader must give at least one image"),
        (lambda: score_spreads(vit(), batches, ppt), ValueError, r"score_spreads: model must be patched .* got \[\]"),
        (
            lambda: score_spreads(model, batches, dataclasses.replace(ppt, blocks=(1, 2))),
            ValueError,
            r"score_spreads: model must be patched with a reduction in blocks \[1, 2\], got \[0, 2\]",
        ),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_current_settings():
    model, reduction = vit(), ToMe(5)
    assert p3b_ext.current_patch(model) is None and p3b_ext.current_reduction(model) is None
    patch(model)
    assert p3b_ext.current_patch(model) == p3b_ext.Patch(None, False, "auto")
    assert p3b_ext.current_reduction(model) is None
    patch(model, reduction, trace=True, linear="torch")
    assert p3b_ext.current_patch(model) == p3b_ext.Patch(reduction, True, "torch")
    assert p3b_ext.current_reduction(model) is reduction
    with pytest.raises(AttributeError):
        p3b_ext.current_patch(model).trace = False
    p3b_ext.unpatch(model)
    assert p3b_ext.current_patch(model) is None
    for function in (p3b_ext.current_patch, p3b_ext.current_reduction):
        with pytest.raises(TypeError, match=r"current_\w+: model must be an nn.Module, got int"):
            function(5)


def test_ppt_without_a_threshold_says_how_to_get_one():
    model = patch(vit(), PPT(r=8, blocks=(1,), score="entropy_value"))
    with pytest.raises(ValueError, match=r"PPT: threshold must be given for score 'entropy_value'.*calibrate"):
        model(images())
    assert PPT().threshold_of(3) == 7e-5
    assert PPT(threshold=[1, 2, 3]).threshold_of(6) == 2


def test_only_reducing_blocks_ask_for_side_outputs(monkeypatch):
    asked = []
    real = p3b_ext.modules.packed_attention

    def spy(qkv, **options):
        asked.append((tuple(options["aux"] or ()), options["token_size"] is not None))
        return real(qkv, **options)

    monkeypatch.setattr(p3b_ext.modules, "packed_attention", spy)
    x = images()
    for reduction, aux in [
        (PPT(r=8, blocks=(1,), score="entropy_value", threshold=1.0), ("entropy", "value_norm")),
        (TopK(0.5, (1,), "received"), ("received",)),
        (EViT(0.5, (1,)), ("cls_attention",)),
        (ToMe([0, 8]), ()),
    ]:
        asked.clear()
        patch(vit(), reduction)(x)
        assert [names for names, _ in asked] == [(), aux, (), ()]
        assert [size for _, size in asked] == [False, False, *[reduction.proportional] * 2]


def test_evit_and_topk_in_a_model():
    model, x = patch(vit(), EViT(0.6, (1, 2)), trace=True), images()
    _, size, slots = final_sizes(model, x)
    keep = [math.ceil(0.6 * 64), math.ceil(0.6 * 40)]
    assert token_counts(model)[-1][1] == keep[1] + 2 == slots.max() + 1
    assert (size.sum(1) == 65).all() and (size[:, -1] > 1).all()
    final_sizes(patch(model, EViT([0.6, 1.0], (1, 2), fuse=False), trace=True), x)
    assert (token_map(model) < 0).sum(1).tolist() == [64 - keep[0]] * 3
    final_sizes(patch(model, TopK(0.55, (0,)), trace=True), x)
    assert (token_map(model) >= 0).sum(1).tolist() == [1 + 36] * 3
    assert TopK(0.55, (0,)).keep(0, 100) == 55


@pytest.mark.parametrize("score", ["cls_value", "entropy_value", "cls", "to_cls", "received"])
def test_topk_is_the_same_with_and_without_a_plan(score):
    reduction, x = TopK(0.6, (0,), score), torch.randn(2, 17, 12)
    attention, norm = torch.rand(2, 3, 17), torch.rand(2, 17)
    aux = p3b_ext.AttentionAux(None, attention, attention, norm, attention, attention)
    want, _ = reduction.plan(0, 1, aux, None, 1).apply(x)
    assert torch.equal(reduction.reduce(0, 1, x, None, aux, None, 1)[0], want)

    class Nothing(TopK):
        def plan(self, block, depth, aux, metric, num_prefix):
            return plan_prune(aux.value_norm[:, 1:], 0)

    assert torch.equal(Nothing(0.6, (0,)).reduce(0, 1, x, None, aux, None, 1)[0], x)


def test_reductions_are_values():
    assert ToMe(13) == ToMe(13) and hash(PPT(blocks=[3, 6])) == hash(PPT(blocks=(3, 6)))
    with pytest.raises(AttributeError):
        ToMe().r = 5


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ToMe(-1), ValueError, "ToMe: r must be at least 0, got -1"),
        (lambda: ToMe(math.nan), TypeError, "ToMe: r must be an int, got nan"),
        (lambda: ToMe(2.5), TypeError, r"ToMe: r must be an int, got 2\.5"),
        (lambda: ToMe("13"), TypeError, "ToMe: r must be an int, got '13'"),
        (lambda: ToMe((1, 2, 3)), ValueError, "ToMe: r must be an int, .* got a tuple of 3"),
        (lambda: ToMe((13, 2.0)), ValueError, r"ToMe: inflection must be between -1\.0 and 1\.0, got 2\.0"),
        (lambda: ToMe([3, -1]), ValueError, "ToMe: r must be at least 0, got -1"),
        (lambda: ToMe(source="odd"), ValueError, "ToMe: source must be None, an int or 'random', got 'odd'"),
        (lambda: PPT(-5), ValueError, "PPT: r must be at least 0, got -5"),
        (lambda: PPT([1, 2]), ValueError, "PPT: r must have one value for each of 3 blocks, got 2"),
        (lambda: PPT(threshold=math.nan), ValueError, "PPT: threshold must be between -inf and inf, got nan"),
        (lambda: PPT(threshold=(1, 2)), ValueError, "PPT: threshold must have one value for each of 3 blocks"),
        (lambda: PPT(score="best"), ValueError, "PPT: score must be one of cls_value, .*, got 'best'"),
        (lambda: PPT(criterion="std"), ValueError, "PPT: criterion must be one of variance, cv2, got 'std'"),
        (lambda: PPT(blocks=(3, 3)), ValueError, "PPT: blocks must be different ones"),
        (lambda: PPT(blocks=(-1,)), ValueError, "PPT: blocks must be at least 0, got -1"),
        (lambda: PPT(blocks=3), TypeError, "PPT: blocks must be a sequence of ints, got 3"),
        (lambda: EViT(0), ValueError, r"EViT: keep_rate must be in \(0, 1\], got 0"),
        (lambda: EViT(1.5), ValueError, r"EViT: keep_rate must be in \(0, 1\], got 1\.5"),
        (lambda: TopK(math.nan), ValueError, r"TopK: keep_rate must be in \(0, 1\], got nan"),
        (lambda: TopK("all"), TypeError, "TopK: keep_rate must be a number, got 'all'"),
        (lambda: TopK(score="best"), ValueError, "TopK: score must be one of"),
    ],
)
def test_bad_settings(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_bad_targets():
    model = vit()
    ppt = patch(vit(), PPT(blocks=(1,)))
    for call, error, text in [
        (lambda: solve_r(model, 0.01), ValueError, r"solve_r: macs_ratio must be at least 0\.\d+ .* got 0.010"),
        (lambda: solve_r(model, -1), ValueError, "solve_r: macs_ratio must be above 0, got -1"),
        (lambda: solve_r(model, math.nan), ValueError, "solve_r: macs_ratio must be above 0, got nan"),
        (lambda: solve_r(model, "half"), TypeError, "solve_r: macs_ratio must be a number, got 'half'"),
        (lambda: solve_r(model, 0.5, TopK()), TypeError, "solve_r: reduction must be ToMe or PPT, got TopK"),
        (lambda: at_cost(model, 0.01, TopK(blocks=(1,))), ValueError, r"at_cost: macs_ratio must be at least 0\.\d+"),
        (lambda: at_cost(model, 0.5, 13), TypeError, "at_cost: reduction must be ToMe, PPT, EViT or TopK, got int"),
        (lambda: calibrate(model, [images()], 0.5), ValueError, "calibrate: model must be patched with a PPT"),
        (lambda: calibrate(ppt, [], 0.5), ValueError, "calibrate: loader must give at least one image"),
        (lambda: calibrate(ppt, iter([images()]), 0.5), TypeError, "loader must be an iterable that .* several times"),
        (lambda: calibrate(ppt, 5, 0.5), TypeError, "calibrate: loader must be an iterable .* got int"),
        (lambda: calibrate(ppt, [{"x": images()}], 0.5), TypeError, "calibrate: loader must give images .* got dict"),
        (lambda: calibrate(None, [images()], 0.5), ValueError, "calibrate: model must be patched with a PPT"),
        (lambda: solve_r(nn.Linear(2, 2), 0.5), NotImplementedError, "solve_r: model must be a timm VisionTransf"),
        (lambda: at_cost(None, 0.5, EViT()), NotImplementedError, "at_cost: model must be a timm VisionTransformer"),
        (lambda: token_counts(model, 13), TypeError, "token_counts: reduction must be ToMe, .* got int"),
        (lambda: calibrate(ppt, [images()], 1.5), ValueError, r"calibrate: prune_share must be a number in \[0, 1\]"),
        (lambda: patch(family("gap"), PPT(blocks=(1,))), ValueError, "PPT: score must be one of entropy_value, recei"),
        (lambda: token_counts(model, PPT()), ValueError, "PPT: blocks must be between 0 and 3 for this model, got 6"),
    ]:
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize(
    "make", [lambda: ToMe(proportional=3), lambda: PPT(proportional="no"), lambda: EViT(fuse="no")]
)
def test_switches_are_true_or_false(make):
    with pytest.raises(TypeError, match="must be True or False, got "):
        make()


def test_a_score_is_a_name():
    with pytest.raises(ValueError, match=r"score must be one of cls_value, .*, got \['cls'\]"):
        PPT(score=["cls"])
