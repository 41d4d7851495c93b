"""p3b.data: what the loaders give, that it is the same each time, and one line for what cannot be read."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from toy import read_data

from p3b.data import check_files
from p3b.data.array_loader import ArrayLoader
from p3b.data.augment import colour, erase, shift_and_flip, warp
from p3b.data.loaders import FileLoader, SeededImages, batches_of, worker_death
from p3b.machine import decoding_workers


def batches(loader):
    return [(x.clone(), y.clone()) for x, y in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(p, q) and torch.equal(y, z) for (p, y), (q, z) in zip(a, b, strict=True)
    )


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 3,
    }

    def write(**changes):
        path = tmp_path / "set.npz"
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return str(path)

    return write


@pytest.fixture
def folder(tmp_path):
    """Three classes of flat colours: red, green and blue, six images of each."""

    def write(*parts, count=6, classes=("blue", "green", "red")):
        root = tmp_path / "images"
        for part in parts or ("",):
            for i, name in enumerate(classes):
                (root / part / name).mkdir(parents=True)
                for j in range(count):
                    color = [0, 0, 0]
                    color[2 - i] = 200
                    Image.new("RGB", (40 + j, 30), tuple(color)).save(root / part / name / f"{j}.png")
        return root

    return write


def test_digits_are_split_once_and_normalised():
    data = read_data("digits", img_size=16, batch_size=64, augment="none")
    assert (data.num_classes, data.in_chans, data.img_size) == (10, 1, (16, 16))
    assert len(data.train.labels) + len(data.val.labels) == 1797
    assert torch.bincount(data.val.labels).min() >= 34  # a fifth of every class
    other = read_data("digits", img_size=16, batch_size=64, augment="none", seed=1)
    assert torch.equal(data.val.images, other.val.images)
    raw = read_data("digits", img_size=8, batch_size=2000, augment="none")
    images, labels = next(iter(raw.train))
    assert images.shape == (len(raw.train.labels), 1, 8, 8) and images.dtype == torch.float32
    assert abs(float(images.mean())) < 1e-4 and abs(float(images.std()) - 1) < 1e-3
    assert labels.dtype == torch.int64 and len(raw.train) == 1


def test_digits_by_class_are_renumbered_in_the_order_given():
    whole = read_data("digits", img_size=8, batch_size=2000, augment="none")
    data = read_data("digits", img_size=8, batch_size=2000, augment="none", classes=[7, 3])
    assert data.num_classes == 2 and data.class_names == ("7", "3")
    for new, old in enumerate((7, 3)):
        assert torch.equal(data.val.images[data.val.labels == new], whole.val.images[whole.val.labels == old])


def test_batches_depend_on_seed_and_epoch_only():
    def make(seed=0):
        return read_data("digits", img_size=12, batch_size=200, seed=seed).train

    loader, again = make(), make()
    first, second = batches(loader), batches(loader)
    torch.manual_seed(99)
    assert same(first, batches(again)) and not same(first, second)
    again.set_epoch(1)
    assert same(second, batches(again))
    assert not same(first, batches(make(seed=1)))


def test_training_batches_have_one_shape_and_validation_sees_every_image():
    images, labels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10)
    common = dict(img_size=(4, 4), batch_size=4, mean=[0.5], std=[0.5])
    train = ArrayLoader(images, labels, train=True, **common)
    assert [len(y) for _, y in train] == [4, 4] and len(train) == 2
    val = ArrayLoader(images, labels, train=False, **common)
    assert torch.equal(torch.cat([y for _, y in val]), labels) and len(val) == 3
    few = ArrayLoader(images[:3], labels[:3], train=True, **common)
    assert [len(y) for _, y in few] == [3] and len(few) == 1


def test_shift_and_flip_by_hand():
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(9, 1, 1, 1)
    still, mirrored = torch.zeros(9, 2, dtype=torch.int64), torch.arange(9) % 2 == 1
    flipped = shift_and_flip(x, still, mirrored)
    assert torch.equal(flipped[::2], x[::2]) and torch.equal(flipped[1::2], x[1::2].flip(3))
    moves = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1), mode="replicate")
    wanted = torch.stack([padded[0, :, 1 + r : 4 + r, 1 + c : 5 + c] for r, c in moves.tolist()])
    assert torch.equal(shift_and_flip(x, moves, still[:, 0] == 1), wanted)


def test_middle_draws_change_nothing():
    x = torch.rand(2, 3, 10, 12, generator=torch.Generator().manual_seed(0)) * 255
    middle = torch.full((2, 3), 0.5)
    assert torch.allclose(colour(x, middle, 0.4), x, atol=1e-3)
    assert torch.allclose(warp(x, middle), x, atol=1e-3)
    assert torch.equal(erase(x, torch.full((2, 5), 0.5), 0.5), x)  # a draw of 0.5 is not below it


def test_colour_by_hand():
    x = torch.tensor([[100.0, 50.0], [30.0, 90.0], [20.0, 40.0]]).view(1, 3, 1, 2)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    draws = [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 0]]
    brighter, contrast, saturation = (torch.tensor([row]) for row in draws)
    assert torch.allclose(colour(x, brighter, 0.4), x * 1.4)
    assert torch.allclose(colour(x, contrast, 0.4), luma.mean() + 1.4 * (x - luma.mean()), atol=1e-4)
    assert torch.allclose(colour(x, saturation, 1.0), luma.expand(1, 3, 1, 2), atol=1e-4)  # no saturation: grey
    grey = x[:, :1]
    assert torch.allclose(colour(grey, contrast, 0.4), grey.mean() + 1.4 * (grey - grey.mean()), atol=1e-4)


def test_warp_turns_by_degrees_on_any_shape():
    x = torch.zeros(2, 1, 61, 121)
    x[:, :, 29:32, 99:102] = 1  # 40 pixels right of the centre
    moved = warp(x, torch.tensor([[1.0, 0.5, 0.5], [0.5, 0.5, 0.0]]))
    rows, cols = torch.arange(61.0) - 30, torch.arange(121.0) - 60
    weight = moved.sum((1, 2, 3))
    at = [((moved.sum((1, 3)) * rows).sum(1) / weight), (moved.sum((1, 2)) * cols).sum(1) / weight]
    angle = math.degrees(math.atan2(float(at[0][0]), float(at[1][0])))
    assert abs(angle) == pytest.approx(15, abs=0.5) and math.hypot(at[0][0], at[1][0]) == pytest.approx(40, abs=0.5)
    assert float(at[1][1]) == pytest.approx(40 * 1.25, abs=0.5) and abs(float(at[0][1])) < 0.5


def test_erased_boxes_have_the_published_sizes():
    draws = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0))
    x = torch.ones(2000, 1, 40, 60)
    gone = erase(x, draws, 0.25) == 0
    erased = gone.flatten(1).any(1)
    assert 430 < int(erased.sum()) < 570
    height, width = gone.any(3).sum((1, 2))[erased], gone.any(2).sum((1, 2))[erased]
    assert torch.equal(height * width, gone.sum((1, 2, 3))[erased])  # one box, no holes
    share = (height * width) / 2400
    assert share.min() > 0.01 and share.max() < 0.36 and share.std() > 0.05
    for edge in (gone[:, 0, 0], gone[:, 0, -1], gone[:, 0, :, 0], gone[:, 0, :, -1]):
        assert edge.any()  # boxes reach every border


def test_strong_arrays(npz):
    def make(**changes):
        return read_data(npz(), img_size=8, batch_size=10, **{"augment": "strong", "seed": 1} | changes)

    strong, light = batches(make().train), batches(make(augment="light").train)
    assert same(strong, batches(make().train)) and not same(strong, light)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(strong, light, strict=True))  # the order is that of the seed
    still = make(color_jitter=0.0, re_prob=0.0, shift=0, flip=False)
    assert not same(strong, batches(still.train))
    assert same(batches(make().val), batches(make(augment="none").val))


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_repeated_augmentation(npz, folder, kind):
    """As DeiT samples: copies of an image stand in a row, so that processes, which take turns, get different ones."""
    source = npz() if kind == "arrays" else folder(count=10)
    data = read_data(source, img_size=8, batch_size=6, augment="strong", re_prob=1.0, repeats=3)
    drawn = batches(data.train)
    once = read_data(source, img_size=8, batch_size=6, augment="none").train
    assert len(drawn) == len(once)  # an epoch is as long as ever
    order = torch.cat([y for _, y in batches(once)])
    assert torch.equal(torch.cat([y for _, y in drawn]), order.repeat_interleave(3)[: len(order)])
    images = torch.cat([x for x, _ in drawn])
    assert all(not torch.equal(images[i], images[i + 1]) for i in range(len(images) - 1))


def test_arrays_read_as_files(npz):
    common = dict(img_size=(6, 5), batch_size=8, augment="none", crop_pct=1.0)
    device, files = (read_data(npz(), on_device=on, mean=[0.5] * 3, std=[0.5] * 3, **common) for on in (True, False))
    assert isinstance(files.train, FileLoader) and files.class_names == device.class_names
    for (x, y), (z, w) in zip(device.val, files.val, strict=True):
        assert torch.allclose(x, z, atol=1e-5) and torch.equal(y, w)
    again = read_data(**files.config.recorded())
    assert same(batches(files.val), batches(again.val))
    black = npz(x_train=np.zeros((30, 6, 5, 1), np.uint8), x_test=np.zeros((8, 6, 5, 1), np.uint8))
    grey = read_data(black, img_size=6, on_device=False, batch_size=2)
    assert next(iter(grey.val))[0].shape == (2, 3, 6, 6)


def test_policies_of_timm(folder):
    root = folder()
    settings = ({}, {"auto_augment": ""}, {"auto_augment": "", "color_jitter": 0.0, "re_prob": 0.0})
    kept = [read_data(root, img_size=8, batch_size=18, augment="strong", **how).train for how in settings]
    assert len({float(next(iter(loader))[0].sum()) for loader in kept}) == 3
    with pytest.raises(ValueError, match=r"auto_augment must be a policy that timm knows .* got 'lots'"):
        read_data(root, augment="strong", auto_augment="lots")


def test_a_device_without_room(npz, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(ValueError, match=r"data: device must have 0.0 GiB free on cpu for set.npz \(on_device=False"):
        read_data(npz())


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "original", "v0", "augmix-m10-w3"])
def test_policies_take_every_image(policy):
    read = Deadly()
    read.deadly = False
    for index in range(2):
        transform = read_data(
            "digits", on_device=False, img_size=8, augment="strong", auto_augment=policy
        ).train.dataset
        dataset = SeededImages(read, 40, transform.transform, 2, seed=index)
        assert not [item for item in (dataset[0, i, 0] for i in range(40)) if isinstance(item, str)]


def test_an_image_that_the_transforms_refuse():
    def refuse(image):
        raise RuntimeError("too small")

    read = Deadly()
    read.describe = lambda index: f"photo {index}"
    item = SeededImages(read, 2, refuse, 2, seed=0)[0, 1, 0]
    assert item == "data: photo 1 must be an image that the transforms take, got: too small"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_on_the_device_waits_for_nothing(npz):
    data = read_data(npz(), img_size=8, batch_size=6, augment="strong", device="cuda")
    on_cpu = read_data(npz(), img_size=8, batch_size=6, augment="strong")
    loader = iter(data.train)
    next(loader)  # the epoch's tables are copied here
    try:
        torch.cuda.set_sync_debug_mode("error")
        rest = list(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (z, w) in zip(rest, batches(on_cpu.train)[1:], strict=True):
        assert torch.equal(y.cpu(), w) and torch.allclose(x.cpu(), z, atol=2e-2)


def test_every_move_is_drawn():
    loader = read_data("digits", img_size=8, batch_size=400, shift=1, flip=True).train
    offset, mirrored = loader._draw_moves(1000, torch.Generator().manual_seed(0))
    counts = torch.unique(offset, dim=0, return_counts=True)[1]
    assert len(counts) == 9 and counts.min() > 70 and 450 < int(mirrored.sum()) < 550


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("augment", ["light", "strong"])
@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_processes_share_the_batches_of_one(npz, folder, kind, augment, world):
    source = npz() if kind == "arrays" else folder(count=7)
    common = dict(img_size=8, batch_size=6, seed=3, augment=augment, repeats=3 if augment == "strong" else 1)
    whole = read_data(source, **common)
    parts = [read_data(source, rank=rank, world=world, workers=rank % 2, **common) for rank in range(world)]
    for epoch in range(2):
        assert len({len(part.train) for part in parts}) == 1
        for batch, *mine in zip(whole.train, *(part.train for part in parts), strict=True):
            for rank, part in enumerate(mine):
                assert all(torch.equal(a, b[rank::world]) for a, b in zip(part, batch, strict=True)), (epoch, rank)
    one = batches(whole.val)
    for rank, part in enumerate(parts):
        mine = batches(part.val)
        assert len(mine) == len(part.val)
        wanted = [(x[rank::world], y[rank::world]) for x, y in one if len(y) > rank]
        assert same(mine, wanted)  # uneven, nothing padded
    assert sum(len(y) for part in parts for _, y in part.val) == sum(len(y) for _, y in one)
    assert same(batches(parts[-1].part(0, 1).val), one)


def test_batches_that_processes_cannot_share(npz):
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 3, .* \(as 63 or 66\), got 64"):
        read_data("digits", batch_size=64, rank=0, world=3)
    with pytest.raises(ValueError, match="rank must be 0 to 1"):
        read_data("digits", rank=2, world=2)
    with pytest.raises(ValueError, match="at most the 30 training images where 4 processes share a batch, got 40"):
        read_data(npz(), batch_size=40, rank=0, world=4)
    assert [len(y) for _, y in read_data(npz(), batch_size=40, rank=1, world=2, img_size=4).train] == [15]


def test_npz(npz):
    data = read_data(npz(), img_size=(6, 5), batch_size=8)
    assert (data.num_classes, data.in_chans) == (3, 3) and data.train.flip
    images, labels = next(iter(data.val))
    assert data.train.shift == 2 and read_data(npz(), img_size=(84, 90)).train.shift == 6
    assert images.shape == (8, 3, 6, 5) and labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    pixel = torch.from_numpy(np.load(npz())["x_test"])[0, 2, 3].float() / 255
    assert torch.allclose(images[0, :, 2, 3], (pixel - torch.tensor(data.mean)) / torch.tensor(data.std), atol=1e-5)
    grey = read_data(npz(x_train=np.zeros((30, 6, 5), np.uint8), x_test=np.zeros((8, 6, 5), np.uint8)), img_size=6)
    assert grey.in_chans == 1 and not grey.train.flip
    assert all(torch.isfinite(x).all() for x, _ in grey.train)  # a constant image has no deviation to divide by


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([0, 1] * 3, [0, 2] * 3, "must occur in training, got also .2. in validation"), ([0] * 6, [0] * 6, "only '0'")],
)
def test_labels_that_nothing_can_be_learned_from(tmp_path, train, test, message):
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=train, x_test=images, y_test=test)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "a.npz", img_size=8, batch_size=2)


def test_labels_beyond_all_images_are_refused_before_they_cost_memory(tmp_path):
    images = np.zeros((6, 8, 8), np.uint8)
    for last in (12, 10**12):
        np.savez(tmp_path / "a.npz", x_train=images, y_train=[0, 1, 2, 0, 1, last], x_test=images, y_test=[0] * 6)
        with pytest.raises(ValueError, match=f"labels of .*a.npz must be numbered from 0 on, .* 12 images, got {last}"):
            read_data(tmp_path / "a.npz", img_size=8, batch_size=2)


def test_the_first_training_images(npz, folder):
    whole, few = (read_data(npz(), img_size=6, augment="none", train_images=n) for n in (None, 4))
    assert torch.equal(few.train.images, whole.train.images[:4]) and len(few.train.labels) == 4
    assert few.num_classes == 3 and len(few.val.labels) == len(whole.val.labels)
    assert len(read_data(**few.config.recorded()).train.labels) == 4
    with pytest.raises(ValueError, match="train_images must be 1 to 30, the images there are, got 31"):
        read_data(npz(), train_images=31)
    with pytest.raises(ValueError, match="train_images must be left out"):
        read_data(folder(), train_images=3)


def test_settings_make_the_same_data_again(npz, folder):
    for source in (npz(), str(folder()), "digits"):
        data = read_data(source, img_size=8, batch_size=4, seed=3, augment="light", val_share=0.4)
        again = read_data(**data.config.recorded(), seed=3)
        assert same(batches(data.val), batches(again.val)) and same(batches(data.train), batches(again.train))


def test_image_folder_with_parts(folder):
    root = folder("train", "val")
    data = read_data(root, img_size=16, batch_size=5, augment="none")
    assert data.class_names == ("blue", "green", "red") and len(data.train) == 3 and len(data.val) == 4
    images, labels = next(iter(data.val))
    assert images.shape == (5, 3, 16, 16)
    colors = images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    assert labels.tolist() == [0] * 5
    assert torch.allclose(colors[0, :, 8, 8], torch.tensor([0.0, 0.0, 200 / 255]), atol=1e-2)


def test_image_folder_without_parts_is_split_by_class(folder):
    data = read_data(folder(), img_size=8, batch_size=18, val_share=1 / 3, augment="none")
    train, val = next(iter(data.train))[1], next(iter(data.val))[1]
    assert torch.bincount(train).tolist() == [4, 4, 4] and torch.bincount(val).tolist() == [2, 2, 2]


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmented_files_do_not_depend_on_workers(folder, augment):
    root = folder(count=4)
    loaders = [read_data(root, img_size=8, batch_size=3, workers=w, augment=augment).train for w in (0, 2)]
    assert same(batches(loaders[0]), batches(loaders[1]))
    assert not same(batches(loaders[0]), batches(read_data(root, img_size=8, batch_size=3, augment=augment).train))


def test_nested_classes_keep_their_path(folder):
    root = folder("train/birds", "train/insects")
    assert read_data(root, img_size=8).class_names[:4] == (
        "birds/blue",
        "birds/green",
        "birds/red",
        "insects/blue",
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_line(folder, workers):
    root = folder()
    broken = root / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = read_data(root, img_size=8, batch_size=2, workers=workers)
    with pytest.raises(ValueError, match=r"data: .*3\.png must be a readable image") as error:
        batches(data.train), batches(data.val)
    assert "\n" not in str(error.value)


def test_a_file_that_vanishes_during_training(folder):
    root = folder()
    data = read_data(root, img_size=8, batch_size=6, workers=1)
    batches(data.train)
    gone = root / "red" / "1.png"
    gone.unlink()
    with pytest.raises(ValueError, match=r"data: .*red/1\.png must be a readable image, got: .*No such file") as error:
        for _ in range(2):
            batches(data.train), batches(data.val)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"red/1\.png must be a readable image"):
        check_files(data, lambda text: None)
    Image.new("RGB", (9, 9)).save(gone)
    assert len(batches(data.train)) == len(data.train)  # the loader works again


class Deadly:
    """Reads like any data set until its process is killed, as the system does when memory runs out."""

    deadly = True

    def __call__(self, index):
        if index == 3 and self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (8, 8)), 0


def test_workers_that_are_not_asked_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [decoding_workers(n, cpu) for n in (-1, 0, 3)] == [0, 0, 3] and [
        decoding_workers(n, gpu) for n in (-1, 0, 3)
    ] == [15, 0, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert decoding_workers(-1, gpu) == 3


def test_a_killed_worker_is_one_line():
    def transform(image):
        return torch.zeros(3, 8, 8)

    read = Deadly()
    dataset = SeededImages(read, 8, transform, 2, seed=0)
    loader = FileLoader(dataset, batch_size=2, workers=2, train=False, seed=0, pin=False)
    with pytest.raises(OSError, match=r"data: a worker process died \(.*--workers 0 .*DataLoader worker") as error:
        batches(loader)
    assert "\n" not in str(error.value)
    del error
    gc.collect()  # PyTorch waits seconds for the workers of a broken loader that live on beside others
    read.deadly = False
    assert len(batches(loader)) == 4  # new workers take over


@pytest.mark.parametrize(
    "report, error, match",
    [
        (None, OSError, r"data: a worker process died \(.*: ConnectionResetError while it handed a batch over"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), OSError, r"died \(.*: Bus error"),
        (RuntimeError("something else"), RuntimeError, "^something else"),
    ],
)
def test_a_death_that_is_seen_before_it_is_reported(monkeypatch, report, error, match):
    """A broken connection tells of the death first; PyTorch's own report must not strike what handles that."""

    class Loader:
        num_workers = 1

        def __iter__(self):
            raise ConnectionResetError

    def sleep(seconds):
        waits.append(seconds)
        if report is not None:
            raise report

    waits = []
    monkeypatch.setattr("p3b.data.loaders.time.sleep", sleep)
    with pytest.raises(error, match=match):
        next(batches_of(Loader()))
    assert len(waits) == 1 and waits[0] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_run_whose_worker_is_killed(folder, tmp_path):
    """PyTorch raises in whatever the main thread does; the run says what happened and keeps its last epoch."""
    model = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    command = f"prune --model vit_tiny_patch16_224 --model-kwargs {json.dumps(model, separators=(',', ':'))}"
    command += f" --no-pretrained --data {folder()} --output {tmp_path / 'run'} --img-size 8 --batch-size 6 --workers 1"
    command += " --start-epoch 0 --sparse-epoch 1 --final-epoch 100000 --device cpu --threads 1"
    process = subprocess.Popen(
        [sys.executable, "-m", "p3b", *command.split()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        state = tmp_path / "run.unfinished" / "state.pt"
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        os.kill(int(children[0]), signal.SIGKILL)
        lines = process.communicate(timeout=120)[1].splitlines()
    finally:
        process.kill()
    assert process.returncode == 2 and state.exists(), lines
    line = "p3b prune: data: a worker process died (fewer --workers"  # a thread of PyTorch's may still print something
    assert any(text.startswith(line) and "--resume" in text for text in lines), lines


def test_a_worker_that_dies_while_something_is_written():
    """PyTorch's zip writer fails in turn when its file is left unfinished."""
    death = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError) as error:
        try:
            raise death
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    assert worker_death(error.value) == worker_death(death) != "" == worker_death(RuntimeError("unexpected pos"))


def test_workers_stay_from_epoch_to_epoch(folder):
    train = read_data(folder(), img_size=8, batch_size=3, workers=1).train
    first = batches(train)
    workers = [worker.pid for worker in train._loader._iterator._workers]
    next(iter(train))  # a pass that is given up
    train.set_epoch(0)
    assert same(batches(train), first) and [w.pid for w in train._loader._iterator._workers] == workers


def test_loading_takes_no_random_number_of_the_run(folder):
    data = read_data(folder(), img_size=8, batch_size=3)
    state = torch.get_rng_state()
    batches(data.train), batches(data.val)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_out_of_range(npz):
    data = read_data(npz(), img_size=8, batch_size=6, on_device=False)
    data.train.dataset.read.labels = np.full(30, 7)
    with pytest.raises(ValueError, match=r"data: label of image \d+ of set.npz must be 0 to 2, got 7"):
        next(iter(data.train))
    with pytest.raises(ValueError, match=r"labels of set.npz must be one of the 2 labels below num_classes, got .* 2"):
        read_data(npz(), num_classes=2)
    assert read_data(npz(), num_classes=5).class_names == ("0", "1", "2", "3", "4")


def test_empty_class_folder(folder):
    root = folder("train", "val")
    (root / "train" / "__MACOSX").mkdir()
    read_data(root)
    (root / "train" / "yellow").mkdir()
    with pytest.raises(ValueError, match=r"data: .*train/yellow must hold images, as every class folder, got none"):
        read_data(root)


@pytest.fixture
def lists(tmp_path):
    """Images of flat blue, green and red by turns, under any names."""

    def write(place, names):
        root = tmp_path / "listed"
        for i, name in enumerate(names):
            path = root / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), [(0, 0, 200), (0, 200, 0), (200, 0, 0)][i % 3]).save(path)
        return root

    return write


