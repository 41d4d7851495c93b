# SPDX-License-Identifier: MIT
"""Description of a timm ViT as plain JSON: class and constructor arguments, from which it can be built without timm's
registry and without pickle."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import timm.layers
from timm.layers import DropPath, GluMlp, LayerScale, PatchDropout, PatchEmbed
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
DROPS = (nn.Identity, nn.Dropout, DropPath, PatchDropout)  # of no effect in eval mode
COMPARED = {
    "eps",
    "scale",
    "num_heads",
    "head_dim",
    "attn_dim",
    "normalized_shape",
    "num_prefix_tokens",
    "num_reg_tokens",
}
COMPARED |= {
    "has_class_token",
    "global_pool",
    "pool_include_prefix",
    "no_embed_class",
    "dynamic_img_size",
    "dynamic_img_pad",
}
COMPARED |= {
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "flatten",
    "gate_last",
    "approximate",
    "num_classes",
}
WEIGHT_FIELDS = {
    "url",
    "file",
    "state_dict",
    "custom_load",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
}  # of pretrained_cfg


def describe(model: nn.Module) -> dict[str, Any]:
    """Class name and constructor arguments of a timm ViT that is not pruned, as plain JSON.

    Raises NotImplementedError, with the name of the part, for a model that cannot be rebuilt from them.
    """
    cls = _unpatched_class(model)
    name = next((key for key, known in CLASSES.items() if cls is known), None)
    _expect(name is not None, "model", f"one of {', '.join(CLASSES)}", model)
    _expect(type(model.patch_embed) is PatchEmbed, "patch_embed", "timm's PatchEmbed", model.patch_embed)
    _expect(len(model.blocks) > 0, "blocks", "one or more", model.blocks)
    block = model.blocks[0]
    mlp_layer = "SwiGLUPacked" if _packed(block.mlp) else _key(MLPS, block.mlp, "mlp")
    norm_layer, eps = _norm(block.norm1)
    embed_norm = None if isinstance(model.patch_embed.norm, nn.Identity) else _norm(model.patch_embed.norm)
    hidden = sum(linear.out_features for linear in mlps.readers(block.mlp))
    hidden //= 2 if mlp_layer == "SwiGLU" else 1  # timm's argument is the width of one of its two layers
    drop_paths = [getattr(b.drop_path2, "drop_prob", 0.0) or 0.0 for b in model.blocks]
    arguments = _around_blocks(model) | {
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
        "proj_drop_rate": _rate(block.attn.proj_drop),
        "attn_drop_rate": _rate(block.attn.attn_drop),
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


def describe_again(model: nn.Module, description: dict[str, Any]) -> dict[str, Any]:
    """The description of a pruned model, whose blocks are those of `description`, as it is now: classifier, pooling
    and input size may be others."""
    return description | {"arguments": description["arguments"] | _around_blocks(model)}


def _around_blocks(model: nn.Module) -> dict[str, Any]:
    """The constructor arguments of everything but the blocks, which the model has also when it is pruned."""
    _expect(model.num_classes > 0, "head", "a classifier", model.head)
    has_norm, has_fc_norm = (not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm))
    return {
        "img_size": list(model.patch_embed.img_size or ()),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "no_embed_class": model.no_embed_class,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": has_norm or has_fc_norm,
        "fc_norm": has_fc_norm,
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        "drop_rate": _rate(model.head_drop),
        "pos_drop_rate": _rate(model.pos_drop),
    }


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model as plain JSON, without the source of its weights; input size and number of
    classes are the model's own."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    cfg = dict(cfg if isinstance(cfg, dict) else cfg.to_dict())
    cfg["num_classes"] = model.num_classes
    if model.patch_embed.img_size is not None:
        cfg["input_size"] = [model.patch_embed.proj.in_channels, *model.patch_embed.img_size]
    if len(cfg.get("label_names") or ()) != model.num_classes:  # those of an earlier classifier
        cfg.pop("label_names", None)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()}
    return {key: value for key, value in plain.items() if key not in WEIGHT_FIELDS and _is_json(value)}


def set_pretrained_cfg(model: nn.Module, cfg: dict[str, Any]) -> None:
    """Gives a model a `pretrained_cfg` read from JSON, as timm's models have it."""
    model.pretrained_cfg = model.default_cfg = {
        key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()
    }


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def difference(model: nn.Module, rebuilt: nn.Module) -> str:
    """The first module of a model that is not as in the model built from its description, in eval mode: of another
    class, or with another value of an attribute that logits depend on (COMPARED); "" where there is none."""
    modules, others = dict(model.named_modules()), dict(rebuilt.named_modules())
    for name, module in modules.items():
        where, other = name or "the model", others.get(name)
        if "forward" in vars(module):
            return f"{where} has a forward of its own, set on the instance"
        if other is None:
            return f"{where} is an additional module, a {type(module).__name__}"
        if isinstance(module, DROPS) and isinstance(other, DROPS):
            continue
        cls, expected = _unpatched_class(module), _unpatched_class(other)
        if cls is not expected:
            return f"{where} is a {cls.__name__}, where its description gives a {expected.__name__}"
        for key in vars(module).keys() & vars(other).keys() & COMPARED:
            value, wanted = vars(module)[key], vars(other)[key]
            if value != wanted:
                return f"{where} has {key}={value!r}, where its description gives {wanted!r}"
    return ""


def _rate(dropout: nn.Module) -> float:
    rate: Any = getattr(dropout, "p", 0.0)  # of an Identity: 0
    return rate


def _unpatched_class(module: nn.Module) -> type:
    """A patched module is of a subclass that p3b_ext makes."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("p3b_ext"))


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
