"""One step: what it measures, what it must not touch; mixed precision, mixing, clean targets, clipping."""

import copy
import math

import pytest
import torch
from toy import CLASSES, batches, config, prune, pruning_phase, vit

import p3b
from p3b.training.prune import PruningPhase
from p3b.training.step import FIRST_SCALE, GROW_AFTER, Meter, Step, create_optimizer
from p3b_ext.patch import patch

pytestmark = pytest.mark.filterwarnings("ignore:importance")


def test_gates_are_bitwise_untouched_between_updates():
    run, meter = pruning_phase(start_epoch=0, weight_decay=0.5, lr=0.1)
    values = torch.rand_like(run.gates.values)
    run.gates.set(values)
    weights = [p.clone() for p in run.model.parameters()]
    for batch in batches():
        run.train_step([batch], meter)
    assert torch.equal(run.gates.values, values)
    assert all(not torch.equal(a, b) for a, b in zip(weights, run.model.parameters(), strict=True))
    held = {p.data_ptr() for p in run.step.parameters} | {p.data_ptr() for p in run.method.probes.parameters()}
    assert held.isdisjoint({run.gates.values.data_ptr()})
    assert len(run.step.parameters) == len(list(run.model.parameters()))


def test_scores_are_those_of_the_batch_gradient():
    run, meter = pruning_phase(start_epoch=0, label_smoothing=0.0, lr=1e-12)
    run.gates.set(torch.rand_like(run.gates.values) * 0.5 + 0.5)
    images, labels = batches(1)[0]
    twin = copy.deepcopy(run.model)
    torch.nn.functional.cross_entropy(twin(images), labels).backward()
    expected = (twin.p3b_gates.values * twin.p3b_gates.grad).square()
    run.train_step([(images, labels)], meter)
    torch.testing.assert_close(run.gates.score_sum, expected, rtol=1e-4, atol=1e-10)


def test_nothing_is_measured_in_the_warm_up():
    run, meter = pruning_phase(start_epoch=1)
    run.train_step([batches(1)[0]], meter)
    assert not run.gates.score_sum.any() and not run.method.benefit.count and not run.gates.grad.any()
    assert any(state for state in run.method.optimizers[0].state.values())  # the probes learn from the start


def test_accumulated_batches_make_one_step():
    images, labels = batches(1, size=8)[0]
    halves = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    whole, meter = pruning_phase(start_epoch=0, patch_probe="linear")
    split, _ = pruning_phase(start_epoch=0, patch_probe="linear")
    split.method.probes.load_state_dict(whole.method.probes.state_dict())
    whole.train_step([(images, labels)], meter)
    split.train_step(halves, meter)
    torch.testing.assert_close(split.gates.score_sum, whole.gates.score_sum, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(
        split.method.benefit.sums / split.method.benefit.count, whole.method.benefit.sums, rtol=1e-3, atol=1e-5
    )
    assert float(split.gates.count) == 1
    # two batches a step: three steps an epoch, updates counted in steps
    result = prune(accumulate=2, updates_per_epoch=1, finetune_epochs=0)
    assert [u["step"] for u in result.history["updates"]] == [5, 8, 11, 12]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_change_nothing(bad):
    run, meter = pruning_phase(start_epoch=0)
    good = batches(2)
    run.train_step([good[0]], meter)
    weights = [p.clone() for p in (*run.model.parameters(), *run.method.probes.parameters())]
    score, count = run.gates.score_sum.clone(), float(run.gates.count)
    images = good[1][0].clone()
    images[0, 0, 0, 0] = bad
    run.train_step([(images, good[1][1])], meter)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights, (*run.model.parameters(), *run.method.probes.parameters()), strict=True)
    )
    assert torch.equal(run.gates.score_sum, score) and float(run.gates.count) == count
    assert torch.isfinite(run.method.benefit.sums).all()
    assert float(run.step.skipped) == 1
    run.train_step([good[1]], meter)
    assert float(run.gates.count) == count + 1 and torch.isfinite(run.gates.score_sum).all()
    for _ in range(10):
        run.train_step([(images, good[1][1])], meter)
    with pytest.raises(RuntimeError, match=r"10 steps in a row .*epoch 3"):
        run.step.check("epoch 3")


