"""Accuracy and loss against numbers counted by hand."""

import pytest
import torch
from torch import nn

from p3b.metrics.accuracy import evaluate


class Fixed(nn.Module):
    """Answers every image with its own first row of pixels as logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x[:, 0, 0] * self.weight


def test_evaluate_by_hand():
    images = torch.tensor([[3.0, 1, 0, 0, 0, 0], [0, 2, 1, 0, 0, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 9]]).view(
        4, 1, 1, 6
    )
    labels = torch.tensor([0, 2, 5, 5])  # first; second; last of six; first
    model = Fixed().train()
    found = evaluate(model, [(images[:3], labels[:3]), (images[3:], labels[3:])])
    expected = nn.functional.cross_entropy(images[:, 0, 0], labels)
    assert found["top1"] == 50 and found["top5"] == 75 and found["images"] == 4
    assert found["loss"] == pytest.approx(float(expected))
    assert model.training
    assert evaluate(model, [(images, nn.functional.one_hot(labels, 6).float())])["top1"] == 50


def test_evaluate_needs_images():
    with pytest.raises(ValueError, match="the loader has no images"):
        evaluate(Fixed(), [])
