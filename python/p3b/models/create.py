# SPDX-License-Identifier: MIT
"""Models by name: timm's ViTs and DeiTs, with pretrained weights, weights from a file, or random ones."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules, load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

import p3b_ext

MODULES = ("vision_transformer", "deit")  # of timm.models
HEADS = ("head.", "head_dist.")


def check_model_name(name: str) -> None:
    """Raises ValueError, with similar names, unless the name is that of a ViT or DeiT in timm."""
    if timm.is_model(name):
        if is_model_in_modules(name.split(".")[0], MODULES):
            try:
                timm.get_pretrained_cfg(name)
            except RuntimeError:
                tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "none"
                raise ValueError(f"model: timm has no pretrained weights {name!r}; it has {tags}") from None
            return
        raise ValueError(f"model: name must be one of timm's plain ViTs or DeiTs, got {name!r}")
    known = [model for module in MODULES for model in timm.list_models(module=module)]
    near = difflib.get_close_matches(name.split(".")[0], known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"model: name must be one that timm knows or the folder of a run, got {name!r}{hint}")


def create_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int,
    img_size: int | tuple[int, int],
    pretrained: bool = True,
    checkpoint: str = "",
    arguments: dict[str, Any] | None = None,
) -> VisionTransformer:
    """A timm ViT with a head for `num_classes` classes and p3b_ext's attention.

    pretrained: load timm's pretrained weights, downloaded once. checkpoint: load this .safetensors or PyTorch file
    instead; a head of another size is not loaded. arguments: further arguments of the model's constructor.

    Raises ValueError for a model that is not a ViT or has no weights, and for a checkpoint that does not fit.
    """
    arguments = dict(arguments or {}) | dict(num_classes=num_classes, in_chans=in_chans)
    download = pretrained and not checkpoint
    try:
        created = timm.create_model(name, pretrained=download, img_size=img_size, **arguments)
    except (ValueError, TypeError, NotImplementedError, OSError, RuntimeError, AttributeError, AssertionError) as error:
        remedy = "; --checkpoint FILE or --no-pretrained needs no download" if download else ""
        raise ValueError(f"model: {name} cannot be built: {error}{remedy}") from error
    model = as_vit(name, created)
    if 0 in model.patch_embed.grid_size:
        patch = " x ".join(str(edge) for edge in model.patch_embed.patch_size)
        size = " x ".join(str(edge) for edge in model.patch_embed.img_size)
        raise ValueError(f"img_size: {size} pixels are less than one patch ({patch})")
    if checkpoint:
        load_weights(model, checkpoint)
    p3b_ext.patch(model)
    return model


def as_vit(name: str, model: nn.Module) -> VisionTransformer:
    """The model of a name, as timm made it. Raises ValueError unless it is a VisionTransformer."""
    if not isinstance(model, VisionTransformer):
        kind = type(model).__name__
        raise ValueError(f"model: {name} must be one of timm's VisionTransformers (ViT, DeiT), got a {kind}")
    return model


def new_head(model: VisionTransformer, num_classes: int, seed: int) -> None:
    """Replaces the classifier of a model, pruned or not, by a newly initialised one, in place."""
    torch.manual_seed(seed)
    model.reset_classifier(num_classes)


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a weights file into a timm ViT, without a head of another size. ValueError for a file that does not fit."""
    try:
        weights = checkpoint_filter_fn(load_state_dict(path, weights_only=True), model)
    except Exception as error:  # safetensors, zipfile and torch raise different errors for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"checkpoint: {path} cannot be read: {reason}") from error
    own = model.state_dict()
    for name in [name for name in weights if name.startswith(HEADS)]:
        if name in own and own[name].shape != weights[name].shape:
            del weights[name]
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit the model: {error}") from error
    missing = [name for name in missing if not name.startswith(HEADS)]
    if missing or unexpected:
        names = ", ".join([*missing, *unexpected][:4])
        raise ValueError(f"checkpoint: {path} does not fit the model: missing or unknown {names}")