@pytest.mark.parametrize("call", [p3b.prune, p3b.finetune])
def test_ten_broken_steps_end_the_run_in_the_middle_of_an_epoch(call):
    """An epoch may take hours; the error says where it stopped."""
    drawn = []

    class Broken(list):
        def __iter__(self):
            for images, labels in super().__iter__():
                drawn.append(len(labels))
                yield images / 0, labels

    where = "prune epoch 0, step 1[0-3] of 60" if call is p3b.prune else "finetune epoch 0, step 1[0-3] of 60"
    with pytest.raises(p3b.Diverged, match=rf"in 1\d steps in a row \({where}\)"):
        call(vit(depth=1), Broken(batches(60, size=2)), batches(1, 1), config())
    assert 10 <= len(drawn) <= 13


def test_clipping():
    model = vit()
    step = Step(
        model,
        create_optimizer(model, config(opt="sgd"), 1.0),
        config(clip_grad=1e-3, weight_decay=0.0),
        torch.device("cpu"),
    )
    before = [p.clone() for p in model.parameters()]
    step.optimizer.param_groups[0]["momentum"] = 0.0
    for group in step.optimizer.param_groups:
        group["weight_decay"], group["momentum"], group["nesterov"] = 0.0, 0.0, False
    step(batches(1), Meter(torch.device("cpu")))
    moved = torch.stack([(a - b).norm() for a, b in zip(before, model.parameters(), strict=True)]).norm()
    assert float(moved.detach()) == pytest.approx(1e-3, rel=1e-2)


