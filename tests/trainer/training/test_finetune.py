"""Fine-tuning: what it learns, its best epoch, its average, its flags."""

import pytest
import torch
from toy import CLASSES, batches, config, vit

import p3b
from p3b.cli.train import FINETUNE

pytestmark = pytest.mark.filterwarnings("ignore:importance")


def test_soft_targets_are_taken():
    soft = [(x, torch.nn.functional.one_hot(y, CLASSES).float()) for x, y in batches(2)]
    assert len(p3b.finetune(vit(), soft, batches(1), config(), epochs=1)["epochs"]) == 1


def test_finetune_learns_and_needs_an_epoch():
    model = vit()
    history = p3b.finetune(model, batches(), batches(2, 1), config(finetune_lr=5e-3), epochs=6)
    assert history["accuracy_final"] > 60
    assert [e["epoch"] for e in history["epochs"]] == list(range(6))
    with pytest.raises(ValueError, match="epochs must be 1 or more, got 0"):
        p3b.finetune(model, batches(), batches(2, 1), config(), epochs=0)


def test_the_average_of_the_weights_is_the_result():
    model = vit()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    p3b.finetune(model, batches(), batches(2, 1), config(ema=0.9999))
    moved = max(float((v - start[k]).abs().max()) for k, v in model.state_dict().items())
    other = vit()
    p3b.finetune(other, batches(), batches(2, 1), config())
    far = max(float((v - start[k]).abs().max()) for k, v in other.state_dict().items())
    assert 0 < moved < 0.1 * far


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


def test_finetune_has_a_flag_for_every_setting_that_it_reads(monkeypatch):
    settings = config(mixup=0.8, ema=0.9, distill=0.5, schedule="cosine")
    read = set()

    def noted(self, name):
        read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(p3b.Config, "__getattribute__", noted)
    p3b.finetune(vit(), batches(2), batches(1), settings, teacher=vit())
    assert read & set(p3b.Config.__dataclass_fields__) == set(FINETUNE)
