"""The baseline methods: each meets the budget, ends in hard masks that shrink exactly, and decides as described."""

import copy
import gc
import math
import weakref

import pytest
import torch
import vits
from cases import assert_same_to_rounding, in_float64

import p3b_ext
from p3b import Config, shrink
from p3b.pruning.context import Context, Milestones, ProbeBatch
from p3b.pruning.methods import create
from p3b.training.distributed import Processes
from p3b.training.progress import Silent
from p3b.training.prune import PruningPhase
from p3b.training.step import Meter

METHODS = ("uniform", "random", "magnitude-l1", "magnitude-l2", "taylor", "vtp", "isomorphic")
CLASSES, STEPS, BATCH = 4, 4, 8
SCALES = Config().gate_scales
pytestmark = pytest.mark.filterwarnings("ignore:importance")


def vit(name="deit", **options):
    return vits.family(name, **({"img_size": 16, "depth": 2, "num_classes": CLASSES} | options))


def batches(count=STEPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, 3, 16, 16, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator))
        for _ in range(count)
    ]


def config(method, **options):
    short = {"start_epoch": 1, "sparse_epoch": 2, "final_epoch": 3, "finetune_epochs": 0, "lr": 1e-4}
    return Config(**(short | {"method": method, "device": "cpu"} | options))


def start(method, model=None, **options):
    return PruningPhase(model or vit(), config(method, **options), STEPS)


def train(run, epochs=None, data=None):
    data = data or batches()
    for epoch in range(run.config.final_epoch if epochs is None else epochs):
        run.epoch(epoch, data, batches(1, 1), Silent())
    return run


def finished(method, model=None, **options):
    run = train(start(method, model, **options))
    run.update(final=True)
    return run


