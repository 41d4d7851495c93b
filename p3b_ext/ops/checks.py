"""Argument checks that the three families share: "<op>: <argument> must be <expected>, got <actual>"."""

import operator
from numbers import Real

import torch
from torch import Tensor

from ..backends import DTYPES

MOST_TOKENS = 2**31 - 1  # slots are int32


def check_tensor(op: str, name: str, x: Tensor, letters: str, like: Tensor | None = None) -> None:
    """x must be a floating-point tensor with one axis per word of `letters`, on the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor [{letters}], got {type(x).__name__}")
    check_dense(op, name, x)
    if x.dim() != len(letters.split()):
        raise ValueError(f"{op}: {name} must be [{', '.join(letters.split())}], got shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    check_device(op, name, x, like)


def check_dense(op: str, name: str, x: Tensor) -> None:
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}; convert it with .to_dense() or pad it")


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
    check_dense(op, name, x)
    check_shape(op, name, x, shape)
    check_device(op, name, x, like)


def check_int(op: str, name: str, value: int, low: int, high: int | None = None) -> int:
    """value as an int; it must be one (or have __index__, as NumPy's have) in [low, high]."""
    if isinstance(value, Tensor) and torch.jit.is_tracing():  # where sizes are tensors; traced, they are constants
        value = int(value)
    if isinstance(value, bool | Tensor):  # a tensor's would be read back from its device
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not isinstance(value, int | torch.SymInt):  # index() would make a SymInt a constant
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}") from None
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{op}: {name} must be {bound}, got {value}")
    return value


def check_number(op: str, name: str, value: float) -> float:
    """value as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat | Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def second_derivative(op: str):
    """A backward for backward ops: the fused kernels are differentiable once."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{op}: second derivatives are not implemented by the fused kernels; "
            'compute under p3b_ext.backend("reference"), which has them'
        )

    return backward
