"""Small timm Vision Transformers of every family, with weights far enough from their defaults to tell errors."""

from pathlib import Path

import numpy as np
import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"

FAMILIES: dict[str, dict] = {
    "deit": {},
    "distilled": {"cls": VisionTransformerDistilled},
    "augreg_no_qkv_bias": {"qkv_bias": False, "proj_bias": False},
    "gap": {"class_token": False, "global_pool": "avg"},
    "gap_final_norm": {"global_pool": "avg", "fc_norm": False},
    "avgmax": {"class_token": False, "global_pool": "avgmax"},
    "gap_include_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "map": {"class_token": False, "global_pool": "map"},
    "layer_scale": {"init_values": 0.3},
    "qk_norm": {"qk_norm": True, "norm_layer": RmsNorm},
    "qk_norm_scale_norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "registers_dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3, "mlp_layer": SwiGLUPacked},
    "glu_norm": {"mlp_layer": GluMlp, "scale_mlp_norm": True},
    "aimv2": {
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "qkv_bias": False,
        "proj_bias": False,
        "act_layer": "silu",
        "norm_layer": RmsNorm,
        "embed_norm_layer": RmsNorm,
        "mlp_layer": SwiGLU,
        "mlp_ratio": 2.75,
    },
    "reg4_gap": {"reg_tokens": 4, "class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "dynamic": {"dynamic_img_size": True},
    "res_post": {"block_fn": ResPostBlock, "init_values": 0.3},
}


def vit(cls: type = VisionTransformer, seed: int = 0, **options) -> nn.Module:
    """A 4-block ViT of width 48 on 64-pixel images (64 patches), in eval mode."""
    torch.manual_seed(seed)
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
    model = cls(**(size | options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(std=0.3 if "blocks" in name else 0.5)
            else:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def family(name: str, **options) -> nn.Module:
    return vit(**(FAMILIES[name] | options))


def images(batch: int = 3, size: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def recorded(name: str) -> dict[str, np.ndarray]:
    """A file of tests/golden; a missing one is an error."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def recorded_model(case: dict[str, np.ndarray]) -> nn.Module:
    """The ViT that a recorded case was made with."""
    parameters = {key[6:]: torch.from_numpy(value) for key, value in case.items() if key.startswith("param.")}
    model = vit(VisionTransformerDistilled if "dist_token" in parameters else VisionTransformer)
    model.load_state_dict(parameters)
    return model
