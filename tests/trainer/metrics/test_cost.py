"""p3b.evaluate and p3b.costs against numbers counted by hand."""

import pytest
import timm
import torch
from torch import nn

import p3b_ext
from p3b.metrics.cost import count_macs, count_params, peak_memory, throughput

SMALL = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, in_chans=1, num_classes=5)


def small(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL | changes).eval()


def vit_macs(tokens, mlp_tokens, width, inputs, classes, hidden=4):
    """methods: patch embedding + per block (qkv, both products of the attention, proj, two MLP linears) + head."""
    blocks = sum(
        3 * n * width**2 + 2 * n * n * width + n * width**2 + 2 * hidden * m * width**2
        for n, m in zip(tokens, mlp_tokens, strict=True)
    )
    return inputs * width + blocks + width * classes


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