def coco(names, labels, categories):
    return json.dumps({
        "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": 10 + i, "category_id": label} for i, label in enumerate(labels)],
        "categories": [{"id": number, "name": name} for number, name in categories],
    })  # fmt: skip


def test_inaturalist_as_it_unpacks(lists):
    names = [f"train_val2018/Plantae/{7000 + i % 3}/{i}.png" for i in range(9)]
    root = lists("", names)
    categories = [(5, "oak"), (2, "ash"), (9, "elm"), (11, "fir")]  # numbers with gaps, one class without images
    labels = [(2, 5, 9)[i % 3] for i in range(9)]
    (root / "train2018.json").write_text(coco(names[:6], labels[:6], categories))
    (root / "val2018.json").write_text(coco(names[6:], labels[6:], categories))
    data = read_data(root, img_size=8, batch_size=3, augment="none")
    assert data.class_names == ("ash", "oak", "elm", "fir") and (len(data.train), len(data.val)) == (2, 1)
    images, labels = next(iter(data.val))
    assert labels.tolist() == [0, 1, 2] and images.argmax(1)[:, 4, 4].tolist() == [2, 1, 0]
    (root / "train2019.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lists of one set, got train2018.json, train2019.json"):
        read_data(root)
    (root / "train2018.json").unlink()
    with pytest.raises(ValueError, match=r"train2019.json must be a list with images, .* got KeyError: 'images'"):
        read_data(root)
    (root / "train2019.json").write_text(coco(["nowhere.png"], [2], categories))
    with pytest.raises(ValueError, match=r"must list images of .*listed, got no file .*nowhere.png"):
        read_data(root)


