"""Calls of the compiled ops and their gradients: registered with the dispatcher, and once more for torch.func.

torch.func.{grad, vjp, jacrev, vmap} refuse the autograd.Function that torch.library.register_autograd generates, and
forward-mode AD ignores it and gives a zero tangent. While one of them is active, `call` uses a Function of ours.
"""

import functools
from collections.abc import Callable

import torch

from .. import reference
from ..backends import FAMILIES
from ..torch_private import below_autograd, differentiating_transform, forward_mode, transforms_active

_FUNCTIONS: dict[tuple[str, str], type[torch.autograd.Function]] = {}
_EAGER: dict[tuple[str, str], type[torch.autograd.Function]] = {}


def register_gradient(namespace: str, op: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """torch.library.register_autograd for `namespace::op`, and what `call` needs of it."""
    torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=setup_context)
    function = getattr(getattr(torch.ops, namespace), op)

    def jvp(ctx, *tangents):
        raise _no_forward_mode(op)

    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *args: function(*args)),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
    }
    _FUNCTIONS[namespace, op] = type(op, (torch.autograd.Function,), members)

    def forward(ctx, *args):
        with below_autograd():
            output = function.default(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _EAGER[namespace, op] = type(op, (torch.autograd.Function,), members)


def call(namespace: str, op: str, *args):
    """`torch.ops.<namespace>.<op>(*args)`, differentiable under function transforms too."""
    if torch.compiler.is_compiling():  # the tracer handles reverse mode; what it cannot trace here runs eagerly
        if forward_mode() and (namespace, op) in _FUNCTIONS:
            raise _no_forward_mode(op)
        return getattr(getattr(torch.ops, namespace), op)(*args)
    if differentiating_transform():
        if (namespace, op) in _FUNCTIONS:
            return _FUNCTIONS[namespace, op].apply(*args)
    elif not torch.is_grad_enabled():  # without the registered gradient, whose Python costs as much as a small call
        with below_autograd():
            return _overload(namespace, op)(*args)
    elif (namespace, op) in _EAGER and not (transforms_active() or torch.jit.is_tracing()):
        # the same gradient without torch.library's wrapper, whose Python costs as much as a small call
        return _EAGER[namespace, op].apply(*args)
    return _overload(namespace, op)(*args)


def run(backend: str, family: str, op: str, *args):
    """Call `op`, with the signature of csrc/library.cpp, on `backend`. What a compiled kernel raises for a value
    ("<op>: <argument> must be ...") is a ValueError; it comes through the stable ABI as a RuntimeError (a ValueError
    already in torch 2.11), and stays one inside a compiled graph."""
    if backend == "reference":
        return getattr(reference, op)(*args)
    if backend != "cpu" or torch.compiler.is_compiling():
        return call("p3b_ext_triton" if backend == "triton" else "p3b_ext", op, *args)
    try:
        return call("p3b_ext", op, *args)
    except RuntimeError as error:
        sentence = str(error).splitlines()[0]
        if " must " in sentence and sentence.split(":")[0] in FAMILIES[family]:
            raise ValueError(sentence) from None
        raise


@functools.cache
def _overload(namespace: str, op: str) -> Callable:
    """The op itself: `torch.ops.<namespace>.<op>` would look for the right overload in every call."""
    return getattr(getattr(torch.ops, namespace), op).default


def _no_forward_mode(op: str) -> NotImplementedError:
    op = op.removesuffix("_backward").removesuffix("_packed")
    return NotImplementedError(
        f"{op}: forward-mode derivatives are not implemented by the fused kernels; "
        'compute under p3b_ext.backend("reference"), which has them'
    )
