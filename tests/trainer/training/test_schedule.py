"""Learning rates of every step."""

import math

import pytest
import torch
from toy import batches, config, vit

import p3b
from p3b.training.progress import Silent
from p3b.training.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:importance")


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


def test_a_warm_up_that_never_ends_is_found_before_training():
    progress = Silent()
    progress.epoch = lambda record: pytest.fail("trained")
    settings = config(schedule="cosine", warmup_epochs=2, finetune_epochs=2)
    with pytest.raises(ValueError, match="warmup_epochs must be below the 2 epochs, got 2"):
        p3b.prune(vit(), batches(), batches(2, 1), settings, progress=progress)
