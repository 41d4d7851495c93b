# SPDX-License-Identifier: MIT
"""Description of a timm ViT as plain JSON: class and constructor arguments, from which it can be built without timm's
registry and without pickle."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import timm.layers
from timm.layers import GluMlp, LayerScale, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import mlp as mlps

CLASSES = {"VisionTransformer": VisionTransformer, "VisionTransformerDistilled": VisionTransformerDistilled}
NORMS = {
    "LayerNorm": timm.layers.LayerNorm,
    "LayerNormFp32": timm.layers.LayerNormFp32,
    "RmsNorm": timm.layers.RmsNorm,
    "RmsNormFp32": timm.layers.RmsNormFp32,
    "torch.LayerNorm": nn.LayerNorm,
    "torch.RMSNorm": nn.RMSNorm,
}
ACTIVATIONS = {
    "GELU": nn.GELU,
    "GELUTanh": timm.layers.GELUTanh,
    "QuickGELU": timm.layers.QuickGELU,
    "timm.GELU": timm.layers.GELU,
    "ReLU": nn.ReLU,
    "SiLU": nn.SiLU,
}
MLPS = {
    "Mlp": timm.layers.Mlp,
    "GluMlp": GluMlp,
    "SwiGLUPacked": timm.layers.SwiGLUPacked,
    "SwiGLU": timm.layers.SwiGLU,
}


def describe(model: nn.Module) -> dict[str, Any]:
    """Class name and constructor arguments of a timm ViT that is not pruned, as plain JSON.

    Raises NotImplementedError, with the name of the part, for a model that cannot be rebuilt from them.
    """
    cls = next(
        c for c in type(model).__mro__ if not c.__module__.startswith("p3b_ext")
    )  # patched models are subclasses
    name = next((key for key, known in CLASSES.items() if cls is known), None)
    _expect(name is not None, "model", f"one of {', '.join(CLASSES)}", model)
    _expect(type(model.patch_embed) is PatchEmbed, "patch_embed", "timm's PatchEmbed", model.patch_embed)
    _expect(model.num_classes > 0, "head", "a classifier", model.head)
    _expect(len(model.blocks) > 0, "blocks", "one or more", model.blocks)
    block = model.blocks[0]
    mlp_layer = "SwiGLUPacked" if _packed(block.mlp) else _key(MLPS, block.mlp, "mlp")
    norm_layer, eps = _norm(block.norm1)
    embed_norm = None if isinstance(model.patch_embed.norm, nn.Identity) else _norm(model.patch_embed.norm)
    hidden = sum(linear.out_features for linear in mlps.readers(block.mlp))
    hidden //= 2 if mlp_layer == "SwiGLU" else 1  # timm's argument is the width of one of its two layers
    has_norm, has_fc_norm = (
        not isinstance(model.norm, nn.Identity),
        not isinstance(model.fc_norm, nn.Identity),
    )
    drop_paths = [getattr(b.drop_path2, "drop_prob", 0.0) or 0.0 for b in model.blocks]
    arguments = {
        "img_size": list(model.patch_embed.img_size or ()),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": _ratio(hidden, model.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "no_embed_class": model.no_embed_class,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": has_norm or has_fc_norm,
        "fc_norm": has_fc_norm,
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": drop_paths[-1],
    }
    if name == "VisionTransformer":
        arguments |= {"class_token": model.cls_token is not None, "reg_tokens": model.num_reg_tokens}
    return {
        "class": name,
        "arguments": arguments,
        "norm_layer": norm_layer,
        "norm_eps": eps,
        "act_layer": _key(ACTIVATIONS, block.mlp.act, "activation"),
        "mlp_layer": mlp_layer,
        "embed_norm": None if embed_norm is None else list(embed_norm),
    }


def build(description: dict[str, Any]) -> VisionTransformer:
    """The model of a description made by `describe`, newly initialised."""
    arguments = dict(description["arguments"])
    for size in ("img_size", "patch_size"):
        arguments[size] = tuple(arguments[size]) or None
    norm_layer = NORMS[description["norm_layer"]]
    if description["norm_eps"] is not None:
        norm_layer = partial(norm_layer, eps=description["norm_eps"])
    cls = CLASSES[description["class"]]
    if description.get("embed_norm"):
        name, eps = description["embed_norm"]
        arguments["embed_norm_layer"] = partial(NORMS[name], eps=eps)
    return cls(
        **arguments,
        norm_layer=norm_layer,
        act_layer=ACTIVATIONS[description["act_layer"]],
        mlp_layer=MLPS[description.get("mlp_layer", "Mlp")],
    )


def _packed(mlp: nn.Module) -> bool:
    return type(mlp) is GluMlp and not mlp.gate_last


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio for which timm's `int(width * ratio)` is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _norm(norm: nn.Module) -> tuple[str, float | None]:
    eps: Any = norm.eps
    return _key(NORMS, norm, "norm"), eps


def _key(known: dict[str, type], module: nn.Module, part: str) -> str:
    name = next((key for key, cls in known.items() if type(module) is cls), "")
    _expect(name != "", part, f"one of {', '.join(known)}", module)
    return name


def _expect(valid: bool, part: str, expected: str, actual: object) -> None:
    if not valid:
        raise NotImplementedError(f"{part} must be {expected}, got {type(actual).__name__}")
