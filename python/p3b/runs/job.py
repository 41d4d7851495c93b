# SPDX-License-Identifier: MIT
"""Model, data, token reduction and teacher of a run from its settings, and training with them: for `p3b prune` and
`finetune`, the workers of `p3b compare`, and the commands that load a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import p3b_ext

from ..config import Config
from ..data import AUGMENTS, Data, DataConfig, create_data
from ..machine import decoding_workers, resolve_device
from ..models import token_reduction
from ..models.create import check_model_name, create_model, new_head
from ..training.finetune import finetune
from ..training.progress import Progress
from ..training.prune import Result, prune
from .folder import load_run

KINDS: dict[str, type | tuple[type, ...]] = {  # of a field, by its annotation
    "str": str,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "dict": dict,
    "list": list,
}


@dataclass
class Job:
    """Model, data, output and token reduction of a run."""

    model: str = ""
    """timm's name of a ViT or DeiT (deit_small_patch16_224), or the folder of an earlier run, to train its model
    further."""
    data: str = ""
    """Image folder (train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg), .npz file (x_train, y_train, x_test,
    y_test), "digits", or a name for timm's create_dataset (torch/cifar100, hfds/user/name)."""
    output: str = ""
    """New folder for the result; an existing folder with files is never overwritten."""
    pretrained: bool = True
    """Start from timm's pretrained weights (downloaded once)."""
    checkpoint: str = ""
    """Start from this .safetensors or PyTorch weights file instead; a head of another size is not loaded."""
    model_kwargs: dict = dataclasses.field(default_factory=dict)
    """Constructor arguments of the model, as JSON: {"depth": 6, "embed_dim": 96}."""
    img_size: int = 0
    """Edge of the images in pixels; 0: that of the model's training."""
    batch_size: int = 64
    """Images per training step."""
    workers: int = -1
    """Processes that decode image files; 0: the training process decodes them; -1: the number of cores minus one for
    training on a GPU, 0 on a CPU."""
    augment: str = "light"
    """Augmentation of training images: none, light (crop or shift, flip) or strong (RandAugment, random erasing)."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """AutoAugment policy of strong augmentation, by its name in timm; an empty string: none."""
    color_jitter: float = 0.4
    """Strength of colour jitter in strong augmentation (timm jitters only where auto_augment is empty)."""
    re_prob: float = 0.25
    """Probability of random erasing in strong augmentation."""
    repeats: int = 1
    """Repeated augmentation: number of times each image is drawn in a row; the length of an epoch does not change."""
    on_device: bool = True
    """Keep an array data set on the device and augment batches there; no: timm's transforms, as for image files."""
    crop_pct: float = 0.875
    """Share of the resized image that the centre crop for validation keeps (224 of 256 pixels; image files)."""
    classes: list = dataclasses.field(default_factory=list)
    """Use only the images of an array data set with these labels, as JSON: [5, 6, 7, 8, 9]."""
    val_share: float = 0.2
    """Share of each class used for validation where the data has no validation part."""
    data_root: str = ""
    """Folder of the data sets of timm's create_dataset."""
    download: bool = False
    """Download a data set of timm's create_dataset."""
    reader: dict = dataclasses.field(default_factory=dict)
    """Further arguments of timm's create_dataset, as JSON: {"target_key": "fine_label", "val_split": "test"}."""
    num_classes: int = 0
    """Number of classes, for data sets that do not define it; 0: that of the data."""
    reduction: str = ""
    """Token reduction during pruning and in the result: tome, ppt, evit or topk; by default none."""
    reduction_settings: dict = dataclasses.field(default_factory=dict)
    """Settings of the token reduction in place of the published ones (r, keep_rate, blocks counted from 0, score,
    threshold, prune_share), as JSON: {"r": 8, "blocks": [3, 6, 9], "prune_share": 0.5}."""
    teacher: str = ""
    """Folder of a run whose model is the teacher in fine-tuning, with the weight --distill; by default prune uses its
    own dense model."""
    tensorboard: bool = False
    """Write TensorBoard event files into the folder of the run."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, KINDS[str(field.type)]) or (isinstance(value, bool) and field.type != "bool"):
                raise TypeError(f"config: {field.name} must be {field.type}, got {value!r}")
        if self.workers < -1:
            raise ValueError(f"config: workers must be 0 or more, or -1, got {self.workers}")
        if self.augment not in AUGMENTS:
            raise ValueError(f"config: augment must be one of {', '.join(AUGMENTS)}, got {self.augment!r}")

    def require(self, *names: str) -> None:
        """Raises ValueError for the first of these settings that is empty."""
        for name in names:
            if not getattr(self, name):
                raise ValueError(f"config: {name} is missing; give --{name}, or {name} in the config file")

    def data_config(self, config: Config, **changes: Any) -> DataConfig:
        """The DataConfig of the job; `changes` replace its fields."""
        device = resolve_device(config.device)
        values: dict[str, Any] = dict(
            source=self.data,
            img_size=self.img_size or 224,
            batch_size=self.batch_size,
            seed=config.seed,
            workers=decoding_workers(self.workers, device),
            device=device,
            augment=self.augment,
            auto_augment=self.auto_augment,
            color_jitter=self.color_jitter,
            re_prob=self.re_prob,
            repeats=self.repeats,
            on_device=self.on_device,
            crop_pct=self.crop_pct,
            classes=self.classes or None,
            val_share=self.val_share,
            root=self.data_root or None,
            download=self.download,
            reader=self.reader,
            num_classes=self.num_classes or None,
        )
        return DataConfig(**(values | changes))


@dataclass(frozen=True)
class Start:
    """Model and data at the start of training."""

    model: VisionTransformer
    data: Data
    knows_classes: bool
    """Whether the model's head was trained on these classes, in an earlier run."""


