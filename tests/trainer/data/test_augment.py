"""Augmentation by hand, and timm's policies."""

import math

import pytest
import torch
from PIL import Image
from toy import read_data

from p3b.data.augment import colour, erase, shift_and_flip, warp
from p3b.data.loaders import SeededImages


def test_shift_and_flip_by_hand():
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(9, 1, 1, 1)
    still, mirrored = torch.zeros(9, 2, dtype=torch.int64), torch.arange(9) % 2 == 1
    flipped = shift_and_flip(x, still, mirrored)
    assert torch.equal(flipped[::2], x[::2]) and torch.equal(flipped[1::2], x[1::2].flip(3))
    moves = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1), mode="replicate")
    wanted = torch.stack([padded[0, :, 1 + r : 4 + r, 1 + c : 5 + c] for r, c in moves.tolist()])
    assert torch.equal(shift_and_flip(x, moves, still[:, 0] == 1), wanted)


def test_middle_draws_change_nothing():
    x = torch.rand(2, 3, 10, 12, generator=torch.Generator().manual_seed(0)) * 255
    middle = torch.full((2, 3), 0.5)
    assert torch.allclose(colour(x, middle, 0.4), x, atol=1e-3)
    assert torch.allclose(warp(x, middle), x, atol=1e-3)
    assert torch.equal(erase(x, torch.full((2, 5), 0.5), 0.5), x)  # a draw of 0.5 is not below it


def test_colour_by_hand():
    x = torch.tensor([[100.0, 50.0], [30.0, 90.0], [20.0, 40.0]]).view(1, 3, 1, 2)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    draws = [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 0]]
    brighter, contrast, saturation = (torch.tensor([row]) for row in draws)
    assert torch.allclose(colour(x, brighter, 0.4), x * 1.4)
    assert torch.allclose(colour(x, contrast, 0.4), luma.mean() + 1.4 * (x - luma.mean()), atol=1e-4)
    assert torch.allclose(colour(x, saturation, 1.0), luma.expand(1, 3, 1, 2), atol=1e-4)  # no saturation: grey
    grey = x[:, :1]
    assert torch.allclose(colour(grey, contrast, 0.4), grey.mean() + 1.4 * (grey - grey.mean()), atol=1e-4)


def test_warp_turns_by_degrees_on_any_shape():
    x = torch.zeros(2, 1, 61, 121)
    x[:, :, 29:32, 99:102] = 1  # 40 pixels right of the centre
    moved = warp(x, torch.tensor([[1.0, 0.5, 0.5], [0.5, 0.5, 0.0]]))
    rows, cols = torch.arange(61.0) - 30, torch.arange(121.0) - 60
    weight = moved.sum((1, 2, 3))
    at = [((moved.sum((1, 3)) * rows).sum(1) / weight), (moved.sum((1, 2)) * cols).sum(1) / weight]
    angle = math.degrees(math.atan2(float(at[0][0]), float(at[1][0])))
    assert abs(angle) == pytest.approx(15, abs=0.5) and math.hypot(at[0][0], at[1][0]) == pytest.approx(40, abs=0.5)
    assert float(at[1][1]) == pytest.approx(40 * 1.25, abs=0.5) and abs(float(at[0][1])) < 0.5


def test_erased_boxes_have_the_published_sizes():
    draws = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0))
    x = torch.ones(2000, 1, 40, 60)
    gone = erase(x, draws, 0.25) == 0
    erased = gone.flatten(1).any(1)
    assert 430 < int(erased.sum()) < 570
    height, width = gone.any(3).sum((1, 2))[erased], gone.any(2).sum((1, 2))[erased]
    assert torch.equal(height * width, gone.sum((1, 2, 3))[erased])  # one box, no holes
    share = (height * width) / 2400
    assert share.min() > 0.01 and share.max() < 0.36 and share.std() > 0.05
    for edge in (gone[:, 0, 0], gone[:, 0, -1], gone[:, 0, :, 0], gone[:, 0, :, -1]):
        assert edge.any()  # boxes reach every border


def test_policies_of_timm(folder):
    root = folder()
    settings = ({}, {"auto_augment": ""}, {"auto_augment": "", "color_jitter": 0.0, "re_prob": 0.0})
    kept = [read_data(root, img_size=8, batch_size=18, augment="strong", **how).train for how in settings]
    assert len({float(next(iter(loader))[0].sum()) for loader in kept}) == 3
    with pytest.raises(ValueError, match=r"auto_augment must be a policy that timm knows .* got 'lots'"):
        read_data(root, augment="strong", auto_augment="lots")


class Blank:
    """A data set of one colour."""

    def __call__(self, index):
        return Image.new("RGB", (8, 8)), 0


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "original", "v0", "augmix-m10-w3"])
def test_policies_take_every_image(policy):
    read = Blank()
    for index in range(2):
        transform = read_data(
            "digits", on_device=False, img_size=8, augment="strong", auto_augment=policy
        ).train.dataset
        dataset = SeededImages(read, 40, transform.transform, 2, seed=index)
        assert not [item for item in (dataset[0, i, 0] for i in range(40)) if isinstance(item, str)]


def test_an_image_that_the_transforms_refuse():
    def refuse(image):
        raise RuntimeError("too small")

    read = Blank()
    read.describe = lambda index: f"photo {index}"
    item = SeededImages(read, 2, refuse, 2, seed=0)[0, 1, 0]
    assert item == "data: the transforms fail for photo 1: too small"
