"""Distillation: its loss, its teachers."""

import re

import pytest
import torch
from toy import batches, config, prune, vit

import p3b
from p3b.training.distillation import distillation
from p3b.training.progress import Silent

pytestmark = pytest.mark.filterwarnings("ignore:importance")


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
    with pytest.raises(ValueError, match="distill needs a teacher; give one"):
        p3b.finetune(vit(), batches(), batches(), config(distill=0.5))
