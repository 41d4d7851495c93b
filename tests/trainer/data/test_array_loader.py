"""Batches of an array set: augmented on the device, the same each time."""

import pytest
import torch
from toy import listed, read_data, same_batches


def test_strong_arrays(npz):
    def make(**changes):
        return read_data(npz(), img_size=8, batch_size=10, **{"augment": "strong", "seed": 1} | changes)

    strong, light = listed(make().train), listed(make(augment="light").train)
    assert same_batches(strong, listed(make().train)) and not same_batches(strong, light)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(strong, light, strict=True))  # the order is that of the seed
    still = make(color_jitter=0.0, re_prob=0.0, shift=0, flip=False)
    assert not same_batches(strong, listed(still.train))
    assert same_batches(listed(make().val), listed(make(augment="none").val))


def test_a_device_without_room(npz, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(ValueError, match=r"data: out of memory: set.npz needs 0.0 GiB on cpu \(on_device=False"):
        read_data(npz())


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
    for (x, y), (z, w) in zip(rest, listed(on_cpu.train)[1:], strict=True):
        assert torch.equal(y.cpu(), w) and torch.allclose(x.cpu(), z, atol=2e-2)


def test_every_move_is_drawn():
    loader = read_data("digits", img_size=8, batch_size=400, shift=1, flip=True).train
    offset, mirrored = loader.draw_moves(1000, torch.Generator().manual_seed(0))
    counts = torch.unique(offset, dim=0, return_counts=True)[1]
    assert len(counts) == 9 and counts.min() > 70 and 450 < int(mirrored.sum()) < 550
