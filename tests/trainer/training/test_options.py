"""The trainer's options: mixed precision, mixing, averaging, distillation, clean targets, torch.compile, torchrun."""

import json
import math
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from toy import CLASSES, batches, config, prune, vit

import p3b
from p3b.cli.train import FINETUNE
from p3b.training.distillation import distillation
from p3b.training.progress import Silent
from p3b.training.prune import PruningPhase
from p3b.training.schedule import Schedule
from p3b.training.step import FIRST_SCALE, GROW_AFTER, Meter, Step, create_optimizer
from p3b_ext.patch import patch

pytestmark = pytest.mark.filterwarnings("ignore:importance")


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


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(ValueError, match=r"^train: batch must have an even number of images to be mixed, got 3$"):
        prune(train=batches(size=3), mixup=0.8)


def test_soft_targets_cannot_be_mixed_again():
    soft = [(images, torch.nn.functional.one_hot(labels, CLASSES).float()) for images, labels in batches()]
    with pytest.raises(TypeError, match=r"labels must be int64 \[B\] to be mixed"):
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


def test_the_average_of_the_weights_is_the_result():
    model = vit()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    p3b.finetune(model, batches(), batches(2, 1), config(ema=0.9999))
    moved = max(float((v - start[k]).abs().max()) for k, v in model.state_dict().items())
    other = vit()
    p3b.finetune(other, batches(), batches(2, 1), config())
    far = max(float((v - start[k]).abs().max()) for k, v in other.state_dict().items())
    assert 0 < moved < 0.1 * far


def rates(epochs=5, steps=4, **settings):
    """Learning rates of a fine-tuning run's optimizer steps."""
    weight = torch.nn.Parameter(torch.zeros(1))
    settings = p3b.Config(finetune_lr=0.1, **settings)
    optimizer = torch.optim.SGD([weight], settings.finetune_lr)
    schedule = Schedule(optimizer, settings, epochs, steps)
    found = []
    for _ in range(epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules():
    cosine = [0.01 + 0.09 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    assert rates(schedule="cosine", min_lr=0.01) == pytest.approx(cosine)
    warm = rates(schedule="cosine", warmup_epochs=2, min_lr=0.01)
    assert warm[8:] == pytest.approx(cosine[8:])  # timm's: the cosine runs from the start
    assert warm[:8] == pytest.approx([1e-5 + i * (0.1 - 1e-5) / 8 for i in range(8)])
    cycle = rates()
    assert max(cycle) == pytest.approx(0.1, rel=0.1) and cycle.index(max(cycle)) in (1, 2) and cycle[-1] < 1e-3
    assert rates(schedule="constant") == [0.1] * 20


def test_settings_of_a_schedule():
    for wrong, text in (
        ({"warmup_epochs": 1}, "warmup_epochs must be 0 unless schedule is cosine, got 1"),
        ({"schedule": "constant", "min_lr": 1e-5}, "min_lr must be 0 unless schedule is cosine, got 1e-05"),
        ({"schedule": "cosine", "min_lr": 1.0}, "min_lr must be at most finetune_lr = 0.001, got 1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            p3b.Config(**wrong)
    with pytest.raises(ValueError, match="warmup_epochs must be below the 2 epochs, got 2"):
        p3b.finetune(vit(), batches(), batches(2, 1), config(schedule="cosine", warmup_epochs=2, finetune_epochs=2))


def test_the_best_epoch_is_the_result_when_asked_for():
    model = vit()
    settings = config(select="best", finetune_epochs=6, finetune_lr=0.05, schedule="constant")
    history = p3b.finetune(model, batches(), batches(2, 1), settings)
    accuracies = [e["val_accuracy"] for e in history["epochs"]]
    assert history["accuracy_final"] == max(accuracies)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(2, 1))
    assert 100 * right / 32 == pytest.approx(max(accuracies))


def test_distillation_is_zero_for_equal_answers_and_pulls_towards_the_teacher():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert distillation(logits, logits, 2.0).abs() < 1e-6
    student, teacher = (torch.softmax(torch.tensor(row) / 2, 0) for row in ([1.0, 0.0], [0.0, 1.0]))
    expected = 4 * (teacher * (teacher / student).log()).sum()
    found = distillation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 2.0)
    assert found == pytest.approx(float(expected))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 1}, "teacher must give the model's 4 classes, got [1]"),
        ({"in_chans": 1}, "teacher must take images [3, 16, 16] as the model does, got "),
        ({"img_size": 32}, "teacher must take images [3, 16, 16] as the model does, got "),
    ],
)
def test_a_teacher_of_something_else_is_found_before_training(options, message):
    settings, teacher = config(distill=0.5), vit(**options)
    steps = []
    progress = Silent()
    progress.epoch = steps.append
    for train in (p3b.prune, p3b.finetune):
        with pytest.raises(ValueError, match=re.escape(message)):
            train(vit(), batches(), batches(2, 1), settings, teacher=teacher, progress=progress)
    assert not steps


def test_a_warm_up_that_never_ends_is_found_before_training():
    progress = Silent()
    progress.epoch = lambda record: pytest.fail("trained")
    settings = config(schedule="cosine", warmup_epochs=2, finetune_epochs=2)
    with pytest.raises(ValueError, match="warmup_epochs must be below the 2 epochs, got 2"):
        p3b.prune(vit(), batches(), batches(2, 1), settings, progress=progress)


