"""Which modules may be taken apart: those of a class that is known exactly, and whose forward and weights are its own.

Replacing a module's class, or computing with its weights, throws away what a subclass, a wrapper or a hook adds: the
branch of a LoRA, a parametrization, an adapter. `check_exact` is the one rule; `patch` and p3b's gates ask it.
"""

from torch import nn

from .linear import OneDnnLinear

OWN_TENSORS = {"weight", "bias", "gamma"}  # names of the tensors of Linear, norms and LayerScale
REMEDIES = {  # what the class or a tensor of a changed module is called -> how it becomes an ordinary one again
    "lora": "merge the LoRA weights first (PEFT: model = model.merge_and_unload())",
    "parametrized": "remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)",
    "weight_g": "remove the weight norm first (torch.nn.utils.remove_weight_norm)",
    "weight_mask": "make the pruning permanent first (torch.nn.utils.prune.remove)",
    "weight_u": "remove the spectral norm first (torch.nn.utils.remove_spectral_norm)",
}


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without `patch`."""
    cls = type(module)
    cls = getattr(cls, "_p3b_base", cls)
    return nn.Linear if cls is OneDnnLinear else cls


def check_exact(op: str, name: str, module: nn.Module, *known: type) -> None:
    """NotImplementedError, with the part's name and the remedy, unless a module is of exactly one of the classes
    `known` and unchanged.

    A patched module counts as one of the class that it had before. Refused are subclasses and wrappers, a `forward` set
    on the instance (accelerate's hooks do), and weights that are computed from other tensors (weight norm, spectral
    norm, torch.nn.utils.prune, parametrizations).
    """
    cls, tensors = class_of(module), {**module._parameters, **module._buffers}
    changed = next((name for name in tensors if name not in OWN_TENSORS), "")
    kinds = ", ".join(dict.fromkeys(each.__name__ for each in known))
    if cls not in known:
        bases = [each for each in known if issubclass(cls, each)]
        what = f"is of class {cls.__name__}" + (f", a subclass of {bases[0].__name__}" if bases else "")
        what += f"; supported: {kinds}"
    elif "forward" in vars(module):
        what = f"has a forward of its own, set on the instance; supported: that of {kinds}"
    elif changed and not list(module.children()):
        what = f"computes its weights from {changed}"
    else:
        return
    hint = " ".join([cls.__module__, cls.__name__, *tensors, *dict(module.named_children())]).lower()
    remedy = next((text for key, text in REMEDIES.items() if key in hint), "")
    raise NotImplementedError(f"{op}: {name} {what}" + (f"; {remedy}" if remedy else ""))


def check_unshared(op: str, modules: dict[str, nn.Module]) -> None:
    """NotImplementedError, with both names, where two of the named modules, or two of their own parameters, are one."""
    seen: dict[int, str] = {}
    for name, module in modules.items():
        parts = {name: module} | {f"{name}.{key}": p for key, p in module._parameters.items() if p is not None}
        for where, part in parts.items():
            first = seen.setdefault(id(part), where)
            if first != where:
                kind = "module" if isinstance(part, nn.Module) else "parameter"
                remedy = "give each block a copy of its own (copy.deepcopy)"
                raise NotImplementedError(f"{op}: {first} and {where} are one {kind}; {remedy}")
