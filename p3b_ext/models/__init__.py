"""What p3b_ext knows of the model families that it patches: one file each, the only ones that know their classes
(beside modules.py, whose Attention is a subclass of timm's).

A family is a module with the functions of vision_transformer.py. All models have `blocks`, `num_prefix_tokens` and
`patch_embed.num_patches`.
"""

from types import ModuleType

from torch import nn

from . import vision_transformer

FAMILIES = (vision_transformer,)


def family_of(op: str, model: nn.Module, remedy: str = "") -> ModuleType:
    """The family that a model belongs to; NotImplementedError for any other model."""
    for family in FAMILIES:
        if family.knows(model):
            return family
    raise NotImplementedError(f"{op}: model must be a timm VisionTransformer, got {type(model).__name__}{remedy}")
