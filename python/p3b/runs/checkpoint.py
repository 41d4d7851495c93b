# SPDX-License-Identifier: MIT
"""Saving and loading models: `model.safetensors` (weights) and `model.json` (a description of the model). No pickle.

`model.json` has the constructor arguments of the dense ViT and the kept channels of every gate, so that a model can be
loaded without the run that made it and without timm's registry of names.
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
from ..models.description import build, describe, describe_again, difference, pretrained_cfg, set_pretrained_cfg
from ..models.token_reduction import KINDS, Reduction, settings_of
from ..pruning.surgery import cut
from ..training.prune import Result

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
FORMAT, VERSION = "p3b", 1


def save(result: Result | nn.Module, folder: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> Path:
    """Writes a model, pruned or not, into a folder, which is created; returns the folder.

    result: the Result of `p3b.prune`, or a model. meta: plain JSON values (preprocessing, data set, accuracy), which
    `read_meta` returns. Both files are written under temporary names and then renamed, the description last: a folder
    with a description is complete. Raises ValueError for a folder that has a model already, ValueError or
    NotImplementedError, before anything is written, for a model that could not be loaded again.
    """
    model = result.model if isinstance(result, Result) else result
    folder = Path(folder)
    if (folder / DESCRIPTION).exists() or (folder / WEIGHTS).exists():
        raise ValueError(f"save: {folder} already has a model; choose another folder or remove it")
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
    except SafetensorError as error:  # safetensors' error for a full disk
        raise OSError(f"save: {folder / WEIGHTS} cannot be written: {error}") from None
    write_atomically(folder / DESCRIPTION, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return folder


def check(model: nn.Module) -> dict[str, Any]:
    """The description that `save` writes: constructor arguments and kept channels, as plain JSON.

    Raises the errors of `save`, so that a model that could not be loaded again is rejected before it is trained.
    """
    kept = getattr(model, "p3b_kept", None)
    dense: Any = None if kept is None else model.p3b_description  # of a pruned model: as before the shrink
    try:
        if dense is not None and "unsupported" in dense:
            raise NotImplementedError(dense["unsupported"])
        dense = describe(model) if dense is None else describe_again(model, dense)
    except NotImplementedError as error:
        raise NotImplementedError(f"save: {error}") from None
    description = {"model": dense, "kept": kept, "reduction": describe_reduction(model)}
    description["pretrained_cfg"] = pretrained_cfg(model)
    with torch.device("meta"):
        weights = {name: weight.to("meta") for name, weight in model.state_dict().items()}
        rebuilt = _skeleton(json.loads(json.dumps(description)))
        _load_weights(rebuilt, weights, "save")
    changed = difference(model, rebuilt)
    if changed:
        raise NotImplementedError(f"save: a loaded model would differ: {changed}")
    return description


def update_meta(folder: str | os.PathLike[str], **changes: Any) -> None:
    """Replaces entries of the `meta` of a saved model."""
    folder = Path(folder)
    description = _read(folder)
    text = _text(description | {"meta": (description.get("meta") or {}) | changes})
    write_atomically(folder / DESCRIPTION, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def load(folder: str | os.PathLike[str]) -> VisionTransformer:
    """Loads a model from its folder, in eval mode on the CPU, with p3b_ext's attention and the token reduction that it
    was trained with, if any (`p3b_ext.unpatch` restores timm's). `timm.data.resolve_model_data_config(model)` gives the
    normalisation, size and crop of its images.

    Raises a one-line ValueError for a folder without a model, and for files that are incomplete or do not match.
    """
    folder = Path(folder)
    description = _read(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ValueError(f"load: {folder} has no {WEIGHTS}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load: {folder / WEIGHTS} cannot be read: {error}") from None
    with torch.random.fork_rng([]):  # initialising the weights must not advance the caller's generator
        model = _skeleton(description)
    _load_weights(model, weights, "load")
    set_pretrained_cfg(model, description.get("pretrained_cfg") or _normalisation(description))
    p3b_ext.patch(model.eval(), _reduction(description.get("reduction")))
    return model


def _normalisation(description: dict[str, Any]) -> dict[str, Any]:
    """The `pretrained_cfg` of a run that was saved without one."""
    data = (description.get("meta") or {}).get("data")
    return {key: data[key] for key in ("mean", "std") if data.get(key)} if isinstance(data, dict) else {}


def describe_reduction(model: nn.Module) -> dict[str, Any] | None:
    """The token reduction that a model is patched with, as plain JSON; None where it keeps all tokens."""
    reduction = p3b_ext.current_reduction(model)
    if reduction is None:
        return None
    # JSON has no tuples, and ToMe's r means (r, inflection) as a tuple and one r per block as a list.
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
        if "unit" in values:  # the former name of criterion, in models saved by earlier versions
            values["criterion"] = values.pop("unit")
        return kinds[description["name"]](**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"load: the token reduction in {DESCRIPTION} is invalid: {problem}") from None


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `meta` of a saved model."""
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
        raise ValueError(f"load: {folder} has no {DESCRIPTION}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path} cannot be read as JSON: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"load: {path} is not the description of a p3b model")
    if description.get("version") != VERSION:
        raise ValueError(f"load: {path} has version {description.get('version')!r}; this p3b reads version {VERSION}")
    return description


def _skeleton(description: dict[str, Any]) -> VisionTransformer:
    try:
        model = build(description["model"])
        if description["kept"] is not None:
            cut(model, description["kept"])
        model.p3b_description = description["model"]
    except (KeyError, TypeError, ValueError, AssertionError, IndexError, RuntimeError, ZeroDivisionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"load: the model in {DESCRIPTION} is not a valid timm ViT: {problem}") from None
    return model


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], op: str) -> None:
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"{op}: the weights do not fit the described model: {detail}") from None
