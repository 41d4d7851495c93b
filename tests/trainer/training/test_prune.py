"""The prune run from end to end on a task of a second: what it trains, what it must not touch, what it writes
down."""

import copy
import gc
import json
import re

import pytest
import torch
from cases import assert_near, assert_same_to_rounding, in_float64
from toy import BATCH, CLASSES, STEPS, Recorder, batches, config, prune, pruning_phase, vit

import p3b
from p3b import Config
from p3b.training.prune import PruningPhase
from p3b.training.step import Step
from p3b_ext.patch import unpatch

# a task this short leaves some updates without a positive benefit; pruning/test_benefit.py tests that warning
pytestmark = pytest.mark.filterwarnings("ignore:importance")


def test_prune_from_end_to_end():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    progress = Recorder()
    result = p3b.prune(model, batches(), batches(2, 1), config(prune_ratio=0.5), progress=progress)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))

    history = json.loads(json.dumps(result.history, allow_nan=False))
    names = ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert history["blocks"] == names
    assert history["dense_params"] == sum(p.numel() for p in model.parameters())
    assert history["final_params"] == sum(p.numel() for p in result.model.parameters())
    assert history["final_params"] / history["dense_params"] == pytest.approx(0.5, abs=0.02)
    assert history["accuracy_masked"] == history["accuracy_shrunk"]
    assert history["accuracy_final"] > 60  # chance is 25
    assert [(e["phase"], e["epoch"]) for e in history["epochs"]] == [
        *(("prune", i) for i in range(4)),
        *(("finetune", i) for i in range(2)),
    ]
    for record in history["epochs"][:4]:
        assert list(record["keep_ratio"]) == names
    kept = [record["params"] for record in history["epochs"]]
    assert kept[0] == history["dense_params"] and kept[-1] == history["final_params"]

    updates = history["updates"]
    assert [u["step"] for u in updates] == [*range(7, 24, 2), 24]
    for update in updates:
        assert set(update["benefit"]) == {"cls", "patch"}
        for key in ("importance", "goal_keep_ratio", "keep_ratio", "reactivated", "removed"):
            assert list(update[key]) == names, key
    assert [u["params"] for u in updates[:3]] == sorted((u["params"] for u in updates[:3]), reverse=True)
    assert updates[-1]["params"] == history["final_params"]

    assert progress.calls[0] == ("phase", "prune", 4) and progress.calls[-1] == ("close",)
    assert progress.calls.count(("close",)) == 1 and ("phase", "finetune", 2) in progress.calls
    assert sum(call[0] == "step" for call in progress.calls) == 6 * STEPS

    x = batches(1, 5)[0][0]
    result.model.eval()
    plain = unpatch(copy.deepcopy(result.model))
    assert_same_to_rounding(result.model(x), plain(x), in_float64(plain, x))


@pytest.mark.slow
def test_same_seed_same_run():
    first, second = prune(seed=3), prune(seed=3)
    assert first.history == second.history
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.model.p3b_kept == second.model.p3b_kept
    assert prune(seed=4).history != first.history


@pytest.mark.parametrize("name", ["distilled", "gap", "layer_scale", "qk_norm", "reg4_gap", "augreg_no_qkv_bias"])
def test_every_family_can_be_pruned(name):
    result = prune(vit(name), finetune_epochs=0)
    assert result.summary["accuracy_masked"] == result.summary["accuracy_shrunk"] == result.summary["accuracy_final"]
    assert result.summary["final_params"] < 0.53 * result.summary["dense_params"]
    has_class_token = name in ("distilled", "layer_scale", "qk_norm", "augreg_no_qkv_bias")
    assert ("cls" in result.history["updates"][-1]["benefit"]) == has_class_token


