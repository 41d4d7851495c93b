# SPDX-License-Identifier: MIT
"""A pruned model on disk: `model.safetensors` (weights) and `model.json` (how to build what they belong to).
No pickle.

`model.json` describes the whole ViT by its constructor's arguments and lists the kept channels of every gate,
so a folder can be read without the run that made it and without timm's registry of names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import p3b_ext

from ..files import write_atomically
from ..models.description import build, describe
from ..models.token_reduction import KINDS, Reduction, settings_of
from ..pruning.surgery import cut
from ..training.prune import Result

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
FORMAT, VERSION = "p3b", 1


def save(result: Result | nn.Module, folder: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> Path:
    """Writes a pruned (or whole) model into a folder, which it makes; returns the folder.

    result: what `p3b.prune` returned, or a model. meta: anything JSON-able (preprocessing, data set,
    accuracy), given back by
    `read_meta`. Both files are written under other names and then renamed, the description last: a folder
    that has one is complete. Raises ValueError when the folder already holds a model, and before anything is
    written when the model could not be read back.
    """
    model = result.model if isinstance(result, Result) else result
    folder = Path(folder)
    if (folder / DESCRIPTION).exists() or (folder / WEIGHTS).exists():
        raise ValueError(f"save: folder must not hold a model yet, got {folder}; choose another name or remove it")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save: folder must be a folder, got the file {folder}")
    description = {"format": FORMAT, "version": VERSION, **check(model), "meta": meta or {}}
    if isinstance(result, Result):
        description |= {"config": result.config.to_dict(), "summary": result.summary}
    text = _text(description)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path))
    except SafetensorError as error:  # a full disk is no OSError here
        raise OSError(f"save: {folder / WEIGHTS} must be writable, got {error}") from None
    write_atomically(folder / DESCRIPTION, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return folder


def check(model: nn.Module) -> dict[str, Any]:
    """How `save` will describe the model: constructor arguments and kept channels, as plain JSON.

    Raises what `save` would raise, so that a model which could not be read back is refused before it is trained.
    """
    try:
        whole = getattr(model, "p3b_description", None) or describe(model)
    except NotImplementedError as error:
        whole = {"unsupported": str(error)}
    if "unsupported" in whole:
        raise NotImplementedError(f"save: {whole['unsupported']}")
    description = {"model": whole, "kept": getattr(model, "p3b_kept", None), "reduction": describe_reduction(model)}
    with torch.device("meta"):
        weights = {name: weight.to("meta") for name, weight in model.state_dict().items()}
        _load_weights(_skeleton(json.loads(json.dumps(description))), weights, "save")
    return description


def update_meta(folder: str | os.PathLike[str], **changes: Any) -> None:
    """Replaces entries of what was given to `save` as `meta`; the weights stay as they are."""
    folder = Path(folder)
    description = _read(folder)
    text = _text(description | {"meta": (description.get("meta") or {}) | changes})
    write_atomically(folder / DESCRIPTION, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def load(folder: str | os.PathLike[str]) -> VisionTransformer:
    """Reads a model back from its folder, in eval mode on the CPU, with p3b_ext's attention and the token reduction
    that it was trained under, if any (`p3b_ext.unpatch` gives timm's back).

    Raises ValueError, in one line, for a folder without a model and for files that are cut short or do not
    belong together.
    """
    folder = Path(folder)
    description = _read(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ValueError(f"load: folder must hold {WEIGHTS}, got {folder} without it") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load: {folder / WEIGHTS} must be a whole safetensors file, got a broken one ({error})"
        ) from None
    with torch.random.fork_rng([]):  # building draws fresh weights; the caller's generator stays where it was
        model = _skeleton(description)
    _load_weights(model, weights, "load")
    p3b_ext.patch(model.eval(), _reduction(description.get("reduction")))
    return model


def describe_reduction(model: nn.Module) -> dict[str, Any] | None:
    """The token reduction that a model is patched with, as plain JSON; None where it keeps all tokens."""
    reduction = p3b_ext.current_reduction(model)
    if reduction is None:
        return None
    # JSON has no tuples, and ToMe's (r, inflection) is one where a list is something else
    values = {
        key: {"tuple": list(value)} if isinstance(value, tuple) else value
        for key, value in settings_of(reduction).items()
    }
    return {"name": type(reduction).__name__, **values}


def _reduction(description: dict[str, Any] | None) -> Reduction | None:
    if description is None:
        return None
    kinds = {kind.__name__: kind for kind in KINDS.values()}
    try:
        values: dict[str, Any] = {
            key: tuple(value["tuple"]) if isinstance(value, dict) else value
            for key, value in description.items()
            if key != "name"
        }
        if "unit" in values:  # PPT's name for its criterion in models saved before it was called that
            values["criterion"] = values.pop("unit")
        return kinds[description["name"]](**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"load: {DESCRIPTION} must describe a token reduction, got {problem}") from None


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What was given to `save` as `meta`."""
    return _read(Path(folder)).get("meta") or {}


def _text(description: dict[str, Any]) -> str:
    try:
        return json.dumps(description, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save: meta must be plain JSON values, got {error}") from None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"load: folder must hold {DESCRIPTION}, got {folder} without it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path} must be whole JSON, got a broken file ({error})") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"load: {path} must describe a p3b model, got something else")
    if description.get("version") != VERSION:
        raise ValueError(f"load: {path} must have version {VERSION}, got {description.get('version')!r}")
    return description


def _skeleton(description: dict[str, Any]) -> VisionTransformer:
    try:
        model = build(description["model"])
        if description["kept"] is not None:
            cut(model, description["kept"])
        model.p3b_description = description["model"]
    except (KeyError, TypeError, ValueError, AssertionError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"load: {DESCRIPTION} must describe a timm ViT, got {type(error).__name__}: {error}") from None
    return model


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], op: str) -> None:
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"{op}: weights must fit the described model, got {detail}") from None
