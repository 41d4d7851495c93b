# SPDX-License-Identifier: MIT
"""The TOML file of a comparison (methods, data, settings), and the jobs that it defines."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import METHODS, RECIPES, Config, recipes

SOURCE, DENSE = "source", "dense"  # names of jobs without pruning
COMPARISONS = RECIPES / "compare"
TRAINER = [field.name for field in dataclasses.fields(Config)]


@dataclass
class Stage:
    """Images and settings of one stage."""

    data: str = ""
    """Image folder, .npz file (x_train, y_train, x_test, y_test), "digits" or a name for timm's create_dataset; on the
    command line --source and --data."""
    train_images: int = 0
    """Number of training images of an array data set that are used, the first ones; 0: all."""
    classes: list = field(default_factory=list)
    """Use only the images of an array data set with these labels."""
    shift: int | None = None
    """Largest random shift of training images in pixels; default: that of the data set."""
    flip: bool | None = None
    """Flip a random half of the training images; default: that of the data set."""
    augment: str = "light"
    """Augmentation of training images: none, light or strong (image files)."""
    epochs: int = 0
    """Epochs of the source stage. (The target stage has final_epoch + finetune_epochs of [trainer].)"""
    trainer: dict = field(default_factory=dict)
    """[source.trainer]: settings of p3b.Config for the source stage, for which [trainer] is not used."""


@dataclass
class Task:
    """Methods, data and settings of a comparison: the keys of its TOML file."""

    title: str = ""
    """Title of the table."""
    model: str = "vit_tiny_patch16_224"
    """timm's name of a ViT or DeiT."""
    model_kwargs: dict = field(default_factory=dict)
    """Constructor arguments of the model: depth, embed_dim, patch_size, ..."""
    pretrained: bool = False
    """Start from timm's pretrained weights, also in a [source] stage."""
    checkpoint: str = ""
    """Start from this .safetensors or PyTorch weights file instead."""
    img_size: int = 224
    """Edge of the images in pixels."""
    batch_size: int = 64
    """Images per training step."""
    workers: int = 0
    """Image-decoding processes of each job."""
    mean: list = field(default_factory=list)
    """Normalisation mean of each channel in [0, 1], for both stages; empty: of the images of the first stage."""
    std: list = field(default_factory=list)
    """Normalisation standard deviation of each channel."""
    methods: list = field(default_factory=lambda: list(METHODS))
    """Methods to compare."""
    ratios: list = field(default_factory=lambda: [0.5])
    """Prune ratios."""
    seeds: list = field(default_factory=lambda: [0])
    """Seeds; for each a dense model is trained with the same number of epochs."""
    images_per_epoch_check: int = 0
    """Test images for the accuracy after every epoch; 0: all. The final accuracy is always on all."""
    timed_batch: int = 128
    """Batch size of the timed forward passes."""
    source: Stage | None = None
    """[source]: a first stage, trained once, whose model all jobs start from."""
    target: Stage = field(default_factory=Stage)
    """[target]: the stage in which models are pruned."""
    trainer: dict = field(default_factory=dict)
    """[trainer]: settings of p3b.Config for all jobs."""
    settings: dict = field(default_factory=dict)
    """[settings."p3b+"]: settings of p3b.Config for one method, or for "dense". With the key `method` they define a new
    name for `methods`: [settings.floored] with method = "p3b" and floor = 0.1. The teacher of a method with `distill`
    is the dense model of the same seed."""

    def __post_init__(self) -> None:
        for name, stage in (("source", self.source), ("target", self.target)):
            if isinstance(stage, Mapping):
                setattr(self, name, _built(Stage, stage, f"[{name}]"))
        for name in ("methods", "ratios", "seeds"):
            values = getattr(self, name)
            if not values or len(set(map(repr, values))) != len(values):
                raise ValueError(f"compare: {name} must be a list without repeats, got {values!r}")
        for ratio in self.ratios:
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
                raise TypeError(f"compare: ratios must be numbers, got {ratio!r}")
        if len({_short(ratio) for ratio in self.ratios}) != len(self.ratios):
            raise ValueError(f"compare: ratios must differ in their first six digits, got {self.ratios!r}")
        named = [name for name, keys in self.settings.items() if "method" in keys and name not in (*METHODS, DENSE)]
        for name in named:
            if not re.fullmatch(r"[\w+][\w+.-]*", name, re.ASCII) or name == SOURCE:
                form = f"letters, digits, _ + . - and not {SOURCE!r}"
                raise ValueError(f"compare: NAME of [settings.NAME] must be of {form}, got {name!r}")
            _known(f"method of [settings.{name}]", self.settings[name]["method"], METHODS)
        for name in self.methods:
            _known("methods", name, [*METHODS, *named])
        for name in self.settings:
            _known("settings", name, [*METHODS, DENSE, *named])
        for name, keys in [("trainer", self.trainer), *self.settings.items()]:
            fixed = sorted({"method", "prune_ratio", "seed"} & set(keys) - ({"method"} if name in named else set()))
            if fixed:
                raise ValueError(f"compare: [{name}] must leave out {', '.join(fixed)}, which each job sets itself")
        if self.source is not None and self.source.epochs < 1:
            raise ValueError(f"compare: epochs of [source] must be 1 or more, got {self.source.epochs}")
        for name in ("images_per_epoch_check", "timed_batch"):
            least = int(name == "timed_batch")
            if getattr(self, name) < least:
                raise ValueError(f"compare: {name} must be {least} or more, got {getattr(self, name)}")

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """A Task from a TOML file, or from a shipped comparison by its name (`comparisons()`)."""
        file = Path(path)
        if not file.is_file():
            file = COMPARISONS / f"{path}.toml"
        names = ", ".join(comparisons())
        if not file.is_file():
            if str(path) in recipes():
                raise ValueError(f"compare: CONFIG must be a comparison ({names}), got {path}, the settings of one run")
            raise ValueError(f"compare: CONFIG must be a TOML file or one of {names}, got {str(path)!r}")
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"compare: {file} cannot be read as TOML: {error}") from None
        if values and set(values) <= set(TRAINER):
            raise ValueError(
                f"compare: CONFIG must be a comparison (methods, ratios, [target]; p3b ships {names}), got {file}, "
                "the settings of one run, which p3b prune --config takes"
            )
        return _built(cls, values, str(file))

    def use(
        self,
        *,
        source: str | None = None,
        data: str | None = None,
        methods: Sequence[str] = (),
        ratios: Sequence[float] = (),
        seeds: Sequence[int] = (),
    ) -> Task:
        """The task with these images, methods, ratios and seeds in place of its own; empty: unchanged."""
        if source and self.source is None:
            raise ValueError(f"compare: source must be left out for a comparison without [source], got {source!r}")
        lists = {"methods": list(methods), "ratios": list(ratios), "seeds": list(seeds)}
        changes: dict[str, Any] = {name: values for name, values in lists.items() if values}
        for name, path in (("source", source), ("target", data)):
            if path:
                changes[name] = dataclasses.replace(getattr(self, name), data=path)
        return dataclasses.replace(self, **changes)

    def config(self, method: str | None, ratio: float | None, seed: int) -> dict[str, Any]:
        """Arguments of p3b.Config.from_dict for a job; method None: the dense model."""
        values = self.trainer | self.settings.get(method or DENSE, {}) | {"seed": seed}
        return values if method is None else {"method": method} | values | {"prune_ratio": ratio}

    def jobs(self) -> list[CompareJob]:
        """The jobs, source first, then by seed, so that an interrupted comparison is complete for its first seeds."""
        common = dict(model=self.model, model_kwargs=self.model_kwargs, img_size=self.img_size)
        common |= dict(pretrained=self.pretrained, checkpoint=self.checkpoint, batch_size=self.batch_size)
        common |= dict(workers=self.workers, mean=self.mean, std=self.std, check=self.images_per_epoch_check)
        jobs = []
        before = None
        if self.source is not None:
            Config.from_dict(self.source.trainer)
            before = common | dict(stage=_resolved(self.source), config=self.source.trainer, epochs=self.source.epochs)
            before["check"] = 0
            jobs.append(CompareJob(SOURCE, None, None, 0, before))
        stage = _resolved(self.target)
        for seed in self.seeds:
            for ratio, method in [(None, None), *((ratio, method) for ratio in self.ratios for method in self.methods)]:
                config = self.config(method, ratio, seed)
                if method is None:
                    checked = Config.from_dict(config)
                    epochs = checked.final_epoch + checked.finetune_epochs
                    name = f"{DENSE}-s{seed}"
                else:
                    Config.from_dict(config)
                    epochs, name = None, f"{method}-{_short(ratio)}-s{seed}"
                spec = common | dict(stage=stage, config=config, epochs=epochs, source=before)
                if method is not None and config.get("distill"):
                    spec["teacher"] = f"{DENSE}-s{seed}"
                jobs.append(CompareJob(name, method, ratio, seed, spec))
        return jobs


