"""Argument checks that the three families share: "<op>: <argument> must be <expected>, got <actual>"."""

import torch
from torch import Tensor

from ..backends import DTYPES


def check_tensor(op: str, name: str, x: Tensor, letters: str, like: Tensor | None = None) -> None:
    """x must be a floating-point tensor with one axis per word of `letters`, on the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor [{letters}], got {type(x).__name__}")
    if x.dim() != len(letters.split()):
        raise ValueError(f"{op}: {name} must be [{', '.join(letters.split())}], got shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    check_device(op, name, x, like)


def check_device(op: str, name: str, x: Tensor, like: Tensor | None) -> None:
    if like is not None and x.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {like.device}, got {x.device}; move it with .to({str(like.device)!r})"
        )


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(x.shape)}")


def check_bool(op: str, name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a bool tensor, got {type(x).__name__}")
    if x.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must have dtype torch.bool, got {x.dtype}")
    check_shape(op, name, x, shape)
    check_device(op, name, x, like)


def check_int(op: str, name: str, value: int, low: int, high: int | None = None) -> None:
    """value must be an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{op}: {name} must be {bound}, got {value}")


def second_derivative(op: str):
    """A backward for backward ops: the fused kernels are differentiable once."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{op}: second derivatives are not implemented by the fused kernels; "
            'compute under p3b_ext.backend("reference"), which has them'
        )

    return backward