def start(job: Job, config: Config, *, fresh_head: bool = False, **data: Any) -> Start:
    """The model of a job, on its device, and its data.

    fresh_head: initialise the head of a run's model even for the same classes. data: fields of the DataConfig that a
    Job does not have. Raises ValueError for a model or data that cannot be loaded, or that do not match.
    """
    device = resolve_device(config.device)
    if os.path.isdir(job.model):
        model, meta = load_run(job.model)
        before = meta["data"]
        size = before["img_size"]
        if job.img_size and [job.img_size] * 2 != list(size):
            trained = " x ".join(str(edge) for edge in size)
            raise ValueError(f"img_size: must be the run's {trained} or left out, got {job.img_size}")
        data |= dict(img_size=size, mean=before["mean"], std=before["std"])
        images = create_data(job.data_config(config, **data))
        known = not fresh_head and list(images.class_names) == meta["class_names"]
        if not known:
            new_head(model, images.num_classes, config.seed)
        # classes named 0, 1, ... of another data set are taken for other classes
        numbered = list(images.class_names) == [str(i) for i in range(images.num_classes)]
        same = not numbered or images.config.source == before["source"]
        return Start(model.to(device), images, known and same)
    images = job_data(job, config, **data)
    return Start(job_model(job, config, images), images, False)


def job_data(job: Job, config: Config, **data: Any) -> Data:
    """The data of a job with a timm model, at the model's image size and, for pretrained weights, with their mean and
    std. Raises ValueError for an unknown model and for data that cannot be read."""
    check_model_name(job.model)
    trained = timm.get_pretrained_cfg(job.model)
    data = {"img_size": job.img_size or (trained.input_size[1:] if trained else 224)} | data
    weights = job.pretrained or job.checkpoint
    rgb = (trained.mean, trained.std) if trained is not None and weights else None
    return create_data(job.data_config(config, **data), rgb=rgb)


def job_model(job: Job, config: Config, data: Data) -> VisionTransformer:
    """The timm model of a job, with a head for the classes of the data, on its device."""
    torch.manual_seed(config.seed)
    model = create_model(
        job.model,
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        img_size=data.img_size,
        pretrained=job.pretrained,
        checkpoint=job.checkpoint,
        arguments=job.model_kwargs,
    )
    return model.to(resolve_device(config.device))


def job_reduction(job: Job, model: VisionTransformer, data: Data) -> token_reduction.Reduction | None:
    """The token reduction of a job, with a calibrated threshold; None where the job has none.

    The model is not changed.
    """
    if not job.reduction:
        if job.reduction_settings:
            raise ValueError("config: reduction_settings are given without a reduction; give --reduction")
        return None
    arguments = dict(job.reduction_settings)
    share = arguments.pop("prune_share", None)
    known = sorted({key for keys in token_reduction.SETTINGS.values() for key in keys})
    for key in arguments:
        if key not in known:
            raise ValueError(f"config: reduction_settings must be of prune_share, {', '.join(known)}, got {key}")
    reduction = token_reduction.create_reduction(job.reduction, model, **arguments)
    if not isinstance(reduction, p3b_ext.PPT):
        if share is not None:
            raise ValueError(f"config: prune_share must be left out for {job.reduction} (only ppt has it), got {share}")
        return reduction
    before = p3b_ext.current_patch(model)
    reduction = token_reduction.apply(model, reduction, data.train, prune_share=share)
    if before is not None:
        p3b_ext.patch(model, before.reduction, linear=before.linear)
    return reduction


