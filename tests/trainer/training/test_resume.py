"""A run that was stopped goes on from its last epoch and ends exactly where it would have ended."""

import itertools
import json

import pytest
import torch
from toy import batches, config, vit

import p3b
from p3b.training.resume import STATE, load_state, save_state

pytestmark = pytest.mark.filterwarnings("ignore:importance")


class Power:
    """Fails after so many epochs, as a machine does."""

    class Gone(Exception):
        pass

    def __init__(self, epochs):
        self.left = epochs

    def phase(self, name, total_epochs): ...

    def step(self, **_):
        if self.left == 0:
            raise self.Gone  # in the middle of the next epoch

    def epoch(self, record):
        self.left -= 1

    def close(self): ...


def run(settings, epochs=99, **options):
    model = vit(drop_path_rate=0.1, proj_drop_rate=0.1)  # so that random numbers matter
    return p3b.prune(model, batches(), batches(2, 1), settings, progress=Power(epochs), **options)


def same(a, b):
    assert json.dumps(a.history) == json.dumps(b.history)
    weights = a.model.state_dict()
    assert weights.keys() == b.model.state_dict().keys()
    assert all(torch.equal(weights[name], other) for name, other in b.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amp": "float16", "momentum": "sqrt", "accumulate": 2, "mixup": 0.8, "cutmix": 1.0},
        {"ema": 0.9, "select": "best", "distill": 0.5, "schedule": "cosine", "warmup_epochs": 1, "min_lr": 1e-5},
    ],
    ids=["default", "float16", "averaged"],
)
def test_a_run_stopped_in_any_epoch_ends_as_if_it_had_not(tmp_path, options):
    settings = config(finetune_epochs=3, **options)
    whole = run(settings)
    # warm-up, sparsify, sharpen, before the shrink is saved, fine-tune, last epoch
    for epochs in (1, 2, 3, 4, 5, 6):
        folder = tmp_path / str(epochs)
        folder.mkdir()
        with pytest.raises(Power.Gone):
            run(settings, epochs, state_dir=folder)
        same(whole, run(settings, state_dir=folder, resume=True))


class Shuffled:
    """Batches whose order depends on the epoch, which is counted on where nobody sets it: as `create_data` gives."""

    def __init__(self):
        self.batches, self.epoch = batches(), 0

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        start = self.epoch % len(self.batches)
        self.epoch += 1
        return iter(self.batches[start:] + self.batches[:start])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "savit"}, {"compensate": True}], ids=["savit", "compensate"])
def test_what_is_measured_on_training_images_is_measured_on_the_same(tmp_path, options, monkeypatch):
    settings = config(finetune_epochs=1, **options)

    def shuffled(epochs=99, **where):
        model = vit(drop_path_rate=0.1)
        return p3b.prune(model, Shuffled(), batches(2, 1), settings, progress=Power(epochs), **where)

    whole = shuffled()
    with pytest.raises(Power.Gone):
        shuffled(settings.start_epoch, state_dir=tmp_path)
    same(whole, shuffled(state_dir=tmp_path, resume=True))
    (tmp_path / STATE).unlink()
    with monkeypatch.context() as patched:
        patched.setattr("p3b.training.prune.shrink", lambda model: (_ for _ in ()).throw(Power.Gone))
        with pytest.raises(Power.Gone):  # between the last state of pruning and the first of fine-tuning
            shuffled(state_dir=tmp_path)
    same(whole, shuffled(state_dir=tmp_path, resume=True))


def test_a_run_goes_on_with_as_many_processes(tmp_path):
    with pytest.raises(Power.Gone):
        run(config(), 2, state_dir=tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    torch.save(state | {"random": state["random"] * 2}, tmp_path / STATE)
    with pytest.raises(ValueError, match="resume: the run had 2 processes, now there are 1"):
        run(config(), state_dir=tmp_path, resume=True)


def test_a_run_stopped_again_and_again(tmp_path):
    settings = config()
    for _ in itertools.count():
        try:
            found = run(settings, 1, state_dir=tmp_path, resume=True)
            break
        except Power.Gone:
            pass
    same(run(settings), found)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "select": "best"}])
def test_fine_tuning_goes_on(tmp_path, options):
    settings = config(finetune_epochs=3, **options)

    def tune(epochs=99, **where):
        model = vit(drop_path_rate=0.1)
        history = p3b.finetune(model, batches(), batches(2, 1), settings, progress=Power(epochs), **where)
        return history, model.state_dict()

    with pytest.raises(Power.Gone):
        tune(2, state_dir=tmp_path)
    (history, weights), (other, others) = tune(), tune(state_dir=tmp_path, resume=True)
    assert history == other and all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_state_is_plain_and_whole(tmp_path):
    with pytest.raises(Power.Gone):
        run(config(), 2, state_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [STATE]
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert state["phase"] == "prune" and state["epoch"] == 2 and state["config"]["prune_ratio"] == 0.5


def test_a_state_of_another_run_is_refused(tmp_path):
    with pytest.raises(Power.Gone):
        run(config(), 2, state_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^resume: prune_ratio must be the run's 0.5, got 0.4$"):
        run(config(prune_ratio=0.4), state_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds the state of a pruning run"):
        p3b.finetune(vit(), batches(), batches(2, 1), config(), state_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="state_dir must be given"):
        run(config(), resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"x" * 1000])
def test_a_broken_state_is_one_line(tmp_path, content):
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError, match=r"^resume: .* is damaged") as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / STATE)
    with pytest.raises(ValueError, match="is no checkpoint of a p3b run"):
        load_state(tmp_path)


def test_a_full_disk_leaves_the_state_before(tmp_path):
    save_state(tmp_path, {"epoch": 1})

    class Full(dict):
        def __reduce__(self):
            raise RuntimeError("[enforce fail] unexpected pos 64 vs 0")

    with pytest.raises(OSError, match=r"cannot be written"):
        save_state(tmp_path, {"epoch": Full()})
    assert load_state(tmp_path)["epoch"] == 1 and len(list(tmp_path.iterdir())) == 1
