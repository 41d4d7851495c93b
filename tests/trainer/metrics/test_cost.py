"""p3b.evaluate and p3b.costs against numbers counted by hand."""

import pytest
import timm
import torch
from torch import nn

import p3b_ext
from p3b.metrics.accuracy import evaluate
from p3b.metrics.cost import count_macs, count_params, peak_memory, throughput
from p3b.metrics.table import Row, measure, metrics, relative, tables

SMALL = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, in_chans=1, num_classes=5)


def small(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL | changes).eval()


class Fixed(nn.Module):
    """Answers every image with its own first row of pixels as logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x[:, 0, 0] * self.weight


def vit_macs(tokens, mlp_tokens, width, inputs, classes, hidden=4):
    """methods: patch embedding + per block (qkv, both products of the attention, proj, two MLP linears) + head."""
    blocks = sum(
        3 * n * width**2 + 2 * n * n * width + n * width**2 + 2 * hidden * m * width**2
        for n, m in zip(tokens, mlp_tokens, strict=True)
    )
    return inputs * width + blocks + width * classes


def test_evaluate_by_hand():
    images = torch.tensor([[3.0, 1, 0, 0, 0, 0], [0, 2, 1, 0, 0, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 9]]).view(
        4, 1, 1, 6
    )
    labels = torch.tensor([0, 2, 5, 5])  # first; second; last of six; first
    model = Fixed().train()
    found = evaluate(model, [(images[:3], labels[:3]), (images[3:], labels[3:])])
    expected = nn.functional.cross_entropy(images[:, 0, 0], labels)
    assert found["top1"] == 50 and found["top5"] == 75 and found["images"] == 4
    assert found["loss"] == pytest.approx(float(expected))
    assert model.training
    assert evaluate(model, [(images, nn.functional.one_hot(labels, 6).float())])["top1"] == 50


def test_evaluate_needs_images():
    with pytest.raises(ValueError, match="loader must give at least one image"):
        evaluate(Fixed(), [])


def test_macs_of_deit_small_are_those_of_the_papers():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    model = model.to_empty(device="cpu")
    expected = vit_macs([197] * 12, [197] * 12, 384, 196 * 3 * 16 * 16, 1000)
    assert count_macs(model, (3, 224, 224)) == expected == 4_598_882_304


@pytest.mark.parametrize("patched", [False, True])
def test_macs_do_not_depend_on_who_computes(patched):
    model = p3b_ext.patch(small()) if patched else small()
    assert count_macs(model, (1, 16, 16)) == vit_macs([17] * 2, [17] * 2, 24, 16 * 16, 5)


def test_macs_of_fewer_tokens():
    model = p3b_ext.patch(small(depth=4), p3b_ext.PPT(r=5, blocks=(1, 2)))
    assert count_macs(model, (1, 16, 16)) == vit_macs([17, 17, 12, 7], [17, 12, 7, 7], 24, 16 * 16, 5)


def test_macs_of_narrow_layers():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Flatten(2), nn.Linear(25, 7), nn.Linear(7, 3))
    assert count_macs(model, (4, 5, 5)) == 25 * 6 * 2 * 9 + 6 * 25 * 7 + 6 * 7 * 3


def test_counting_leaves_the_model_alone():
    model = small().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model, (1, 16, 16))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 4)
    assert count_params(nn.Sequential(layer, nn.Linear(4, 3), layer)) == 16 + 15


def test_peak_memory_by_hand():
    class Spike(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):  # x, 3 * x and the wide one are alive together
            y = x * 3
            wide = torch.cat([y] * 10)
            return wide.sum() + y.sum()

    images = torch.ones(1, 1, 100, 100)
    expected = 4 * (1000 + 10_000 + 10_000 + 100_000)
    assert expected <= peak_memory(Spike(), images) <= expected + 2000


def test_throughput_counts_images(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("p3b.metrics.cost.time.perf_counter", lambda: clock[0])

    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.calls = seconds, 0

        def forward(self, x):
            self.calls += 1
            clock[0] += self.seconds * (100 if self.calls == 4 else 1)  # one outlier, which a median does not see
            return x

    models = {"a": Slow(0.5), "b": Slow(0.25)}
    assert throughput(models, torch.zeros(8, 1, 2, 2), repeats=5, warmup=2) == {"a": 16, "b": 32}
    assert models["a"].calls == 7
    assert throughput(Slow(2.0), torch.zeros(8, 1, 2, 2)) == 4


def test_relative_figures_by_hand():
    dense = Row("dense", 80.0, 1000, 4000, 10, 100.0)
    pruned = Row("pruned", 78.5, 250, 1000, 5, 150.0)
    assert relative(dense, pruned) == {
        "accuracy_improvement": -1.5,
        "parameter_reduction": 75,
        "flops_reduction": 75,
        "throughput_improvement": 50,
    }
    assert relative(Row("dense", None, 1000, 4000, 10, 100.0), pruned)["accuracy_improvement"] is None


def test_tables_show_the_rows():
    rows = [
        Row("dense", 80.0, 22_050_664, 4_598_882_304, 2**20, 100.0),
        Row("small", None, 11_025_332, 10**9, 2**19, 150.4),
    ]
    text = tables(rows)
    assert text.splitlines()[2].split() == ["dense", "80.00", "22.051", "4.5989", "1.0", "100"]
    assert text.splitlines()[3].split() == ["small", "–", "11.025", "1.0000", "0.5", "150"]
    assert text.splitlines()[-1].split() == ["small", "–", "+50.0", "%", "+78.3", "%", "+50.4", "%"]
    assert all(line.startswith("|") for line in tables(rows, markdown=True).splitlines() if line)
    assert metrics(rows)["relative"]["small"]["flops_reduction"] == pytest.approx(78.2556, abs=1e-3)


def test_measure_makes_a_row_for_each_model():
    loader = [(torch.randn(6, 1, 16, 16), torch.arange(6) % 5)]
    rows = measure({"wide": small(), "narrow": small(embed_dim=12)}, loader, batch_size=8, repeats=1, unscored=["wide"])
    assert [row.name for row in rows] == ["wide", "narrow"] and rows[0].top1 is None
    assert rows[1].top1 == evaluate(small(embed_dim=12), loader)["top1"]
    assert rows[0].params == count_params(small()) and rows[0].macs > rows[1].macs
    assert rows[0].peak_memory > rows[1].peak_memory and rows[1].images_per_second > 0