def step_of(**options):
    settings = config(**options)
    model = patch(vit())
    return Step(model, create_optimizer(model, settings, settings.lr), settings, torch.device("cpu"))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_finds_what_full_precision_finds(amp):
    exact, mixed = prune(), prune(amp=amp)
    assert mixed.summary["skipped_steps"] == 0
    assert mixed.summary["final_params"] == pytest.approx(exact.summary["final_params"], rel=0.02)
    losses = [[e["loss"] for e in result.history["epochs"]] for result in (exact, mixed)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_float16_scores_are_those_of_the_plain_gradient():
    def scores(amp):
        run = PruningPhase(patch(vit()), config(start_epoch=0, amp=amp), 6)
        run.train_step([batches(1)[0]], Meter(run.device))
        return run.gates.score_sum

    assert torch.allclose(scores("float16"), scores("none"), rtol=0.1, atol=1e-7)


def test_an_overflowing_float16_loss_halves_its_scale_and_leaves_everything_else():
    step = step_of(amp="float16")
    before = [p.detach().clone() for p in step.model.parameters()]
    step.scale.fill_(2.0**127)
    step([batches(1)[0]], Meter(step.device))
    assert step.skipped == 1 and step.scale == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_an_overflowing_float16_step_leaves_the_scores_clean():
    run = PruningPhase(patch(vit()), config(start_epoch=0, amp="float16"), 6)
    first, second = batches(2)
    run.train_step([first], Meter(run.device))
    kept = [run.gates.score_sum.clone(), run.gates.energy_sum.clone(), run.gates.count.clone()]
    assert kept[0].any() and kept[2] == 1
    run.step.scale.fill_(2.0**127)
    run.train_step([second], Meter(run.device))
    assert run.step.skipped == 1 and not run.gates.grad.any()
    for before, now in zip(kept, (run.gates.score_sum, run.gates.energy_sum, run.gates.count), strict=True):
        assert torch.equal(before, now)
    assert all(p.isfinite().all() for p in (*run.model.parameters(), *run.method.probes.parameters()))


def test_the_float16_scale_grows_again():
    step = step_of(amp="float16")
    step.since_growth.fill_(GROW_AFTER - 1)
    step([batches(1)[0]], Meter(step.device))
    assert step.scale == 2 * FIRST_SCALE and step.since_growth == 0


def test_mixing_changes_the_targets_and_not_the_loader():
    data = batches()
    kept = [images.clone() for images, _ in data]
    mixed = prune(train=data, mixup=0.8, cutmix=1.0)
    assert all(torch.equal(a, b) for a, (b, _) in zip(kept, data, strict=True))
    plain = prune(train=data)
    assert mixed.history["epochs"][-1]["loss"] > 1.2 * plain.history["epochs"][-1]["loss"]


def test_the_last_image_of_an_odd_batch_is_not_mixed():
    """timm mixes pairs: of 5 images 4 are mixed, and the loader's tensors stay as they are."""
    step = Step(
        vit(), create_optimizer(vit(), config(), 1e-3), config(mixup=0.8, label_smoothing=0.2), torch.device("cpu")
    )
    images, labels = (part[:5] for part in batches(1)[0])
    before = images.clone()
    mixed, soft = step.mixed(step.mixup, images, labels)
    assert torch.equal(images, before) and torch.equal(mixed[4], images[4]) and not torch.equal(mixed[:4], images[:4])
    expected = torch.full((CLASSES,), 0.2 / CLASSES)
    expected[labels[4]] += 0.8
    torch.testing.assert_close(soft[4], expected)
    assert torch.allclose(soft.sum(1), torch.ones(5))


@pytest.mark.parametrize("mixing", [{"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 0.5, "cutmix": 0.5}])
def test_loaders_with_an_odd_last_batch_train_under_mixing(mixing):
    images, labels = batches(1, size=21)[0]
    loader = list(zip(images.split(5), labels.split(5), strict=True))  # 5, 5, 5, 5, 1
    history = p3b.finetune(vit(), loader, loader, config(**mixing), epochs=1)
    assert math.isfinite(history["epochs"][0]["loss"])
    assert p3b.prune(vit(), loader, loader, config(**mixing)).history["skipped_steps"] == 0


def test_soft_targets_cannot_be_mixed_again():
    soft = [(images, torch.nn.functional.one_hot(labels, CLASSES).float()) for images, labels in batches()]
    with pytest.raises(TypeError, match="soft targets cannot be mixed"):
        prune(train=soft, mixup=0.8)


def test_benefit_of_clean_targets():
    smoothed, clean = (
        prune(benefit_targets=targets, label_smoothing=0.3, final_epoch=3) for targets in ("train", "clean")
    )
    # probes learn the same; what is read off them is not: the loss of plain labels moves by more
    sizes = [sum(abs(v) for v in r.history["updates"][0]["benefit"]["cls"].values()) for r in (smoothed, clean)]
    assert sizes[1] > 1.1 * sizes[0]
    assert smoothed.history["epochs"][0]["loss"] == clean.history["epochs"][0]["loss"]


def test_benefit_of_images_before_they_were_mixed():
    seen = []

    run = PruningPhase(patch(vit()), config(start_epoch=0, benefit_targets="clean", mixup=0.8), 6)
    loss = run.method.loss
    run.method.loss = lambda batch: (seen.append(batch.clean), loss(batch))[1]
    images, labels = batches(1)[0]
    run.train_step([(images, labels)], Meter(run.device))
    stream, targets = seen[0]
    assert len(stream) == 2 * len(run.model.blocks) + 1 and torch.equal(targets, labels)
    with torch.no_grad():  # what the first block reads of the images as they are, before the step changed the weights
        fresh = patch(vit())
        first = fresh.patch_embed(images)
    assert torch.allclose(stream[0][:, 1:], first + fresh.pos_embed[:, 1:], atol=1e-5)
