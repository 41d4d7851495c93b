"""Two processes decide what one process on the same images decides."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import toy
from toy import SETTINGS, batches, config, vit

import p3b
from p3b.training.distributed import Processes, processes

pytestmark = pytest.mark.filterwarnings("ignore:importance")

CASES = {
    "pointwise": {},
    "conv": {"patch_probe": "conv", "patch_probe_width": 8, "momentum": "sqrt", "clip_grad": 1.0},
    "savit": {"method": "savit"},
    "accumulated": {"patch_probe": "linear", "accumulate": 2, "ema": 0.9},
}


class Part:
    """Every world-th image of each batch: what `read_data(rank=, world=)` gives."""

    def __init__(self, whole, rank, world):
        self.parts = [(images[rank::world], labels[rank::world]) for images, labels in whole]

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        return iter(self.parts)


def run(options, group, **keywords):
    train, val = (Part(batches(n, seed), group.rank, group.world) for n, seed in ((6, 0), (2, 1)))
    # Not Adam, which makes whole steps of gradients that are rounding alone.
    return p3b.prune(vit(), train, val, config(opt="sgd", lr=3e-2, finetune_lr=3e-2, **options), **keywords)


def worker(case, folder):
    """What each process of the test does."""
    torch.set_num_threads(1)
    with processes("cpu") as (group, device):
        assert device == "cpu" and group.world == 2
        found = run(CASES[case], group)
        weights = torch.cat([p.detach().flatten() for p in found.model.parameters()])
        everywhere = group.all_gather(weights)
        assert torch.equal(everywhere[0], everywhere[1]), "the processes must hold the same weights"
        if group.first:
            torch.save({"history": json.dumps(found.history), "kept": found.model.p3b_kept, "weights": weights}, folder)


def torchrun(case, path):
    """The environment that torchrun gives, for two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = os.path.dirname(__file__), os.path.dirname(toy.__file__)
    command = f"import test_distributed as t; t.worker({case!r}, {str(path)!r})"
    started = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", command], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_masks_of_one(case, tmp_path):
    torchrun(case, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = run(CASES[case], Processes())
    assert found["kept"] == alone.model.p3b_kept
    history = json.loads(found["history"])
    for mine, theirs in zip(alone.history["updates"], history["updates"], strict=True):
        assert mine["keep_ratio"] == theirs["keep_ratio"] and mine.get("reactivated") == theirs.get("reactivated")
        for criterion, values in mine.get("benefit", {}).items():
            assert list(values.values()) == pytest.approx(list(theirs["benefit"][criterion].values()), abs=1e-4)
    for mine, theirs in zip(alone.history["epochs"], history["epochs"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    weights = torch.cat([p.detach().flatten() for p in alone.model.parameters()])
    torch.testing.assert_close(found["weights"], weights, rtol=1e-3, atol=1e-4)


def test_one_process_needs_no_group():
    group = Processes()
    x = torch.ones(3)
    group.all_reduce_sum([x])
    group.all_reduce_mean([x])
    group.broadcast([x])
    assert group.first and group.all_gather("a") == ["a"] and x.tolist() == [1, 1, 1]
    with processes("cpu") as (alone, device):
        assert alone.world == 1 and device == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_command_line_under_torchrun(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))

    def start(name, *python):
        command = [*python, "-m", "p3b", "prune", "--config", "settings.json", "--output", name, "--threads", "1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment)

    def run(name, *python):
        found = start(name, *python)
        assert found.returncode == 0, found.stderr
        return found.stdout, json.loads((tmp_path / name / "history.json").read_text())

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    alone, history = run("alone", sys.executable)
    text, together = run("together", *several)
    assert text.count("written to together") == 1 and text.count("pruned") == alone.count("pruned")
    assert [u["keep_ratio"] for u in together["updates"]] == [u["keep_ratio"] for u in history["updates"]]
    for mine, theirs in zip(history["epochs"], together["epochs"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert not (tmp_path / "together.unfinished").exists()
    again = start("together", *several)  # the folder holds a run now: the first process says so, the other just ends
    assert again.returncode != 0 and again.stderr.count("already holds a run") == 1, again.stderr
    assert "p3b/cli/" not in again.stderr and "gloo" not in again.stderr, (
        again.stderr
    )  # the launcher has its own traceback