def _short(ratio: float) -> str:
    """A ratio in the name of a job."""
    return f"{ratio:g}"


def _resolved(stage: Stage) -> dict[str, Any]:
    """A stage as plain values, with the absolute path of its data."""
    path = Path(stage.data).expanduser()
    return dataclasses.asdict(stage) | {"data": str(path.resolve()) if stage.data and path.exists() else stage.data}


@dataclass
class CompareJob:
    """One run of the comparison."""

    name: str
    method: str | None
    """None: no pruning."""
    ratio: float | None
    seed: int
    spec: dict[str, Any]
    """All settings of the worker; the result of a job is only used for the same spec."""
    error: str = ""
    """Error of a failed job, in one line."""


def comparisons() -> list[str]:
    """Names of the comparisons that ship with p3b."""
    return sorted(file.stem for file in COMPARISONS.glob("*.toml"))


def _built(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain keys and values. Raises TypeError or ValueError with the name of the key."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kinds = {"str": str, "bool": bool, "int": int, "list": list, "dict": Mapping, "Stage": Mapping}
    for key, value in values.items():
        _known(f"key of {where}", key, fields)
        kind = kinds[str(fields[key].type).partition(" ")[0]]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"compare: {key} of {where} must be {fields[key].type}, got {value!r}")
    return cls(**values)


def _known(argument: str, name: str, known: Any) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"compare: {argument} must be one of {', '.join(known)}, got {name!r}{hint}")
