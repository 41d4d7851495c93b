"""What loaders give: the same each time, shared by processes, whatever the workers; and workers that die."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from toy import listed, read_data, same_batches

from p3b.data import check_files
from p3b.data.array_loader import ArrayLoader
from p3b.data.loaders import FileLoader, SeededImages, batches_of, worker_death
from p3b.machine import decoding_workers


def test_batches_depend_on_seed_and_epoch_only():
    def make(seed=0):
        return read_data("digits", img_size=12, batch_size=200, seed=seed).train

    loader, again = make(), make()
    first, second = listed(loader), listed(loader)
    torch.manual_seed(99)
    assert same_batches(first, listed(again)) and not same_batches(first, second)
    again.set_epoch(1)
    assert same_batches(second, listed(again))
    assert not same_batches(first, listed(make(seed=1)))


def test_training_batches_have_one_shape_and_validation_sees_every_image():
    images, labels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10)
    common = dict(img_size=(4, 4), batch_size=4, mean=[0.5], std=[0.5])
    train = ArrayLoader(images, labels, train=True, **common)
    assert [len(y) for _, y in train] == [4, 4] and len(train) == 2
    val = ArrayLoader(images, labels, train=False, **common)
    assert torch.equal(torch.cat([y for _, y in val]), labels) and len(val) == 3
    few = ArrayLoader(images[:3], labels[:3], train=True, **common)
    assert [len(y) for _, y in few] == [3] and len(few) == 1


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_repeated_augmentation(npz, folder, kind):
    """As DeiT samples: copies of an image stand in a row, so that processes, which take turns, get different ones."""
    source = npz() if kind == "arrays" else folder(count=10)
    data = read_data(source, img_size=8, batch_size=6, augment="strong", re_prob=1.0, repeats=3)
    drawn = listed(data.train)
    once = read_data(source, img_size=8, batch_size=6, augment="none").train
    assert len(drawn) == len(once)  # an epoch is as long as ever
    order = torch.cat([y for _, y in listed(once)])
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
    assert same_batches(listed(files.val), listed(again.val))
    black = npz(x_train=np.zeros((30, 6, 5, 1), np.uint8), x_test=np.zeros((8, 6, 5, 1), np.uint8))
    grey = read_data(black, img_size=6, on_device=False, batch_size=2)
    assert next(iter(grey.val))[0].shape == (2, 3, 6, 6)


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
    one = listed(whole.val)
    for rank, part in enumerate(parts):
        mine = listed(part.val)
        assert len(mine) == len(part.val)
        wanted = [(x[rank::world], y[rank::world]) for x, y in one if len(y) > rank]
        assert same_batches(mine, wanted)  # uneven, nothing padded
    assert sum(len(y) for part in parts for _, y in part.val) == sum(len(y) for _, y in one)
    assert same_batches(listed(parts[-1].part(0, 1).val), one)


def test_batches_that_processes_cannot_share(npz):
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 3, .* \(as 63 or 66\), got 64"):
        read_data("digits", batch_size=64, rank=0, world=3)
    with pytest.raises(ValueError, match="rank must be 0 to 1"):
        read_data("digits", rank=2, world=2)
    with pytest.raises(ValueError, match="at most the 30 training images with 4 processes, got 40"):
        read_data(npz(), batch_size=40, rank=0, world=4)
    assert [len(y) for _, y in read_data(npz(), batch_size=40, rank=1, world=2, img_size=4).train] == [15]


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmented_files_do_not_depend_on_workers(folder, augment):
    root = folder(count=4)
    loaders = [read_data(root, img_size=8, batch_size=3, workers=w, augment=augment).train for w in (0, 2)]
    assert same_batches(listed(loaders[0]), listed(loaders[1]))
    assert not same_batches(
        listed(loaders[0]), listed(read_data(root, img_size=8, batch_size=3, augment=augment).train)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_line(folder, workers):
    root = folder()
    broken = root / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = read_data(root, img_size=8, batch_size=2, workers=workers)
    with pytest.raises(ValueError, match=r"data: .*3\.png cannot be read as an image") as error:
        listed(data.train), listed(data.val)
    assert "\n" not in str(error.value)


def test_a_file_that_vanishes_during_training(folder):
    root = folder()
    data = read_data(root, img_size=8, batch_size=6, workers=1)
    listed(data.train)
    gone = root / "red" / "1.png"
    gone.unlink()
    with pytest.raises(ValueError, match=r"data: .*red/1\.png cannot be read as an image: .*No such file") as error:
        for _ in range(2):
            listed(data.train), listed(data.val)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"red/1\.png cannot be read as an image"):
        check_files(data, lambda text: None)
    Image.new("RGB", (9, 9)).save(gone)
    assert len(listed(data.train)) == len(data.train)  # the loader works again


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


@pytest.mark.slow
def test_a_killed_worker_is_one_line():
    def transform(image):
        return torch.zeros(3, 8, 8)

    read = Deadly()
    dataset = SeededImages(read, 8, transform, 2, seed=0)
    loader = FileLoader(dataset, batch_size=2, workers=2, train=False, seed=0, pin=False)
    with pytest.raises(OSError, match=r"data: a worker process died \(.*--workers 0 .*DataLoader worker") as error:
        listed(loader)
    assert "\n" not in str(error.value)
    del error
    gc.collect()  # PyTorch waits seconds for the workers of a broken loader that live on beside others
    read.deadly = False
    assert len(listed(loader)) == 4  # new workers take over


@pytest.mark.parametrize(
    "report, error, match",
    [
        (None, OSError, r"data: a worker process died \(.*: ConnectionResetError while it sent a batch"),
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


@pytest.mark.slow
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
    def workers():
        return {worker.pid for worker in multiprocessing.active_children()}

    before, train = workers(), read_data(folder(), img_size=8, batch_size=3, workers=1).train
    first = listed(train)
    own = workers() - before
    next(iter(train))  # a pass that is given up
    train.set_epoch(0)
    assert same_batches(listed(train), first) and len(own) == 1 and workers() - before == own


def test_loading_takes_no_random_number_of_the_run(folder):
    data = read_data(folder(), img_size=8, batch_size=3)
    state = torch.get_rng_state()
    listed(data.train), listed(data.val)
    assert torch.equal(torch.get_rng_state(), state)
