"""Token reductions of a model by name."""

import pytest
import torch
from vits import family, vit

import p3b_ext
from p3b.models import token_reduction as reductions


def test_settings_scale_with_the_model():
    deit = vit(img_size=112, depth=12)
    assert deit.patch_embed.num_patches == 196
    assert reductions.create_reduction("tome", deit) == p3b_ext.ToMe(13)
    ppt = reductions.create_reduction("ppt", deit)
    assert (ppt.r, ppt.blocks, ppt.score, ppt.criterion) == (50, (3, 6, 9), "cls_value", "cv2")
    assert reductions.create_reduction("evit", deit) == p3b_ext.EViT(0.7, (3, 6, 9))
    assert reductions.create_reduction("topk", deit) == p3b_ext.TopK(0.7, (3, 6, 9))
    small = vit()  # 64 patches, 4 blocks
    assert reductions.create_reduction("tome", small).r == 13 and reductions.create_reduction("ppt", small).blocks == (
        1,
        2,
        3,
    )
    assert reductions.create_reduction("tome", small, r=2, blocks=[1, 3]).r == [0, 2, 0, 2]
    assert reductions.create_reduction("ppt", small).r == 16


def test_the_published_threshold_in_both_units():
    # 7e-5 on the variance of 196 scores decides as its squared coefficient of variation does.
    scores = torch.rand(64, 196, dtype=torch.float64) ** torch.linspace(0, 8, 64)[:, None]
    scores /= scores.sum(1, keepdim=True)
    by_variance = scores.var(1) >= 7e-5
    assert by_variance.any() and not by_variance.all()
    assert torch.equal(by_variance, scores.var(1) * 196**2 >= reductions.PPT_CV2)


def test_without_a_class_token():
    model = family("gap")
    with pytest.raises(ValueError, match="EViT: score must be one of"):
        p3b_ext.patch(model, reductions.create_reduction("evit", model))
    chosen = reductions.create_reduction("ppt", model)
    assert chosen.score == "received" and chosen.threshold is None
    x = torch.randn(8, 3, 64, 64)
    found = reductions.apply(model, chosen, [x], trace=True)
    model(x)
    pruned = (p3b_ext.token_map(model, found.blocks[0]) < 0).any(1)
    assert found.threshold > 0 and 0 < pruned.sum() < 8