@pytest.mark.parametrize(
    "options",
    [
        {"amp": "bfloat16"},
        {"budget": "macs", "momentum": "sqrt"},
        {"patch_probe": "conv", "probe_share": 0.5, "probe_every": 2},
        {"patch_probe": "linear", "clip_grad": 1.0, "schedule": "cosine"},
        {"opt": "sgd", "rank_zero_by": "last", "floor": 0.1, "schedule": "constant"},
        {"final_epoch": 3, "opt": "lamb"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_settings_run(options):
    result = prune(finetune_epochs=1, **options)
    unit = options.get("budget", "params")
    if unit == "params":
        assert result.summary["final_params"] / result.summary["dense_params"] == pytest.approx(0.5, abs=0.03)
    assert min(result.history["updates"][-1]["goal_keep_ratio"].values()) >= options.get("floor", 0)


def test_soft_targets_give_the_same_losses_as_labels():
    soft = [(x, torch.nn.functional.one_hot(y, CLASSES).float()) for x, y in batches()]
    hard = prune(label_smoothing=0.0, finetune_epochs=0)
    again = prune(label_smoothing=0.0, finetune_epochs=0, train=soft)
    for a, b in zip(hard.history["epochs"], again.history["epochs"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


# the step


@pytest.mark.slow
def test_what_pruning_held_is_gone_when_fine_tuning_begins():
    """The optimizer's state of the whole model is three times its size."""

    class Looking(Recorder):
        def phase(self, name, total_epochs):
            found = [each for each in gc.get_objects() if isinstance(each, (PruningPhase, Step))]
            self.calls.append((name, len(found)))

    gc.collect()
    progress = Looking()
    p3b.prune(vit(), batches(2), batches(1, 1), config(finetune_epochs=1), progress=progress)
    assert [call for call in progress.calls if call[0] in ("prune", "finetune")] == [("prune", 2), ("finetune", 1)]


def test_the_best_epoch_is_one_of_the_pruned_model():
    result = prune(select="best", finetune_epochs=3, finetune_lr=0.3, schedule="constant")  # which spoils it
    by_phase = {"prune": [], "finetune": []}
    for record in result.history["epochs"]:
        by_phase[record["phase"]].append(record["val_accuracy"])
    assert max(by_phase["prune"]) > max(by_phase["finetune"]) == result.summary["accuracy_final"], by_phase
    assert result.summary["final_params"] == sum(p.numel() for p in result.model.parameters())
    right = sum(int((result.model.eval()(x).argmax(1) == y).sum()) for x, y in batches(2, 1))
    assert 100 * right / (2 * BATCH) == pytest.approx(result.summary["accuracy_final"])


def test_backbone_and_probes_train_in_train_mode():
    modes = []
    model = vit(pos_drop_rate=0.1)
    model.pos_drop.register_forward_hook(lambda module, *_: modes.append(module.training))
    p3b.prune(model, batches(2), batches(1, 1), config(sparse_epoch=2, final_epoch=2, finetune_epochs=1))
    per_epoch = [True, True, False]
    assert modes == [
        *per_epoch,
        *per_epoch,
        False,
        False,
        *per_epoch,
    ]  # masked and shrunk are evaluated between


# decisions


def test_a_block_whose_benefit_rises_late_regains_channels():
    """Reactivation: early updates starve the last MLP, later ones find it useful; its channels come back, the
    budget holds."""
    run, meter = pruning_phase(
        vit(depth=3),
        start_epoch=0,
        sparse_epoch=2,
        final_epoch=30,
        prune_ratio=0.6,
        gamma=0.5,
        updates_per_epoch=2,
    )
    late = "blocks.2.mlp"
    place = run.history["blocks"].index(late)
    data = batches()
    for number in range(16):
        for batch in data[:3]:
            run.train_step([batch], meter)
        benefit = torch.full((len(run.history["blocks"]),), 0.3, dtype=torch.float64)
        benefit[place] = -0.2 if number < 8 else 1.5
        run.method.benefit.take = lambda gathered, values=benefit: {"cls": values, "patch": values}
        run.update()
    updates = run.history["updates"]
    starved, fed = updates[7], updates[-1]
    assert starved["keep_ratio"][late] < 0.1
    assert fed["keep_ratio"][late] > starved["keep_ratio"][late] + 0.3
    returned = sum(update["reactivated"][late] for update in updates[8:])
    assert returned > 20
    assert sum(update["reactivated"][late] for update in updates[8:10]) > 0
    for update in updates[6:]:
        assert update["params"] / run.history["dense_params"] == pytest.approx(0.4, abs=0.03)


def test_unreachable_budget_fails_before_training():
    with pytest.raises(ValueError, match=r"prune_ratio must be at most 0\.\d+ \(the smallest possible model keeps"):
        prune(prune_ratio=0.99)


@pytest.mark.parametrize(
    "train, options, error, message",
    [
        (iter([]), {}, TypeError, "train_loader must have a length"),
        ([], {}, ValueError, "train_loader must give at least accumulate = 1 batches, got 0"),
        (None, {"opt": "no-such"}, ValueError, "opt must be an optimizer that timm knows, got 'no-such'"),
        (None, {"device": "toaster"}, ValueError, "name must be a device of this machine, got 'toaster'"),
    ],
)
def test_bad_arguments(train, options, error, message):
    with pytest.raises(error, match=message):
        p3b.prune(vit(), batches() if train is None else train, batches(1), config(**options))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, y: (x, y.int()), TypeError, "labels must be int64 .*, got torch.int32"),
        (lambda x, y: (x, y + 1), ValueError, "labels must be 0 to 3, got 1 to 4"),
        (lambda x, y: (x, y - 1), ValueError, "labels must be 0 to 3, got -1 to 2"),
        (lambda x, y: (x, y[:-1]), ValueError, r"labels must be \[16\], one per image, got \[15\]"),
        (lambda x, y: (x, torch.rand(BATCH, 5)), ValueError, r"soft targets must be \[16, 4\], got \[16, 5\]"),
        (lambda x, y: (x.byte(), y), TypeError, "images must have the model's dtype torch.float32, got torch.uint8"),
        (lambda x, y: (x[0], y), ValueError, r"images must be \[B, C, H, W\], got \[3, 16, 16\]"),
        (lambda x, y: {"x": x, "y": y}, TypeError, "batch must be two tensors, images and targets, got dict"),
    ],
)
@pytest.mark.parametrize("call", [p3b.prune, p3b.finetune])
def test_a_batch_that_does_not_fit_is_refused(call, change, error, message):
    with pytest.raises(error, match=f"^train: {message}$"):
        call(vit(), [change(*batch) for batch in batches(2)], batches(1), config())


@pytest.mark.parametrize("call", [p3b.prune, p3b.finetune])
@pytest.mark.parametrize("settings", [{}, {"lr": 1e-3}])
def test_config_is_a_config(call, settings):
    with pytest.raises(TypeError, match=r"config must be a p3b\.Config .*, got dict"):
        call(vit(), batches(1), batches(1), settings)


def test_result_can_be_saved_and_loaded(tmp_path):
    result = prune(finetune_epochs=1)
    loaded = p3b.load(p3b.save(result, tmp_path / "run", meta={"data": "colours"}))
    x = batches(1, 5)[0][0]
    assert_near(loaded(x), result.model.eval()(x))
    description = json.loads((tmp_path / "run" / "model.json").read_text())
    assert Config.from_dict(description["config"]) == result.config
    assert description["summary"] == result.summary


# settings


def test_a_model_without_pooling_says_so():
    with pytest.raises(
        ValueError, match=re.escape("model must give logits [B, K], got [16, 17, 4]; set its global_pool")
    ):
        prune(vit(global_pool=""))


def test_masks_that_miss_the_budget_say_so():
    with pytest.warns(UserWarning, match=r"the masks prune .* where 50.0% was asked for; a round_to below 1000"):
        prune(round_to=1000)


def test_compensation_changes_biases_and_nothing_else():
    plain, kept = prune(finetune_epochs=0), prune(finetune_epochs=0, compensate=True)
    assert plain.model.p3b_kept == kept.model.p3b_kept
    changed = {
        name
        for (name, a), b in zip(plain.model.named_parameters(), kept.model.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed and all(name.endswith((".bias", "_constant")) for name in changed)
    assert kept.history["accuracy_masked"] == kept.history["accuracy_shrunk"]
    with pytest.raises(NotImplementedError, match="compensate: "):
        prune(vit(qkv_bias=False), compensate=True)
