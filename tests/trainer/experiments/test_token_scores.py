"""`p3b scores`: every setting is what it says, costs what others of its r cost, and gives what the parts give."""

import math

import pytest
import torch
from vits import vit

import p3b_ext
from p3b.experiments import token_scores as scores
from p3b.metrics.accuracy import evaluate
from p3b_ext.tuning import score_spreads

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return vit(depth=4, embed_dim=24, num_heads=3, img_size=24, patch_size=4, num_classes=5).eval()


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 3, 24, 24, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def test_settings_of_one_r_cost_the_same(model):
    cases = scores.sweep(model, list(batches()), rs=[3, 6], calibration=[images for images, _ in batches()])
    shown = [(case.mode, case.score, case.r) for case in cases]
    expected = [("none", None, 0)]
    for r in (3, 6):
        expected += [("prune", score, r) for score in scores.SCORES] + [("merge", None, r)]
        expected += [("ppt", score, r) for score in scores.SCORES]
    assert shown == expected
    for r, tokens in ((0, 37), (3, 28), (6, 19)):
        same = [case for case in cases if case.r == r]
        assert {case.tokens for case in same} == {tokens} and len({case.macs for case in same}) == 1
    chosen = [case for case in cases if case.mode == "ppt"]
    for case in chosen:  # the images that the threshold was found on
        assert list(case.pruned) == list(case.spread) == [1, 2, 3]
        assert sum(case.pruned.values()) / 3 == pytest.approx(0.5, abs=0.13)
    assert len({case.spread[1] for case in chosen}) == 3  # scores differ; the first block sees the same tokens
    assert all(not case.pruned and case.threshold is None for case in cases if case.mode != "ppt")
    assert evaluate(model, list(batches()))["top1"] == cases[-1].top1  # the model is left with the last setting


def test_by_hand(model):
    images = [images for images, _ in batches()]
    found = scores.sweep(model, list(batches()), rs=[5], scores=["entropy_value"], blocks=[0, 2], calibration=images)
    by_mode = {case.mode: case for case in found}
    for mode, threshold in (("prune", -math.inf), ("merge", math.inf), ("ppt", by_mode["ppt"].threshold)):
        ppt = p3b_ext.PPT(r=5, blocks=[0, 2], threshold=threshold, score="entropy_value", criterion="cv2")
        p3b_ext.patch(model, ppt)
        assert by_mode[mode].top1 == evaluate(model, list(batches()))["top1"], mode
    spreads = score_spreads(model, images, ppt)
    assert {block: (float(s.mean()), float(s.std())) for block, s in spreads.items()} == by_mode["ppt"].spread
    assert {block: float((s >= ppt.threshold * (1 - 1e-5)).float().mean()) for block, s in spreads.items()} == (
        by_mode["ppt"].pruned
    )
    p3b_ext.unpatch(model)
    assert by_mode["none"].top1 == evaluate(model, list(batches()))["top1"]


def test_published_r_in_proportion(model):
    cases = scores.sweep(model, list(batches(1)), modes=["merge"], calibration=[])
    assert [case.r for case in cases] == [0, 3, 6, 9]  # 50 of 196 of 36, and thirds of it


def test_a_model_without_class_token():
    torch.manual_seed(0)
    shape = dict(depth=4, embed_dim=24, num_heads=3, img_size=24, patch_size=4, num_classes=5)
    model = vit(class_token=False, global_pool="avg", **shape)
    cases = scores.sweep(model, list(batches(1)), rs=[3], calibration=[images for images, _ in batches(1)])
    assert {case.score for case in cases} == {None, "entropy_value", "received"} and len(cases) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modes": ["prun"]}, "modes must be of prune, merge, ppt, got prun"),
        ({"scores": ["mean"]}, "scores must be of cls_value, .*, got mean"),
        ({"scores": []}, "scores must be of .*, got none"),
        ({"rs": [0, 2]}, "r must be 1 or more, got 0"),
        ({"prune_share": 1.5}, r"prune_share must be a number in \[0, 1\], got 1.5"),
    ],
)
def test_mistakes(model, settings, message):
    with pytest.raises(ValueError, match=message):
        scores.sweep(model, list(batches(1)), calibration=[images for images, _ in batches(1)], **settings)