def cost(run):
    return float(run.gates.kept_cost(run.config.budget).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_run_meets_the_budget_with_hard_masks_that_shrink_exactly(method, budget):
    run = finished(method, budget=budget, prune_ratio=0.5)
    values = run.gates.values
    assert set(values.tolist()) == {0.0, 1.0}
    assert run.params == int(run.gates.total())
    total = float(run.method.full.sum()) + run.method.outside
    # one element of an attention's inner gate is the largest step there is, 1 / 16 of a quarter of the blocks
    assert abs(cost(run) + run.method.outside - 0.5 * total) < 0.02 * total
    model, images = run.model.eval(), vits.images(3, 16)
    with torch.no_grad():
        masked, truth = model(images), in_float64(model, images)
        assert_same_to_rounding(shrink(model)(images), masked, truth)


@pytest.mark.parametrize("method", METHODS)
def test_updates_follow_the_ramp_and_are_written_down(method):
    run = train(start(method, updates_per_epoch=2, sparse_epoch=3, final_epoch=4))
    updates = run.history["updates"]
    assert all({"keep_ratio", "params", "reactivated", "removed", "step", "epoch"} <= set(update) for update in updates)
    params = [update["params"] for update in updates]
    assert params == sorted(params, reverse=True) and params[-1] < 0.6 * run.history["dense_params"]
    if method == "vtp":  # learns its gates until the sparse epoch and cuts once
        assert params[0] == run.history["dense_params"]
        assert len(set(params)) == 2
    else:
        assert len(set(params)) > 2
    removed = sum(sum(u["removed"].values()) - sum(u["reactivated"].values()) for u in updates)
    assert removed == int((~run.gates.hard()).sum())


@pytest.mark.parametrize("method", ["taylor", "uniform", "vtp"])
def test_a_step_that_is_not_finite_leaves_no_trace(method):
    run = train(start(method), epochs=2)
    before = [t.clone() for t in run.gates.state()]
    run.train_step(
        [(torch.full((BATCH, 3, 16, 16), math.nan), torch.zeros(BATCH, dtype=torch.int64))],
        Meter("cpu"),
    )
    assert int(run.step.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(run.gates.state(), before, strict=True))
    assert not run.gates.grad.any()
    run.update(final=True)
    assert run.gates.values.isfinite().all()


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: what is computed from it stays there, and what the host asks of it is counted."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        asks = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "unique")
        if getattr(function, "__name__", "") in asks:
            OnDevice.reads += 1
            with torch._C.DisableTorchFunctionSubclass():
                return function(args[0].as_subclass(torch.Tensor).clone(), *args[1:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("method", ["p3b", "p3b+", "uniform", "taylor", "isomorphic"])
def test_a_mask_update_reads_the_device_once(method):
    """Two updates in a row, as in a run: the second knows from the first what is kept."""
    run = start(method)
    run.count = run.milestones.start + 1
    run.train_step(batches(1), Meter("cpu"))
    holders = [run.gates] + ([run.method.benefit] if method.startswith("p3b") else [])
    for holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor) and name != "last_score":
                setattr(holder, name, value.as_subclass(OnDevice))
            elif name == "older":
                holder.older = [part.as_subclass(OnDevice) for part in value]
    for final in (False, True):
        OnDevice.reads = 0
        run.update(final)
        assert OnDevice.reads == 1, final
    assert run.history["updates"][0]["keep_ratio"] != run.history["updates"][1]["keep_ratio"]


def test_masks_written_by_anyone_are_seen_on_the_host():
    gates = start("p3b").gates
    for write in (
        lambda: gates.set(torch.zeros_like(gates.values)),
        lambda: gates.values.fill_(1.0),
        lambda: gates.leaves()[0][0].detach().zero_(),
        lambda: gates.load_state([torch.full_like(t, 0.3) for t in gates.state()]),
        lambda: gates.set(torch.full_like(gates.values, 0.7)),
        lambda: gates.harden(),
    ):
        write()
        assert torch.equal(gates.hard_on_host(), gates.values >= 0.5)
        twin = copy.deepcopy(gates)
        twin.values.fill_(0.2)
        assert not twin.hard_on_host().any()
        assert torch.equal(gates.hard_on_host(), gates.values >= 0.5)


@pytest.mark.parametrize("method", ["random", "magnitude-l1", "magnitude-l2"])
def test_data_do_not_matter(method):
    masks = []
    for seed in (0, 1):
        run = start(method)
        run.method.begin(batches(seed=seed), run.step.criterion)
        run.gates.grad += torch.randn(len(run.gates.grad), generator=torch.Generator().manual_seed(seed))
        run.count = run.milestones.start
        run.method.stepped(torch.tensor(True), pruning=True)
        run.method.update(1.0, 0.0, True)
        masks.append(run.gates.values)
    assert torch.equal(*masks)


def test_random_depends_on_the_seed_alone_and_takes_nothing_back():
    masks = {}
    for seed in (0, 1):
        for times in range(2):
            run = start("random", seed=seed)
            run.method.update(0.4, 0.0, False)
            kept = run.gates.hard()
            run.method.update(1.0, 0.0, True)
            assert not (run.gates.hard() & ~kept).any()
            masks[seed, times] = run.gates.values
    assert torch.equal(masks[0, 0], masks[0, 1])
    assert not torch.equal(masks[0, 0], masks[1, 0])


def test_uniform_and_random_keep_the_same_share_of_every_sub_block():
    for method in ("uniform", "random"):
        run = finished(method, prune_ratio=0.6)
        share = run.gates.kept_cost() / run.method.full
        assert share.max() - share.min() < 0.07


@pytest.mark.parametrize("method, power", [("magnitude-l1", 1), ("magnitude-l2", 2)])
def test_magnitude_is_the_mean_over_all_weights_that_go_with_an_element(method, power):
    model = vit("layer_scale")
    expected = {}
    for block in (model.blocks[1],):
        for kind, first, last, norm, scale, inner in (
            ("attn", block.attn.qkv, block.attn.proj, block.norm1, block.ls1, block.attn.head_dim),
            ("mlp", block.mlp.fc1, block.mlp.fc2, block.norm2, block.ls2, block.mlp.fc1.out_features),
        ):
            reads = (first.weight * norm.weight).detach().abs() ** power
            writes = (last.weight * scale.gamma[:, None]).detach().abs() ** power
            rows, columns = torch.arange(len(reads)) % inner, torch.arange(writes.shape[1]) % inner
            total = [torch.cat((reads[rows == j].flatten(), writes[:, columns == j].flatten())) for j in range(inner)]
            expected[kind] = [reads.mean(0), writes.mean(1), torch.stack([t.mean() for t in total])]
    run = start(method, model)
    scores = run.method.scores(False).score
    for block in run.gates.blocks[2:]:
        for place, mean in zip(block.slices(), expected[block.kind], strict=True):
            norms = mean ** (1 / power)
            torch.testing.assert_close(scores[place], norms / norms.mean())


def test_magnitude_counts_value_and_gate_of_a_gated_mlp():
    packed, split = vit("registers_dinov2"), vit("aimv2", qkv_bias=True)
    with torch.no_grad():
        packed.blocks[1].mlp.fc1.weight[7 + packed.blocks[1].mlp.fc2.in_features] *= 100
        split.blocks[1].mlp.fc1_g.weight[7] *= 100
    for model in (packed, split):
        run = start("magnitude-l1", model)
        scores = run.method.scores(False).score[run.gates.blocks[3].slices()[2]]
        assert int(scores.argmax()) == 7 and len(scores) == model.blocks[1].mlp.fc2.in_features


@pytest.mark.parametrize("method", ["magnitude-l1", "magnitude-l2"])
def test_magnitude_prunes_small_weights_first(method):
    model = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[[3, 70]] *= 0.01
        model.blocks[1].mlp.fc2.weight[:, [3, 70]] *= 0.01
        model.blocks[0].attn.proj.weight[5] *= 0.01
    run = start(method, model)
    run.method.update(0.02, 0.0, False)
    gone = (~run.gates.hard()).nonzero().flatten().tolist()
    attn, mlp = run.gates.blocks[0], run.gates.blocks[3]
    assert {mlp.slices()[2].start + 3, mlp.slices()[2].start + 70, attn.slices()[1].start + 5} <= set(gone)
    assert len(gone) < 30


@pytest.mark.parametrize("method", ["taylor", "uniform", "isomorphic"])
def test_taylor_scores_find_channels_of_no_use(method):
    model = vit()
    with torch.no_grad():  # what these hidden channels write is nothing, so their gates have no gradient
        model.blocks[0].mlp.fc2.weight[:, [2, 9, 100]] = 0.0
        model.blocks[1].mlp.fc2.weight[:, 7] = 0.0
    run = start(method, model, lr=1e-12, weight_decay=0.0)
    train(run, epochs=1)
    run.count = run.milestones.start
    for _ in range(2):
        run.train_step(batches(1), Meter("cpu"))
    run.method.update(0.05, 0.0, False)
    gone = set((~run.gates.hard()).nonzero().flatten().tolist())
    first, second = (run.gates.blocks[i].slices()[2].start for i in (1, 3))
    assert {first + 2, first + 9, first + 100, second + 7} <= gone


def test_taylor_takes_nothing_back():
    run = train(start("taylor", updates_per_epoch=2, sparse_epoch=3, final_epoch=4))
    assert not any(sum(update["reactivated"].values()) for update in run.history["updates"])


def test_isomorphic_keeps_the_same_share_of_every_class():
    run = finished("isomorphic", prune_ratio=0.6)
    kept = {}
    for block in run.gates.blocks:
        for name, place in zip(block.gate_names, block.slices(), strict=True):
            kept.setdefault(name, []).append(run.gates.values[place])
    classes = {name: torch.cat(values) for name, values in kept.items()}
    assert len(classes) == 6
    pruned = {name: (1 - values.mean()).item() for name, values in classes.items()}
    for name, share in pruned.items():
        assert abs(share - pruned["mlp_hid"]) <= 1 / len(classes[name]) + 1e-6, name
    # blocks of one class may differ: the ranking is over all of them
    assert len({round(float(v.mean()), 6) for v in kept["mlp_hid"]}) == 2


def test_vtp_shrinks_the_gates_that_the_loss_does_not_hold(monkeypatch):
    monkeypatch.setattr(create("vtp"), "LEARNING_RATE", 0.1)
    run = start("vtp", sparse_epoch=9, final_epoch=9)
    run.method.PENALTY = 1e3
    train(run, epochs=1)
    assert torch.equal(run.gates.values, torch.ones_like(run.gates.values))
    train(run, epochs=1)
    assert run.gates.values.min() > 0 and run.gates.values.max() < 1
    train(run, epochs=4)
    assert not run.gates.values.any()  # never below zero
    assert run.params == int(run.gates.outside())


def test_vtp_learns_from_the_loss_alone_without_penalty():
    run = start("vtp", sparse_epoch=4, final_epoch=4)
    run.method.PENALTY = 0.0
    train(run, epochs=2)
    values = run.gates.values
    assert (values > 1).any() and (values < 1).any()


@pytest.mark.parametrize("name", ["deit", "augreg_no_qkv_bias", "layer_scale", "gap", "registers_dinov2", "aimv2"])
def test_vtp_folds_what_it_learned(name):
    run = start("vtp", vit(name))
    generator = torch.Generator().manual_seed(0)
    values = 0.3 + torch.rand(len(run.gates.values), generator=generator)
    run.gates.set(values)
    model, images = run.model.eval(), vits.images(2, 16)
    with torch.no_grad():
        masks = run.method.masks(run.method.scores(True), 1.0, True)
        run.gates.set(values * masks)
        thresholded, truth = model(images), in_float64(model, images)
        run.gates.set(values)
        run.method.update(1.0, 0.1, False)
        assert torch.equal(run.gates.values, masks)
        assert_same_to_rounding(model(images), thresholded, truth)
    assert masks[values < 0.5].mean() < masks[values > 1.0].mean()
    before = run.gates.values.clone()
    run.method.update(1.0, 0.0, True)
    assert torch.equal(run.gates.values, before)


def test_vtp_goes_on_where_it_stopped():
    whole = train(start("vtp"))
    first = train(start("vtp"), epochs=2)
    state = copy.deepcopy(first.state())
    second = start("vtp")
    second.load_state(state)
    second.epoch(2, batches(), batches(1, 1), Silent())
    assert torch.equal(second.gates.values, whole.gates.values)
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


# masks over the whole model


@pytest.mark.parametrize("method", METHODS)
def test_no_sub_block_falls_below_its_floor(method):
    run = start(method, floor=0.3, prune_ratio=0.55)
    run.gates.score_sum.copy_(torch.rand(len(run.gates.values), generator=torch.Generator().manual_seed(0)) ** 8)
    run.gates.score_sum[: run.gates.blocks[0].stop] = 0.0
    run.update(final=True)
    assert (run.gates.kept_cost() / run.method.full).min() > 0.28


# kept counts in multiples, and ranks over a sub-block


@pytest.mark.parametrize("method", ["p3b", *METHODS])
def test_a_run_ends_with_rounded_counts(method):
    run = finished(method, round_to=8, prune_ratio=0.5)
    assert all(count % 8 == 0 for kept in run.gates.kept_counts() for count in kept)
    full = float(run.method.full.sum())
    assert abs(cost(run) - run.method.target(1.0)) < 0.07 * full


def test_p3b_ranks_over_sub_blocks_where_asked():
    masks = [finished("p3b", rank_across=where).gates.values for where in ("gate", "block")]
    assert not torch.equal(*masks)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method must be one of p3b, p3b\+, uniform, .*, got 'best'"):
        create("best")
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'best'"):
        Config(method="best")


@pytest.mark.parametrize("method", [*METHODS, "p3b", "savit", "wdpruning"])
def test_a_method_needs_no_run(method):
    """A Context of plain objects and a ProbeBatch of plain tensors are enough to make and update masks."""
    model, config = p3b_ext.patch(vit()), Config(method=method, start_epoch=0, sparse_epoch=1, final_epoch=2)
    kind = create(method)
    gates = kind.attach(model)
    context = Context(model, gates, config, Milestones.of(config, 4), torch.device("cpu"), Processes())
    decides = kind(context)
    images, labels = batches(1)[0]
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    decides.begin([(images, labels)], criterion)
    tokens, count = model.patch_embed.num_patches + model.num_prefix_tokens, 2 * len(model.blocks) + 1
    stream = [torch.randn(len(labels), tokens, model.embed_dim) for _ in range(count)]
    extra = decides.loss(ProbeBatch(labels, criterion, stream=stream))
    assert extra is None or extra.isfinite()
    gates.grad.copy_(torch.rand_like(gates.grad))
    decides.stepped(torch.tensor(True), pruning=True)
    decides.update(1.0, 0.0, True)
    assert set(gates.values.tolist()) == {0.0, 1.0}
    whole = float(decides.full.sum()) + decides.outside
    assert gates.total() / whole == pytest.approx(1 - config.prune_ratio, abs=0.1)


def test_run_and_method_do_not_hold_each_other():
    """What a phase made is freed with it, without the garbage collector."""
    run = start("p3b")
    run.train_step(batches(1), Meter("cpu"))
    watched = [weakref.ref(each) for each in (run, run.method, run.step, run.step.optimizer)]
    gc.disable()
    try:
        del run
        assert [each() for each in watched] == [None] * 4
    finally:
        gc.enable()
