"""The comparison behind p3b bench."""

import torch
from toy import read_data
from vits import vit

from p3b.experiments import benchmark as bench


def test_the_models_of_a_comparison_share_their_weights():
    models = {"dense": vit()}
    seen = {}

    def step(text, total):
        seen[text] = total

    x = torch.randn(2, 3, 64, 64)
    found = bench.compare(
        models, ["tome", "dense"], [(x, None)], batch_size=2, repeats=1, unscored=["dense"], step=step
    )
    assert [row.name for row in found.rows] == ["dense", "dense + p3b_ext", "ToMe r=13"]
    assert found.rows[0].macs == found.rows[1].macs > found.rows[2].macs
    assert set(seen) == {"warm-up", "timing 1/1", "dense", "dense + p3b_ext", "ToMe r=13"} and set(seen.values()) == {7}
    twin = bench.twin(models["dense"])
    pairs = zip(models["dense"].parameters(), twin.parameters(), strict=True)
    assert twin is not models["dense"] and all(a is b for a, b in pairs)
    assert type(models["dense"].blocks[0].attn).__module__.startswith("timm")  # the comparison patches copies


def test_calibration_reads_training_images():
    data = read_data("digits", img_size=8, batch_size=16)
    batches = bench.calibration_batches(data)
    assert len(batches) == bench.CALIBRATION_BATCHES and batches[0].shape == (16, 1, 8, 8)
    data.train.set_epoch(0)
    smaller = bench.calibration_batches(data, 6)
    assert max(map(len, smaller)) == 6 and torch.equal(torch.cat(smaller), torch.cat(batches))