def test_ifood_as_it_unpacks(lists):
    root = lists("train_set", [f"train_{i}.png" for i in range(6)])
    lists("val_set", [f"val_{i}.png" for i in range(3)])
    (root / "class_list.txt").write_text("0 apple pie\n1 baklava\n2 churro\n3 donut\n")
    (root / "train_labels.csv").write_text("img_name,label\n" + "".join(f"train_{i}.png,{i % 3}\n" for i in range(6)))
    (root / "val_labels.csv").write_text("img_name,label\n" + "".join(f"val_{i}.png,{i % 3}\n" for i in range(3)))
    data = read_data(root, img_size=8, batch_size=3, augment="none")
    assert data.class_names == ("apple pie", "baklava", "churro", "donut")
    assert (len(data.train), len(data.val)) == (2, 1)
    images, labels = next(iter(data.val))
    assert labels.tolist() == [0, 1, 2] and images.argmax(1)[:, 4, 4].tolist() == [2, 1, 0]
    (root / "val_labels.csv").unlink()  # one part: a share of each class is set aside
    assert len(read_data(root, img_size=8, batch_size=3, val_share=0.5).val.dataset) == 3
    (root / "train_labels.csv").write_text("train_0.png\n")
    with pytest.raises(ValueError, match=r"train_labels.csv must have rows of image name and label"):
        read_data(root)