def test_a_model_without_pooling_says_so():
    with pytest.raises(
        ValueError, match=re.escape("model must give logits [B, K], got [16, 17, 4]; set its global_pool")
    ):
        prune(vit(global_pool=""))


def test_masks_that_miss_the_budget_say_so():
    with pytest.warns(UserWarning, match=r"the masks prune .* where 50.0% was asked for; a round_to below 1000"):
        prune(round_to=1000)


def test_a_student_of_one_teacher_alone_answers_like_it():
    teacher = vit()
    with torch.no_grad():
        teacher.head.bias[2] += 8.0  # sure of one class, whatever the labels say
    model = vit()
    settings = config(distill=1.0, finetune_epochs=4)
    p3b.finetune(model, batches(), batches(2, 1), settings, teacher=teacher)
    with torch.no_grad():
        assert (model.eval()(batches(1)[0][0]).argmax(1) == 2).all()


def test_pruning_distils_from_the_model_as_it_was():
    result = prune(distill=0.5)
    assert result.history["epochs"][-1]["loss"] > 0
    with pytest.raises(ValueError, match="distill needs a teacher: give one, or a start_epoch of 1"):
        prune(distill=0.5, start_epoch=0)
    with pytest.raises(ValueError, match="distill must have a teacher here"):
        p3b.finetune(vit(), batches(), batches(), config(distill=0.5))


def test_compensation_changes_biases_and_nothing_else():
    plain, kept = prune(finetune_epochs=0), prune(finetune_epochs=0, compensate=True)
    assert plain.model.p3b_kept == kept.model.p3b_kept
    changed = {
        name
        for (name, a), b in zip(plain.model.named_parameters(), kept.model.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed and all(name.endswith((".bias", "_constant")) for name in changed)
    assert kept.history["accuracy_masked"] == kept.history["accuracy_shrunk"]
    with pytest.raises(NotImplementedError, match="compensate: "):
        prune(vit(qkv_bias=False), compensate=True)


def test_finetune_has_a_flag_for_every_setting_that_it_reads(monkeypatch):
    settings = config(mixup=0.8, ema=0.9, distill=0.5, schedule="cosine")
    read = set()

    def noted(self, name):
        read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(p3b.Config, "__getattribute__", noted)
    p3b.finetune(vit(), batches(2), batches(1), settings, teacher=vit())
    assert read & set(p3b.Config.__dataclass_fields__) == set(FINETUNE)


def test_compiled_steps_are_the_same_steps(monkeypatch):
    compiled = []
    whole = torch.compile

    def traced(model, **_):
        compiled.append(model)
        return whole(model, backend="aot_eager")  # traced and differentiated as for Inductor, without its minutes

    monkeypatch.setattr(torch, "compile", traced)
    short = dict(sparse_epoch=2, final_epoch=2, finetune_epochs=1, probe_every=2)
    plain, fast = prune(**short), prune(compile=True, **short)
    assert len(compiled) == 2  # under gates, and small
    for a, b in zip(plain.history["updates"], fast.history["updates"], strict=True):
        assert a["keep_ratio"] == pytest.approx(b["keep_ratio"], abs=0.05)
    assert plain.history["updates"][0]["benefit"]["cls"] == pytest.approx(
        fast.history["updates"][0]["benefit"]["cls"], abs=1e-3
    )
    assert [e["loss"] for e in fast.history["epochs"]] == pytest.approx(
        [e["loss"] for e in plain.history["epochs"]], rel=1e-2
    )


@pytest.mark.parametrize("method", ["savit", "wdpruning"])  # other gates, and a loss of the method's own
def test_rivals_compile_too(monkeypatch, method):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: whole(model, backend="eager", fullgraph=True))
    short = dict(start_epoch=0, sparse_epoch=1, final_epoch=1, finetune_epochs=1, method=method, train=batches(2))
    plain, fast = prune(**short), prune(compile=True, **short)
    assert plain.model.p3b_kept == fast.model.p3b_kept
    losses = [[e["loss"] for e in result.history["epochs"]] for result in (plain, fast)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_command_line_under_torchrun(tmp_path):
    settings = {
        "model": "vit_tiny_patch16_224",
        "model_kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "pretrained": False,
        "data": "digits",
        "img_size": 8,
        "classes": [5, 6],
        "batch_size": 32,
        "start_epoch": 0,
        "sparse_epoch": 1,
        "final_epoch": 2,
        "finetune_epochs": 1,
        "device": "cpu",
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))

    def start(name, *python):
        command = [*python, "-m", "p3b", "prune", "--config", "settings.json", "--output", name, "--threads", "1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment)

    def run(name, *python):
        found = start(name, *python)
        assert found.returncode == 0, found.stderr
        return found.stdout, json.loads((tmp_path / name / "history.json").read_text())

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    alone, history = run("alone", sys.executable)
    text, together = run("together", *several)
    assert text.count("written to together") == 1 and text.count("pruned") == alone.count("pruned")
    assert [u["keep_ratio"] for u in together["updates"]] == [u["keep_ratio"] for u in history["updates"]]
    for mine, theirs in zip(history["epochs"], together["epochs"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert not (tmp_path / "together.unfinished").exists()
    again = start("together", *several)  # the folder holds a run now: the first process says so, the other just ends
    assert again.returncode != 0 and again.stderr.count("already holds a run") == 1, again.stderr
    assert "cli.py" not in again.stderr and "gloo" not in again.stderr, (
        again.stderr
    )  # the launcher has its own traceback
