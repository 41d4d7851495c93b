"""Batches that do not fit are the same clear error wherever they come; empty ones are skipped, odd ones train."""

import math

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import p3b

SIZE = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
SHORT = dict(start_epoch=0, sparse_epoch=1, final_epoch=1, finetune_epochs=1, device="cpu")
pytestmark = pytest.mark.filterwarnings("ignore:importance")


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size) % 3


def vit(cls=VisionTransformer):
    torch.manual_seed(0)
    return cls(**SIZE)


images, labels = batch()
BAD = {
    "dtype": ((images.double(), labels), TypeError, "images must have the model's dtype"),
    "size": ((images[..., :8], labels), ValueError, r"images must be \[B, 3, 16, 16\], got \[6, 3, 16, 8\]"),
    "channels": ((images[:, :1], labels), ValueError, r"images must be \[B, 3, 16, 16\], got \[6, 1, 16, 16\]"),
    "axes": ((images[0], labels), ValueError, r"images must be \[B, C, H, W\], got \[3, 16, 16\]"),
    "count": ((images, labels[:4]), ValueError, r"labels must be \[6\], one per image, got \[4\]"),
    "label": ((images, labels + 1), ValueError, "labels must be 0 to 2, got 1 to 3"),
    "labels' dtype": ((images, labels.int()), TypeError, "labels must be int64"),
    "soft targets": ((images, torch.rand(6, 4)), ValueError, r"soft targets must be \[6, 3\], got \[6, 4\]"),
    "no pair": (images, TypeError, "batch must be two tensors"),
    "three": ((images, labels, labels), TypeError, "batch must be two tensors"),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_batch_is_the_same_error_wherever_it_comes(name, accumulate, place):
    bad, kind, message = BAD[name]
    loader = [batch(seed=seed) for seed in range(4)]
    loader[place] = bad
    with pytest.raises(kind, match=message):
        p3b.finetune(vit(), loader, [batch()], p3b.Config(**SHORT, accumulate=accumulate), epochs=1)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_empty_batches_are_skipped(place):
    loader = [batch(seed=seed) for seed in range(3)]
    config = p3b.Config(**SHORT)
    expected = p3b.finetune(vit(), loader, loader, config, epochs=1)["epochs"]
    with_empty = [*loader[:place], (images[:0], labels[:0]), *loader[place:]]
    config.schedule = "constant"  # the loader's length counts the empty batch
    expected = p3b.finetune(vit(), loader, loader, config, epochs=1)["epochs"]
    assert p3b.finetune(vit(), with_empty, with_empty, config, epochs=1)["epochs"] == expected


def test_a_distilled_model_trains_on_both_heads():
    model = vit(VisionTransformerDistilled)
    model.set_distilled_training(True)
    before = [head.weight.clone() for head in (model.head, model.head_dist)]
    loader = [batch(seed=seed) for seed in range(3)]
    model.train()
    torch.manual_seed(0)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = torch.stack([criterion(head, loader[0][1]) for head in model(loader[0][0])]).mean()
    history = p3b.finetune(model, loader[:1], loader, p3b.Config(**SHORT), epochs=1)
    assert history["epochs"][0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert all((head.weight != old).any() for head, old in zip((model.head, model.head_dist), before, strict=True))
    result = p3b.prune(model, loader, loader, p3b.Config(**SHORT))
    assert math.isfinite(result.history["epochs"][-1]["loss"])


def test_frozen_models_are_named_as_such():
    with pytest.raises(ValueError, match="all parameters of the model are frozen"):
        p3b.finetune(vit().requires_grad_(False), [batch()], [batch()], p3b.Config(**SHORT), epochs=1)