def test_hugging_face_set_on_disk(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    root = folder("train", "test")
    data = read_data(f"hfds/{root}", root=str(tmp_path / "cache"), img_size=8, batch_size=6, augment="none")
    assert data.class_names == ("blue", "green", "red") and data.train.count == 18
    images, labels = next(iter(data.val))
    assert images[:, :, 4, 4].argmax(1).tolist() == [2 - int(y) for y in labels]
    broken = root / "test" / "blue" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    bad = read_data(f"hfds/{root}", root=str(tmp_path / "again"), img_size=8, batch_size=6)
    with pytest.raises(ValueError, match=r"image 0 of hfds/.* must be a readable image"):
        batches(bad.val)


def test_webdataset_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    counts = {"train": 12, "validation": 5}
    info = {"splits": {}}
    for part, count in counts.items():
        with wds.TarWriter(str(tmp_path / f"{part}-0.tar")) as shard:
            for i in range(count):
                colour = [0, 0, 0]
                colour[i % 3] = 200
                shard.write({"__key__": f"{i:04}", "png": Image.new("RGB", (20, 20), tuple(colour)), "cls": i % 3})
        files = {"filenames": [f"{part}-0.tar"], "shard_lengths": [count]}
        info["splits"][part] = {"name": part, "num_samples": count, **files}
    (tmp_path / "info.json").write_text(json.dumps(info))
    common = dict(root=str(tmp_path), img_size=8, batch_size=4, augment="none")
    data = read_data("wds/colours", num_classes=3, **common)
    assert len(batches(data.train)) == len(data.train) == 3
    assert [len(y) for _, y in data.val] == [4, 1] and len(data.val) == 2
    images, labels = next(iter(data.val))
    assert torch.equal(images[:, :, 4, 4].argmax(1), labels)
    shared = [batches(data.val.part(rank, 2)) for rank in range(2)]
    assert [[y.tolist() for _, y in part] for part in shared] == [[[0, 2], [1]], [[1, 0]]]
    with pytest.raises(ValueError, match=r"world must be torch.distributed's 1 for a stream, got 2"):
        read_data("wds/colours", num_classes=3, rank=0, world=2, **common)
    with pytest.raises(ValueError, match="labels must be 0 to 1"):
        batches(read_data("wds/colours", num_classes=2, **common).val)
    with pytest.raises(ValueError, match="num_classes must be given for 'wds/colours'"):
        read_data("wds/colours", **common)


def test_folders_that_are_no_data_sets(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"one folder per class .* got no images"):
        read_data(tmp_path / "empty")
    Image.new("RGB", (4, 4)).save(tmp_path / "empty" / "a.png")
    with pytest.raises(ValueError, match="got 1 images outside any class folder"):
        read_data(tmp_path / "empty")
    root = folder("train", "val")
    (root / "val" / "red").rename(root / "val" / "rot")
    with pytest.raises(ValueError, match=r"must have the classes of .* got also rot"):
        read_data(root)


def test_one_class_is_no_data_set(folder):
    with pytest.raises(ValueError, match="two or more classes, got only 'blue'"):
        read_data(folder(classes=("blue",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "got arrays x_train, y_train, x_test, not y_test"),
        ({"x_train": np.zeros((30, 6, 5, 3), np.float32)}, "x_train .* must be uint8 .* got float32"),
        ({"y_train": np.zeros(29, np.int64)}, r"y_train .* must be 30 integers, got int64 \[29\]"),
        ({"y_train": np.full(30, -1)}, "y_train .* must be labels 0, 1, ..., got -1"),
        ({"x_test": np.zeros((8, 6, 5), np.uint8)}, "must have the same channels"),
        ({"x_test": np.zeros((8, 0, 5, 3), np.uint8)}, r"x_test .* must hold pixels, got \[8, 0, 5, 3\]"),
    ],
)
def test_npz_that_does_not_fit(npz, changes, message):
    with pytest.raises(ValueError, match=message):
        read_data(npz(**changes))


def test_classes_without_validation_images(npz):
    with pytest.raises(ValueError, match=r"got \[0, 1\] with 20 training and 0 validation images"):
        read_data(npz(y_test=np.full(8, 2)), classes=[0, 1])


def test_npz_cut_short(npz):
    path = npz()
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"must be a readable .npz file"):
        read_data(path)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("digitz", "digits"),
        ("cifar100", "torch/cifar100"),
        ("torch/cifar1000", "torch/cifar100"),
        ("no/such/place", ""),
    ],
)
def test_unknown_names_come_with_near_ones(source, hint):
    with pytest.raises(ValueError, match="data: source must be an existing folder") as error:
        read_data(source)
    assert repr(source) in str(error.value) and (f"did you mean {hint}" in str(error.value)) == bool(hint)


def test_a_set_that_was_not_downloaded(tmp_path):
    with pytest.raises(ValueError, match=r"readable by timm's create_dataset in .* got: ") as error:
        read_data("torch/cifar10", root=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"augment": "mild"}, "augment must be one of none, light, strong, got 'mild'"),
        ({"repeats": 0}, "repeats must be 1 or more, got 0"),
        ({"re_prob": 1.5}, r"re_prob must be in \[0, 1\], got 1.5"),
        ({"val_share": 1.0}, "val_share must be between 0 and 1"),
        ({"img_size": (3, 4, 5)}, "img_size must be one or two edges"),
        ({"classes": [1, 1]}, "classes must be two or more different labels below 10"),
        ({"classes": [1, 10]}, "classes must be two or more different labels below 10"),
        ({"mean": [0.1, 0.2, 0.3]}, "mean must be 1 numbers, one per channel"),
        ({"std": [0.0]}, "std must be 1 positive numbers"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        read_data("digits", **setting)


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("heron", "owl", "rook"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    scandir = os.scandir

    def denied(path="."):  # permissions do not hold for root, who may run this
        if str(path).endswith("owl"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"owl must be a readable folder, got: Permission denied"):
        read_data(tmp_path, img_size=8)
