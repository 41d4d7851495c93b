"""The methods that remove other things than channels of a sub-block: gates on whole heads and on the embedding that the
network shares, their exact shrink and cost; WDPruning and SAViT."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import p3b
from p3b.metrics.cost import count_macs
from p3b.training.progress import Silent
from p3b.training.prune import PruningPhase
from p3b_ext import patch

# the two methods, through the trainer


class Loader:
    """Batches of a small task: ten patterns under noise."""

    def __init__(self, count, seed, batch=32):
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(9))
        self.labels = torch.randint(0, 10, (count,), generator=generator)
        self.images = patterns[self.labels] + torch.randn(count, 3, 16, 16, generator=generator)
        self.batch = batch

    def __len__(self):
        return len(self.images) // self.batch

    def __iter__(self):
        return iter(zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True))


def small_vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(
        **({"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} | options)
    )


def run(method, model=None, epochs=(1, 4, 5), **options):
    start, sparse, final = epochs
    settings = {"prune_ratio": 0.5, "start_epoch": start, "sparse_epoch": sparse, "final_epoch": final, "lr": 1e-3}
    config = p3b.Config(**({**settings, "finetune_epochs": 1, "device": "cpu", "method": method} | options))
    model = small_vit(num_classes=10) if model is None else model
    return p3b.prune(model, Loader(256, 1), Loader(64, 2), config)


def started(method, **options):
    """A run on the way to its first step, and its training batches."""
    config = p3b.Config(**({"method": method, "start_epoch": 1, "sparse_epoch": 3, "final_epoch": 4} | options))
    model = patch(small_vit(num_classes=10))
    return PruningPhase(model, config, 8), Loader(256, 1)


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("method", ["wdpruning", "savit"])
def test_methods_meet_the_budget_and_learn(method, ratio, budget):
    dense = small_vit(num_classes=10)
    result = run(method, prune_ratio=ratio, budget=budget)
    if budget == "params":
        left, whole = (sum(p.numel() for p in model.parameters()) for model in (result.model, dense))
    else:
        left, whole = (count_macs(model, (3, 16, 16)) for model in (result.model, dense))
    assert abs(left / whole - (1 - ratio)) < 0.005
    assert result.history["final_params"] == sum(p.numel() for p in result.model.parameters())
    assert result.history["updates"][-1]["params"] == result.history["final_params"]
    assert result.history["accuracy_shrunk"] == result.history["accuracy_masked"]
    assert result.history["accuracy_final"] > 60  # chance is 10


@pytest.mark.parametrize("method", ["wdpruning", "savit"])
def test_methods_round_what_they_keep(method):
    result = run(method, round_to=8, epochs=(1, 2, 2), finetune_epochs=0)
    for block in result.model.blocks:
        assert block.mlp.fc1.out_features % 8 == 0
        assert block.attn.proj.out_features % 8 == block.mlp.fc2.out_features % 8 == 0
    assert any(len(kept["heads"]) % 8 for name, kept in result.model.p3b_kept.items() if name.endswith("attn"))


@pytest.mark.parametrize("method", ["wdpruning", "savit"])
def test_a_stopped_method_ends_as_if_it_had_not_been_stopped(method, tmp_path):
    settings = {"method": method, "start_epoch": 1, "sparse_epoch": 3, "final_epoch": 4, "finetune_epochs": 0}
    config, loaders = p3b.Config(**settings, device="cpu"), (Loader(128, 1), Loader(64, 2))
    whole = p3b.prune(small_vit(num_classes=10), *loaders, config)

    class Stop(Exception):
        pass

    class Impatient(Silent):
        def epoch(self, record):
            if record["epoch"] == 2:
                raise Stop

    with pytest.raises(Stop):
        p3b.prune(small_vit(num_classes=10), *loaders, config, progress=Impatient(), state_dir=tmp_path)
    again = p3b.prune(small_vit(num_classes=10), *loaders, config, state_dir=tmp_path, resume=True)
    assert again.history["updates"] == whole.history["updates"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    )


# WDPruning


def test_wdpruning_keeps_the_most_salient_up_to_the_threshold():
    pruning, _ = started("wdpruning")
    method = pruning.method
    assert len(method.sizes) == 8 and method.sizes.tolist() == [4, 128, 4, 128, 32, 32, 32, 32]
    assert method.masks().all()  # sigmoid(10) keeps all
    with torch.no_grad():
        method.saliency.copy_(torch.randn(len(method.index), generator=torch.Generator().manual_seed(3)))
        method.threshold[0] = 0.1  # 4 heads: ceil(0.52 * 4) = 3
        method.threshold[5] = -1.0  # 32 rows: ceil(0.27 * 32) = 9
    masks = method.masks()
    for layer, kept in enumerate([3, 128, 4, 128, 32, 9, 32, 32]):
        here = method.layer == layer
        best = method.saliency[here].topk(kept).indices.sort().values
        assert torch.equal(masks[here].nonzero().flatten(), best)


def test_wdpruning_penalises_the_exact_cost():
    pruning, _ = started("wdpruning", prune_ratio=0.4)
    method, gates = pruning.method, pruning.gates
    excess, slope = method.excess()
    assert float(excess) == pytest.approx(0.4, abs=1e-4)
    with torch.no_grad():
        method.threshold[:] = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    excess, slope = method.excess()
    hard = torch.ones_like(gates.values)
    for block in gates.blocks:
        for place in block.slices()[1:]:
            hard[place.start : (place.start + place.stop) // 2] = 0
    share = gates.total("params", hard >= 0.5) / gates.total("params")
    assert float(excess) == pytest.approx(share - 0.6, abs=1e-6)
    # the slope is the derivative by each layer's keep ratio
    for layer in (0, 1, 5):
        with torch.no_grad():
            method.threshold[layer] = torch.logit(torch.tensor(0.52))
        step = float(method.excess()[0] - excess)
        assert step == pytest.approx(0.02 * float(slope[layer]), rel=1e-3, abs=1e-6)
        with torch.no_grad():
            method.threshold[layer] = 0.0


def test_wdpruning_learns_saliencies_and_thresholds_without_decay_and_skips_broken_steps():
    pruning, _ = started("wdpruning")
    method, gates = pruning.method, pruning.gates
    pruning.count = pruning.milestones.start
    method.excess = lambda: (torch.tensor(-1.0), torch.ones(8))  # within the budget: the loss alone
    gates.grad.copy_(torch.randn(len(gates.grad), generator=torch.Generator().manual_seed(4)))
    sign = gates.grad[method.index].sign()
    pull = torch.zeros(8).index_add_(0, method.layer, gates.grad[method.index]).sign()
    method.stepped(torch.tensor(True), pruning=True)
    rate = method.optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(method.saliency.detach(), -rate * sign, rtol=1e-4, atol=0)
    torch.testing.assert_close(method.threshold.detach(), 10 - rate * pull, rtol=1e-4, atol=0)
    assert not gates.grad.any()
    before = method.saliency.detach().clone()
    gates.grad.fill_(torch.nan)
    method.stepped(torch.tensor(False), pruning=True)
    assert torch.equal(method.saliency.detach(), before) and not gates.grad.any()
    assert not method.multipliers.any()


def test_wdpruning_thresholds_reach_the_budget_by_themselves():
    """The common shift at the end must have little left to do."""
    result = run("wdpruning", epochs=(1, 6, 7), finetune_epochs=0)
    dense = result.history["dense_params"]
    assert abs(result.history["updates"][-2]["params"] / dense - 0.5) < 0.1
    assert result.history["updates"][0]["params"] > 0.9 * dense


# SAViT


def test_savit_cross_terms_are_second_derivatives():
    pruning, loader = started("savit")
    method, gates, model = pruning.method, pruning.gates, pruning.model.eval()
    images, labels = next(iter(loader))
    importance, cross = method.measure([(images, labels)], pruning.step.criterion)

    def loss(shares):
        values = torch.ones_like(gates.values)
        for share, places in zip(shares, method.places.values(), strict=True):
            for place in places:
                values[place] += share
        gates.set(values)
        with torch.no_grad():
            return float(pruning.step.criterion(model.double()(images.double()), labels).mean())

    step = 1e-2
    for i in range(3):
        for j in range(i, 3):
            first, second = torch.eye(3)[i] * step, torch.eye(3)[j] * step
            corners = loss(first + second) - loss(first - second) - loss(second - first) + loss(-first - second)
            assert float(cross[i, j]) == pytest.approx(corners / (4 * step**2), rel=2e-2, abs=2e-3)
            assert float(cross[i, j]) == pytest.approx(float(cross[j, i]), rel=1e-3, abs=1e-5)
    gates.set(torch.ones_like(gates.values))
    model.float()
    gates.grad.zero_()
    pruning.step.criterion(model(images), labels).mean().backward()
    torch.testing.assert_close(importance, gates.grad.square(), rtol=1e-3, atol=1e-9)


def test_savit_gives_the_budget_to_the_types_that_the_cross_terms_spare():
    pruning, _ = started("savit")
    method = pruning.method
    importance = torch.rand(len(pruning.gates.values), generator=torch.Generator().manual_seed(2))
    spared = {}
    for i, name in enumerate(("heads", "hidden", "embedding")):
        cross = torch.full((3,), 1e-3, dtype=torch.float64)
        cross[i] = 1.0
        masks, shares = method.search(importance, cross.diag())
        spared[name] = shares[i]
        total = pruning.gates.total("params", masks >= 0.5) / pruning.gates.total("params")
        assert 0.495 < total <= 0.5
        for j, places in enumerate(method.places.values()):
            gone = sum(float((1 - masks[place]).sum()) for place in places)
            assert gone / sum(place.stop - place.start for place in places) == pytest.approx(shares[j])
            for place in places:
                assert masks[place].sum() >= 0.05 * (place.stop - place.start)
                if masks[place].any() and not masks[place].all():  # the least important of a layer
                    assert importance[place][masks[place] == 0].max() < importance[place][masks[place] == 1].min()
    assert max(spared.values()) < 0.1
    # one threshold over the layers: whatever went is below whatever stayed, up to what every layer keeps
    gone = torch.cat([importance[place][masks[place] == 0] for place in method.places["hidden"]])
    kept = torch.cat([importance[place][masks[place] == 1] for place in method.places["hidden"]])
    assert float(gone.max()) < float(kept.sort().values[2 * 7])
    # a type that interacts with no other and bends nothing goes first
    masks, shares = method.search(importance, torch.diag(torch.tensor([1.0, -5.0, 1.0], dtype=torch.float64)))
    assert shares[1] == max(shares)


def test_savit_prunes_at_once_and_trains_on():
    result = run("savit", epochs=(1, 2, 3), finetune_epochs=0)
    first, *others = result.history["updates"]
    assert sum(first["removed"].values()) > 0 and set(first["pruned_share"]) == {"heads", "hidden", "embedding"}
    assert all(update["params"] == first["params"] for update in others)
    assert all(sum(update["removed"].values()) == 0 for update in others)
    assert result.model.embed_dim == len(result.model.p3b_kept["embedding"])


def test_savit_refuses_what_it_cannot_reach():
    with pytest.raises(
        ValueError, match=r"savit: prune_ratio must be at most 0\.\d+ \(the smallest possible model keeps"
    ):
        started("savit", prune_ratio=0.7, round_to=32)
