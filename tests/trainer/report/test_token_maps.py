"""Pictures of tokens."""

import numpy as np
import pytest
import torch
from vits import family, vit

import p3b
import p3b_ext
from p3b.report import token_maps


@pytest.mark.parametrize("model", ["vit", "gap", "registers_dinov2", "pruned"])
def test_panels_show_the_final_tokens(model, saved_run, pictures):
    if model == "pruned":
        model = p3b.load(saved_run)
    else:
        model = vit() if model == "vit" else family(model)
    score = "cls_value" if model.has_class_token else "received"
    p3b_ext.patch(model, p3b_ext.TopK(keep_rate=0.5, blocks=(0, 2), score=score), trace=True)
    picture, image = token_maps.prepare(pictures / "wide.png", model, (0.5,) * 3, (0.2,) * 3)
    assert image.shape[2:] == model.patch_embed.img_size == picture.size[::-1]
    panels = token_maps.panels(model, picture, image)
    patches = model.patch_embed.num_patches
    counts = [patches, patches // 2, patches // 4]
    titles = [f"block {b}: {k} tokens, {patches - k} patches pruned" for b, k in zip((0, 2), counts[1:], strict=True)]
    assert [title for title, _ in panels] == [f"{patches} patches", *titles]
    rows, columns = model.patch_embed.grid_size
    whole = panels[0][1]
    for (_, drawn), count in zip(panels, counts, strict=True):
        squares = (drawn == whole).reshape(rows, drawn.shape[0] // rows, columns, drawn.shape[1] // columns, 3)
        inside = squares[:, :-1, :, :-1].all((1, 3, 4))  # without the outlines at the right and lower edges
        assert inside.sum() == count


def test_a_picture_is_scaled_and_cropped_as_it_is_normalised(pictures):
    model = vit()
    picture, image = token_maps.prepare(pictures / "tall.jpg", model, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    expected = torch.stack([(pixels[0] - 0.5) / 0.5, (pixels[1] - 0.25) / 0.5, pixels[2]])
    torch.testing.assert_close(image[0], expected)
    grey = vit(in_chans=1)
    picture, image = token_maps.prepare(pictures / "tall.jpg", grey, (0.5,), (0.5,))
    torch.testing.assert_close(image[0, 0], (torch.from_numpy(np.array(picture))[..., 0] / 255 - 0.5) / 0.5)
