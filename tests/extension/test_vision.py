"""draw_tokens: merged patches in one colour, pruned ones dark, single ones untouched."""

import numpy as np
import pytest
import torch
from PIL import Image
from vits import images, vit

from p3b_ext.patch import patch, token_map
from p3b_ext.reduction import PPT
from p3b_ext.vision import DARK, OUTLINE, draw_tokens


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def test_a_small_grid(picture):
    # Patches: 0 and 1 share a token, 2 is pruned, 3 is alone; the class token is in front.
    drawn = draw_tokens(picture, torch.tensor([0, 1, 1, -1, 2]))
    top, pruned, alone = drawn[:19], drawn[20:, :19], drawn[21:, 20:]
    assert (top == picture[:20].reshape(-1, 3).mean(0).round().astype(np.uint8)).all()
    assert (drawn[19] == OUTLINE).all()
    assert (pruned == (DARK * picture[20:, :19]).round()).all()
    assert (alone == picture[21:, 20:]).all()


def test_kinds_of_images(picture):
    slot = torch.tensor([0, 1, 1, 1, -1, 2])
    expected = draw_tokens(picture, slot, num_prefix=0, grid=(2, 3))
    floats = torch.from_numpy(picture).permute(2, 0, 1) / 255
    for image in (Image.fromarray(picture), torch.from_numpy(picture), floats, floats.numpy()):
        difference = draw_tokens(image, slot, num_prefix=0, grid=(2, 3)).astype(int) - expected
        assert abs(difference).max() <= 1


def test_a_traced_model():
    model, x = patch(vit(), PPT(r=20, blocks=(0, 2), threshold=0.0), trace=True), images()
    with torch.no_grad():
        model(x)
    for image, slot in zip(x.sigmoid(), token_map(model), strict=True):
        drawn = draw_tokens(image, slot, num_prefix=model.num_prefix_tokens)
        dropped = int((slot < 0).sum())
        assert dropped == 40
        dark = drawn.reshape(8, 8, 8, 8, 3).max((1, 3, 4)) <= round(DARK * 255)
        assert dark.sum() >= dropped - 1


def test_bad_input(picture):
    for call, text in [
        (lambda: draw_tokens(picture[..., :2], torch.arange(5)), r"draw_tokens: image must be \[H, W, 3\]"),
        (lambda: draw_tokens(picture, torch.arange(7)), "draw_tokens: slot must hold a square number of patches"),
        (lambda: draw_tokens(picture, torch.arange(7), grid=(2, 2)), "draw_tokens: slot must hold 2 x 2 = patches"),
        (lambda: draw_tokens(picture, torch.zeros(2, 5)), r"draw_tokens: slot must be \[N\]"),
        (lambda: draw_tokens(picture[:3], torch.arange(26)), "draw_tokens: image must have at least 5 x 5 pixels"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