def job_teacher(job: Job, config: Config, data: Data) -> nn.Module | None:
    """The teacher of a job. Raises ValueError unless it was trained with the same classes, image size, mean and std."""
    if not job.teacher:
        return None
    if not config.distill:
        raise ValueError("config: a teacher is given, but distill is 0; give --distill")
    teacher, meta = load_run(job.teacher)
    expected = data.config.recorded() | {"classes": list(data.class_names)}
    for key in ("classes", "img_size", "mean", "std"):
        actual = meta["class_names"] if key == "classes" else meta["data"].get(key)
        if list(actual) != list(expected[key]):
            raise ValueError(f"config: teacher must have been trained with the {key} {expected[key]}, got {actual}")
    return teacher


def train(
    begin: Start,
    config: Config,
    command: str,
    *,
    reduction: token_reduction.Reduction | None = None,
    teacher: nn.Module | None = None,
    epochs: int | None = None,
    rank: int = 0,
    world: int = 1,
    validation: Any = None,
    progress: Progress | None = None,
    state_dir: str | Path | None = None,
    resume: bool = False,
) -> tuple[Result | nn.Module, dict[str, Any]]:
    """Runs "prune" or "finetune" from a start; returns its Result (or the fine-tuned model) and its history.

    validation: loader for the accuracy after every epoch; default: that of the data. Other arguments as in `p3b.prune`
    and `p3b.finetune`.
    """
    part = begin.data.part(rank, world)
    validation = part.val if validation is None else validation
    keywords: dict[str, Any] = dict(progress=progress, teacher=teacher, state_dir=state_dir, resume=resume)
    if command == "prune":
        result = prune(begin.model, part.train, validation, config, reduction=reduction, **keywords)
        return result, result.history
    history = finetune(begin.model, part.train, validation, config, epochs=epochs, **keywords)
    return begin.model, history


def run_data(
    meta: Mapping[str, Any],
    source: str | None,
    *,
    root: str | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
) -> Data:
    """The data of a run, or of another source with the run's settings. Raises ValueError for other classes.

    meta: from `load_run`. source: another source of images; None or "run": that of the run. batch_size: of the
    validation images; None: that of the run.
    """
    settings = dict(meta["data"])
    if source and source != "run":
        settings |= dict(source=source, root=root or settings.get("root"))
    data = create_data(DataConfig(**settings, workers=workers, device=device))
    if data.num_classes != len(meta["class_names"]):
        count = len(meta["class_names"])
        raise ValueError(f"data: the model has {count} classes, the images have {data.num_classes}")
    names = [tuple(meta["class_names"]), data.class_names]
    numbered = tuple(str(i) for i in range(data.num_classes))  # names of classes in arrays without names
    if names[0] != names[1] and numbered not in names:
        expected, actual = (", ".join(part[:5]) + (", ..." if len(part) > 5 else "") for part in names)
        raise ValueError(f"data: the model's classes are {expected}, those of the images {actual}")
    return data.validated_in(batch_size)


def model_and_meta(
    name: str, *, pretrained: bool = True, checkpoint: str = "", img_size: int = 0
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The model of a run folder or a timm model, and its `meta`: "data" (settings), "class_names", ..."""
    if os.path.isdir(name):
        for flag, value in (("checkpoint", checkpoint), ("img_size", img_size)):
            if value:
                raise ValueError(
                    f"{flag}: the folder of a run has its own; leave out --{flag.replace('_', '-')} {value}"
                )
        return load_run(name)
    check_model_name(name)
    trained = timm.get_pretrained_cfg(name) or PretrainedCfg()
    size = (img_size, img_size) if img_size else trained.input_size[1:]
    model = create_model(
        name,
        num_classes=trained.num_classes,
        in_chans=3,
        img_size=size,
        pretrained=pretrained,
        checkpoint=checkpoint,
    )
    subset = timm.data.infer_imagenet_subset(model)
    names = timm.data.ImageNetInfo(subset).label_descriptions() if subset else []
    data = {"img_size": size, "mean": trained.mean, "std": trained.std, "crop_pct": trained.crop_pct}
    return model, {"model": name, "class_names": names, "data": data}
