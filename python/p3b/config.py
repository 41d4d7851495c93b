# SPDX-License-Identifier: MIT
"""Settings of a pruning run: one dataclass, one sentence per field, all values checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = (
    *("p3b", "p3b+", "uniform", "random", "magnitude-l1", "magnitude-l2"),
    *("taylor", "vtp", "wdpruning", "savit", "isomorphic"),
)


class MethodDefault(str):
    """A setting left at its default, which depends on the method."""


KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}  # of a field, by its annotation
METHOD_DEFAULTS = {"p3b+": {"rank_across": "block"}}
"""Defaults that differ for a method; a value given explicitly takes precedence."""


@dataclass
class Config:
    """Settings of `p3b.prune` and `p3b.finetune`. Epoch numbers count from 0; the pruning phase ends at `final_epoch`.

    Defaults are P3B's published constants where there is one (arXiv 2506.23675); learning rates are for AdamW.
    Raises ValueError (values) or TypeError (types) with the field, the expected and the actual value.
    """

    method: str = "p3b"
    """Pruning method: p3b, p3b+, uniform, random, magnitude-l1, magnitude-l2, taylor, vtp, wdpruning, savit,
    isomorphic. (p3b+: p3b with improved defaults; all but p3b and p3b+ are baselines.)"""
    prune_ratio: float = 0.5
    """Share of the model's cost (parts outside the blocks included) that is pruned, in (0, 1)."""
    budget: str = "params"
    """Cost that `prune_ratio` refers to: "params" or "macs" (multiply-accumulates of one image)."""
    floor: float = 0.0
    """Smallest keep ratio of any sub-block, in [0, 1); prevents a late block from being pruned entirely."""
    round_to: int = 1
    """The number of kept channels of every gate is rounded to a multiple of this (unless all or none are kept); 8
    suits the vector units of most CPUs and GPUs."""
    compensate: bool = False
    """At the shrink, add the mean activation of the removed channels to the next layer's bias."""

    start_epoch: int = 2
    """Warm-up: before this epoch model and probes are trained with all gates at 1, and no benefit is measured."""
    sparse_epoch: int = 7
    """The keep ratios decrease linearly from 1 at `start_epoch` to their final values at this epoch."""
    final_epoch: int = 10
    """The soft masks are sharpened from `sparse_epoch` on and are hard at this epoch, where the pruning phase ends and
    the model is shrunk."""
    finetune_epochs: int = 14
    """Epochs of ordinary fine-tuning after the shrink."""
    updates_per_epoch: int = 3
    """Mask updates per epoch."""

    alpha: float = 0.5
    """Weight of the class-token benefit; the patch benefit has 1 - alpha. Models without a class token use the
    patch benefit alone."""
    gamma: float = 0.2
    """Weight of the newest importance in its running mean, in (0, 1]."""
    momentum: str = "published"
    """How importance is computed from benefit: "published" divides it by the number of kept parameters and averages;
    "sqrt" takes the fixed point of that rule directly, the square root of benefit over size."""
    temperature: float = 10.0
    """Upper limit T of the smooth clamp in the computation of importance from benefit."""
    min_kept_share: float = 0.05
    """A fully pruned sub-block counts as this share of its size when benefit is divided by size, so that it
    cannot take the whole budget."""
    tau_max: float = 0.1
    """Width of the soft mask, as a share of a sub-block's gate elements, until sharpening starts."""
    scale_attn_in: float = 1.0
    """Factor on the ranks of the attention's input channels; larger keeps more of them."""
    scale_attn_qkv: float = 1.0
    """Factor on the ranks of the head channels (shared by q, k, v and all heads)."""
    scale_attn_out: float = 1.5
    """Factor on the ranks of the attention's output channels."""
    scale_mlp_in: float = 1.0
    """Factor on the ranks of the MLP's input channels."""
    scale_mlp_hid: float = 0.75
    """Factor on the ranks of the MLP's hidden channels."""
    scale_mlp_out: float = 1.5
    """Factor on the ranks of the MLP's output channels."""
    rank_across: str = MethodDefault("gate")
    """"gate" (published) ranks elements inside each gate, so that scores of different gates are never compared; "block"
    compares all elements of a sub-block by their score per cost saved. (p3b+: block.)"""
    rank_zero_by: str = "gradient"
    """How elements with mask 0, whose score (m * g)^2 is 0, are ordered below the others: "gradient", by the current
    g^2, or "last", by their last score before the mask became 0 (measured on a network that has changed since)."""

    benefit_targets: str = "train"
    """Targets for measuring benefit: "train" (published: the smoothed and mixed targets of training) or "clean"
    (labels without smoothing, images without mixing, which costs a forward pass where images are mixed)."""
    patch_probe: str = "pointwise"
    """Form of the patch probe: "conv" (published: two 3x3 convolutions), "pointwise" (one 1x1 convolution) or
    "linear" (none); each ends in the mean over tokens and a linear layer."""
    patch_probe_width: int = 0
    """Hidden channels of the patch probe; 0: the model's width for "conv", a quarter of it for "pointwise"."""
    probe_share: float = 1.0
    """Share of each batch that the probes are trained and evaluated on, in (0, 1]."""
    probe_every: int = 1
    """The probes are trained and evaluated every this many steps; 1: in every step."""
    probe_lr: float = 5e-4
    """Learning rate of the probes, constant. Patch probes other than "conv" use ten times this rate, which brings their
    benefit closest to that of "conv" (docs/results/probes.md)."""
    probe_weight_decay: float = 0.05
    """Weight decay of the probes' weights."""

    opt: str = "adamw"
    """Optimizer of the model, by its name in timm's create_optimizer_v2: adamw, sgd, lamb, lion, ..."""
    lr: float = 5e-4
    """Learning rate of the pruning phase, constant."""
    weight_decay: float = 0.05
    """Weight decay of weights with two or more axes."""
    finetune_lr: float = 1e-3
    """Peak learning rate of fine-tuning."""
    schedule: str = "one-cycle"
    """Learning rate over fine-tuning: "one-cycle" (PyTorch's: 10 % warm-up, then cosine to zero), "cosine" (timm's) or
    "constant". (That of the pruning phase is constant.)"""
    warmup_epochs: int = 0
    """Warm-up of the cosine schedule in epochs, linear from timm's 1e-5."""
    min_lr: float = 0.0
    """Final learning rate of the cosine schedule."""
    label_smoothing: float = 0.1
    """Smoothing of integer labels, in [0, 1); soft targets are not smoothed."""
    mixup: float = 0.0
    """Alpha of mixup (timm.data.Mixup, per batch) in both phases; 0: disabled."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: disabled."""
    mix_prob: float = 1.0
    """Share of the batches that are mixed, where mixup or cutmix is above 0."""
    mix_switch_prob: float = 0.5
    """Share of the mixed batches that use CutMix, where both are enabled."""
    distill: float = 0.0
    """Weight, in [0, 1], of the distillation loss (the dense model is the teacher) in fine-tuning; 0: disabled."""
    distill_temperature: float = 2.0
    """Temperature of the distillation loss."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights in fine-tuning (timm.utils.ModelEmaV3), whose
    weights are then the result; 0: disabled."""
    select: str = "last"
    """Which epoch of fine-tuning is the result: "last", or "best" by validation accuracy."""
    clip_grad: float = 0.0
    """Largest 2-norm of the model's gradient; 0: no clipping."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one optimizer step; steps, schedules and mask updates count
    optimizer steps."""

    seed: int = 0
    """Seed of Python's, NumPy's and PyTorch's generators."""
    amp: str = "none"
    """Mixed precision of forward passes: "none", "bfloat16" or "float16" (with loss scaling)."""
    compile: bool = False
    """Compile the model's forward and backward passes in training (torch.compile)."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ..."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), MethodDefault):
                value = METHOD_DEFAULTS.get(str(self.method), {}).get(field.name, field.default)
                setattr(self, field.name, MethodDefault(value))
            self._coerce(field)
        self._check_pruning()
        self._check_training()

    def _check_pruning(self) -> None:
        self._check("prune_ratio", 0 < self.prune_ratio < 1, "in (0, 1)")
        self._choice("method", METHODS)
        self._choice("budget", ("params", "macs"))
        self._check("floor", 0 <= self.floor < 1, "in [0, 1)")
        self._check("round_to", self.round_to >= 1, "1 or more")
        self._check("start_epoch", self.start_epoch >= 0, "0 or more")
        self._check("sparse_epoch", self.sparse_epoch > self.start_epoch, f"above start_epoch = {self.start_epoch}")
        self._check(
            "final_epoch",
            self.final_epoch >= self.sparse_epoch,
            f"at least sparse_epoch = {self.sparse_epoch}",
        )
        self._check("finetune_epochs", self.finetune_epochs >= 0, "0 or more")
        self._check("updates_per_epoch", self.updates_per_epoch >= 1, "1 or more")
        self._check("alpha", 0 <= self.alpha <= 1, "in [0, 1]")
        self._check("gamma", 0 < self.gamma <= 1, "in (0, 1]")
        self._choice("momentum", ("published", "sqrt"))
        self._check("temperature", self.temperature > 0, "above 0")
        self._check("min_kept_share", 0 < self.min_kept_share <= 1, "in (0, 1]")
        self._check("tau_max", self.tau_max >= 0, "0 or more")
        for gate in ("attn_in", "attn_qkv", "attn_out", "mlp_in", "mlp_hid", "mlp_out"):
            self._check(f"scale_{gate}", getattr(self, f"scale_{gate}") > 0, "above 0")
        self._choice("rank_across", ("gate", "block"))
        self._choice("rank_zero_by", ("gradient", "last"))
        self._choice("benefit_targets", ("train", "clean"))
        self._choice("patch_probe", ("conv", "pointwise", "linear"))
        self._check("patch_probe_width", self.patch_probe_width >= 0, "0 or more")
        self._check("probe_share", 0 < self.probe_share <= 1, "in (0, 1]")
        self._check("probe_every", self.probe_every >= 1, "1 or more")

    def _check_training(self) -> None:
        for rate in ("probe_lr", "lr", "finetune_lr"):
            self._check(rate, getattr(self, rate) > 0, "above 0")
        for decay in ("weight_decay", "probe_weight_decay", "clip_grad", "mixup", "cutmix"):
            self._check(decay, getattr(self, decay) >= 0, "0 or more")
        self._choice("schedule", ("one-cycle", "cosine", "constant"))
        for name in ("warmup_epochs", "min_lr"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
            self._check(name, self.schedule == "cosine" or not getattr(self, name), "0 unless schedule is cosine")
        self._check("min_lr", self.min_lr <= self.finetune_lr, f"at most finetune_lr = {self.finetune_lr}")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        for share in ("mix_prob", "mix_switch_prob", "distill"):
            self._check(share, 0 <= getattr(self, share) <= 1, "in [0, 1]")
        self._check("distill_temperature", self.distill_temperature > 0, "above 0")
        self._check("ema", 0 <= self.ema < 1, "in [0, 1)")
        self._choice("select", ("last", "best"))
        self._check("accumulate", self.accumulate >= 1, "1 or more")
        self._check("seed", 0 <= self.seed < 2**63, "0 or more and below 2^63")
        self._choice("amp", ("none", "bfloat16", "float16"))

    def _coerce(self, field: dataclasses.Field) -> None:
        value = getattr(self, field.name)
        kind = KINDS[str(field.type)]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            setattr(self, field.name, float(value))
        elif not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise TypeError(f"config: {field.name} must be {field.type}, got {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config: {field.name} must be finite, got {value!r}")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"config: {name} must be {expected}, got {getattr(self, name)!r}")

    def _choice(self, name: str, known: tuple[str, ...]) -> None:
        self._check(name, getattr(self, name) in known, f"one of {', '.join(known)}")

    @property
    def gate_scales(self) -> dict[str, float]:
        """Rank factor by gate name: attn_in, attn_out, attn_qkv, mlp_in, mlp_out, mlp_hid."""
        names = ("attn_in", "attn_out", "attn_qkv", "mlp_in", "mlp_out", "mlp_hid")
        return {name: getattr(self, f"scale_{name}") for name in names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """A Config from plain keys and values. Raises ValueError for an unknown key, with the list of known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"config: key must be one of {', '.join(known)}, got {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """A Config from a TOML file of plain keys, or from a shipped recipe by its name (see `recipes()`).

        Settings of model and data in a recipe are for the command line and are ignored here.
        """
        file = Path(path)
        if not file.is_file():
            known = {field.name for field in dataclasses.fields(cls)}
            return cls.from_dict({key: value for key, value in read_recipe(path).items() if key in known})
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"config: {file} cannot be read as TOML: {error}") from None
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain keys and values, ready for JSON; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {key: str(value) if isinstance(value, MethodDefault) else value for key, value in values.items()}


def as_config(config: Config | None) -> Config:
    """The config itself, or one with default values for None. Raises TypeError for any other object."""
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"train: config must be a p3b.Config (Config.from_dict makes one), got {type(config).__name__}")
    return config or Config()


RECIPES = Path(__file__).parent / "recipes"


def recipes() -> list[str]:
    """Names of the recipes that ship with p3b."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The keys of a shipped recipe: settings of a run, and of its model and data (`p3b prune --help` explains each)."""
    if str(name) not in recipes():
        raise ValueError(f"config: recipe must be a TOML file or one of {', '.join(recipes())}, got {str(name)!r}")
    return tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
