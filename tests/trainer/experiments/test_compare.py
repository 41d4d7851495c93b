"""p3b compare: every job runs once, one that fails stops nothing, and the table holds what the jobs found."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from p3b.cli import main
from p3b.config import Config, recipes
from p3b.experiments.compare import runner as module
from p3b.experiments.compare.runner import FirstImages, compare
from p3b.experiments.compare.task import Task, comparisons
from p3b.metrics import table

TINY = """
title = "Digits"
model_kwargs = { patch_size = 4, embed_dim = 24, depth = 2, num_heads = 3 }
img_size = 8
batch_size = 32
methods = ["p3b", "uniform"]
ratios = [0.5]
seeds = [0, 1]
timed_batch = 8
images_per_epoch_check = 8

[source]
data = "digits"
classes = [0, 1, 2]
epochs = 1
trainer = { device = "cpu", finetune_lr = 2e-3 }

[target]
data = "digits"
classes = [5, 6]
train_images = 96

[trainer]
start_epoch = 0
sparse_epoch = 1
final_epoch = 2
finetune_epochs = 1
device = "cpu"
"""
NAMES = ["source", *(f"{kind}-s{seed}" for seed in (0, 1) for kind in ("dense", "p3b-0.5", "uniform-0.5"))]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Inside:
    """What a worker process is to the pool, as a function call: Python's start-up would be most of the tests' time."""

    started: list  # names of the jobs
    lock = threading.Lock()

    def __init__(self, path, source, environment):
        out = io.StringIO()
        # The pool's threads start jobs side by side; in one process they share random generators and stdout.
        with Inside.lock, pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
            Inside.started.append(path.name)
            patch.setenv("OMP_NUM_THREADS", environment["OMP_NUM_THREADS"])
            self.returncode = module.run_worker(path, source)
        (path / module.LOG).write_text(out.getvalue())

    def wait(self):
        return self.returncode

    poll = wait


@pytest.fixture(autouse=True)
def inside(monkeypatch):
    Inside.started = []
    monkeypatch.setattr(module, "start_worker", Inside)
    monkeypatch.setattr(module, "POLL", 0)


def task(**changes):
    return dataclasses.replace(Task(**tomllib.loads(TINY)), **changes)


def quietly(*_):
    """Says nothing."""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder and the results of a whole comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "start_worker", Inside)
        Inside.started = []
        folder = tmp_path_factory.mktemp("compare") / "digits"
        said = []
        results = compare(task(), folder, jobs=2, command="p3b compare digits", say=said.append)
    return folder, results, said, Inside.started


def jobs_of(folder):
    return {path.name: json.loads((path / "metrics.json").read_text()) for path in (folder / "jobs").iterdir()}


@pytest.mark.slow
def test_every_job_is_the_run_of_its_method_ratio_and_seed(done):
    folder, results, said, started = done
    assert sorted(started) == sorted(NAMES) and [row["name"] for row in results["jobs"]] == NAMES
    assert said[0] == "Digits: 7 jobs, 0 of them done, 2 at a time" and said[-1] == "measuring throughput"
    assert said[1].startswith("[1/1] source: top-1 ") and said[-2].startswith("[6/6] ")
    for name, found in jobs_of(folder).items():
        config = Config.from_dict(json.loads((folder / "jobs" / name / "job.json").read_text())["config"])
        history = json.loads((folder / "jobs" / name / "history.json").read_text())
        if name == "source":
            assert len(history["epochs"]) == 1 and config.finetune_lr == 2e-3
            continue
        kind, seed = name.rsplit("-s", 1)
        assert config.seed == int(seed) and len(history["epochs"]) == 3
        if kind == "dense":
            assert "updates" not in history
        else:
            assert f"{config.method}-{config.prune_ratio}" == kind and history["updates"]
            assert abs(found["params"] / found["dense_params"] - 0.5) < 0.05
        assert found["images"] == 72  # all of the test images, whatever is read after an epoch
        assert not (folder / "jobs" / name / "state.pt").exists()


@pytest.mark.slow
def test_the_table_holds_mean_and_spread_over_the_seeds(done):
    folder, results, _, _ = done
    found = jobs_of(folder)
    page = (folder / "table.md").read_text()
    assert [line["method"] for line in results["summary"]] == ["dense", "p3b", "uniform"]
    for line in results["summary"]:
        kind = "dense" if line["ratio"] is None else f"{line['method']}-0.5"
        values = [found[f"{kind}-s{seed}"]["top1"] for seed in (0, 1)]
        mean, spread = statistics.mean(values), statistics.stdev(values)
        assert (line["seeds"], line["top1"]["mean"]) == (2, mean) and line["top1"]["spread"] == pytest.approx(spread)
        shown = f"{mean:.2f} ± {spread:.2f}" if f"{spread:.2f}" != "0.00" else f"{mean:.2f}"
        name = "dense" if line["ratio"] is None else f"{line['method']} 50 %"
        assert re.search(rf"\| {re.escape(name)} +\| +2 \| +{re.escape(shown)} \|", page)
        if line["ratio"] is not None:
            against = [v - found[f"dense-s{seed}"]["top1"] for seed, v in enumerate(values)]
            assert line["accuracy_improvement"]["mean"] == pytest.approx(statistics.mean(against))
            assert 45 < line["parameter_reduction"]["mean"] < 55 and 30 < line["flops_reduction"]["mean"] < 70
            assert line["images_per_second"]["mean"] > 0 and "throughput_improvement" in line
    assert (
        "p3b compare digits" in page
        and "All start from one model" in page
        and "the first 8 test images" in page
        and "images/s is the median" in page
    )
    assert json.loads((folder / "results.json").read_text())["summary"] == results["summary"]


@pytest.mark.slow
def test_reactivations_and_plots_come_from_the_histories(done):
    folder, results, _, _ = done
    for each in results["reactivation"]:
        updates = [
            update
            for seed in (0, 1)
            for update in json.loads((folder / "jobs" / f"{each['method']}-0.5-s{seed}" / "history.json").read_text())[
                "updates"
            ]
        ]
        total = sum(sum(update["reactivated"].values()) for update in updates) / 2
        assert each["came_back"] == pytest.approx(total) and each["removed"] > 0
        assert sum(each["by_block"].values()) == pytest.approx(sum(count for _, count in each["by_epoch"]))
    pictures = {path.name for path in folder.glob("*.png")}
    wanted = {"accuracy_ratio", "accuracy_throughput", "benefit-p3b-0.5", "keep_ratio-0.5", "reactivation-0.5"}
    assert pictures == {f"{name}.png" for name in wanted}
    assert all(f"({name})" in (folder / "table.md").read_text() for name in pictures)


@pytest.mark.slow
def test_timed_with_as_many_threads_as_a_job_has(done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "copy")
    (folder / "throughput.json").unlink()
    seen = []

    def measure(*args, **options):
        seen.append(torch.get_num_threads())
        return table.measure(*args, **options)

    monkeypatch.setattr(module, "measure", measure)
    compare(task(), folder, threads=2, say=quietly)
    assert seen == [2] and torch.get_num_threads() == 1


@pytest.mark.slow
def test_what_is_done_is_not_run_again(done, capsys):
    folder, before, _, _ = done
    kept = (folder / "throughput.json").stat().st_mtime_ns
    again = compare(task(), folder, say=quietly)
    assert Inside.started == [] and again["summary"] == before["summary"]
    assert (folder / "throughput.json").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"p3b-0.5-s0 was run with other settings: config.lr was None and is now 0.01"):
        compare(task(settings={"p3b": {"lr": 0.01}}), folder, say=quietly)
    path = folder.parent / "tiny.toml"
    path.write_text(TINY)
    assert main(["compare", str(path), "--output", str(folder), "--methods", "uniform", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert Inside.started == [] and "Digits: 3 jobs, 3 of them done" in out and "p3b 50 %" not in out


@pytest.mark.slow
def test_a_job_that_fails_is_in_the_table_and_stops_nothing(tmp_path, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY + "[settings.uniform]\nlr = 1e30\n")
    arguments = ["compare", str(path), "--output", str(tmp_path / "run"), "--seeds", "0", "--jobs", "1"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "1 of 4 jobs failed: uniform-0.5-s0" in captured.err
    assert "p3b 50 % " in captured.out and "0 (1 failed)" in captured.out
    page = (tmp_path / "run" / "table.md").read_text()
    assert "- uniform-0.5-s0: train: " in page and "3 of 4 jobs are done" in page
    assert "Diverged" in (tmp_path / "run" / "jobs" / "uniform-0.5-s0" / "log.txt").read_text()
    Inside.started.clear()
    assert main(arguments) == 2
    assert Inside.started == ["uniform-0.5-s0"]


def test_a_failing_source_stage_ends_the_comparison(tmp_path):
    broken = task(source=dataclasses.replace(task().source, trainer={"device": "cpu", "finetune_lr": 1e30}))
    with pytest.raises(ValueError, match="the source stage failed: train: "):
        compare(broken, tmp_path / "run", say=quietly)
    assert Inside.started == ["source"]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(done, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a job: the worker ends too, and the run that goes on ends as if nothing had been."""
    monkeypatch.undo()
    folder, config = tmp_path / "run", tmp_path / "tiny.toml"
    config.write_text(TINY)
    jobs = folder / "jobs"
    jobs.mkdir(parents=True)
    for name in ("source", "dense-s0"):
        os.symlink(done[0] / "jobs" / name, jobs / name)
    command = [sys.executable, "-m", "p3b", "compare", str(config), "--output", str(folder), "--jobs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--seeds", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell's background jobs ignore it, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state, deadline = jobs / "p3b-0.5-s0" / "state.pt", time.monotonic() + 240
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command continues from there" in error, error
    assert not (jobs / "p3b-0.5-s0" / "metrics.json").exists()

    monkeypatch.setattr(module, "start_worker", Inside)
    compare(task(seeds=[0]), folder, say=quietly)
    assert Inside.started == ["p3b-0.5-s0", "uniform-0.5-s0"]
    for name in Inside.started:
        one, two = (json.loads((path / "jobs" / name / "metrics.json").read_text()) for path in (done[0], folder))
        assert one["top1"] == two["top1"] and one["loss"] == two["loss"] and one["params"] == two["params"]
    assert "seconds" not in json.loads((jobs / "p3b-0.5-s0" / "metrics.json").read_text())


def alive(pid):
    """Whether a process runs still; an orphan that nobody waits for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    job = next(job for job in task().jobs() if job.name == "source")
    job.spec["epochs"] = 10**6
    path = tmp_path / "source"
    path.mkdir()
    (path / "job.json").write_text(json.dumps(job.spec))
    starter = (
        "import os, sys, time; from pathlib import Path; path = Path(sys.argv[1])\n"
        "from p3b.experiments.compare.runner import start_worker\n"
        "process = start_worker(path, path, os.environ | {'OMP_NUM_THREADS': '1'})\n"
        "print(process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter, str(path)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    try:
        deadline = time.monotonic() + 240
        while not (path / "fraction").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (path / "fraction").exists(), (path / "log.txt").read_text()
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(worker)


def test_one_comparison_at_a_time(tmp_path):
    with module.owned(tmp_path / "run"):
        with pytest.raises(ValueError, match=r"another p3b compare writes to"):
            compare(task(), tmp_path / "run", say=quietly)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="which holds other files"):
        compare(task(), other, say=quietly)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_method_twice_with_other_settings():
    values = tomllib.loads(TINY + "[settings.floored]\nmethod = 'p3b+'\nfloor = 0.1\n")
    values["methods"] = ["p3b", "floored"]
    configs = {job.name: Config.from_dict(job.spec["config"]) for job in Task(**values).jobs() if job.method}
    found = {name: (c.method, c.floor, c.rank_across, c.seed) for name, c in configs.items()}
    assert found["p3b-0.5-s0"] == ("p3b", 0.0, "gate", 0)
    assert found["floored-0.5-s1"] == ("p3b+", 0.1, "block", 1)


@pytest.mark.slow
def test_a_method_that_distils_asks_the_dense_model_of_its_seed(tmp_path):
    values = tomllib.loads(TINY + "[settings.asking]\nmethod = 'p3b'\ndistill = 0.5\n")
    values |= {"methods": ["asking"], "seeds": [1]}
    result = compare(Task(**values), tmp_path / "run", say=quietly)  # start_epoch 0: no teacher of its own
    assert Inside.started == ["source", "dense-s1", "asking-0.5-s1"]
    assert [row["name"] for row in result["jobs"] if "error" in row] == []


@pytest.mark.parametrize("name", comparisons())
def test_the_shipped_comparisons_can_be_run(name):
    jobs = (
        Task.from_file(name).use(data="digits", **({"source": "digits"} if Task.from_file(name).source else {})).jobs()
    )
    assert len({job.name for job in jobs}) == len(jobs) > 2
    for job in jobs:
        assert Config.from_dict(job.spec["config"]).seed == job.seed
    assert name not in recipes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1e-3", "CONFIG must be a comparison .* the settings of one run, which p3b prune --config takes"),
        ("metods = ['p3b']", "key of .* must be one of .*, got 'metods'; did you mean methods"),
        ("methods = ['p3c']", "methods must be one of .*, got 'p3c'; did you mean p3b"),
        ("methods = 'p3b'", "methods of .* must be list, got 'p3b'"),
        ("seeds = [0, 0]", "seeds must be a list without repeats"),
        ("seeds = [[0], [0]]", "seeds must be a list without repeats"),
        ("ratios = [0.5, 0.5000001]", "ratios must differ in their first six digits, got .*, 0.5000001"),
        ("ratios = [0.5, '0.5']", "ratios must be numbers, got '0.5'"),
        ("timed_batch = 0", "timed_batch must be 1 or more, got 0"),
        ("[source]\nepochs = 0", r"epochs of \[source\] must be 1 or more"),
        ("[target]\nimages = 5", r"key of \[target\] must be one of .* got 'images'"),
        ("[settings.p4b]\nlr = 1.0", "settings must be one of .* got 'p4b'"),
        ("[settings.p4b]\nmethod = 'p3c'", r"method of \[settings.p4b\] must be one of .* got 'p3c'; did you mean p3b"),
        ("[settings.p3b]\nmethod = 'uniform'", "must leave out method, which each job sets itself"),
        ("[settings.'a/b']\nmethod = 'p3b'", r"NAME of \[settings.NAME\] must be of letters, .* got 'a/b'"),
        ("[trainer]\nseed = 1\n", "must leave out seed, which each job sets itself"),
        ("[trainer]\nlr = -1.0\n[target]\ndata = 'digits'", "lr must be above 0"),
        ("title = 'x'", r"\[target\] has no data; give it in the file or with --data"),
        ("methods = [", "cannot be read as TOML"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert main(["compare", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_names_of_either_kind_are_told_apart(tmp_path, capsys):
    assert main(["compare", recipes()[0], "--output", str(tmp_path / "out")]) == 2
    assert "must be a comparison" in capsys.readouterr().err
    assert main(["compare", "no-such-thing", "--output", str(tmp_path / "out")]) == 2
    assert "must be a TOML file or one of" in capsys.readouterr().err
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    assert main(["prune", "--config", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "is a comparison, not the settings of one run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="source must be left out for a comparison without"):
        task(source=None).use(source="digits")


def test_the_first_images():
    batches = [(torch.zeros(4, 1), torch.zeros(4)) for _ in range(5)]
    assert [len(list(FirstImages(batches, n))) for n in (1, 4, 5, 100)] == [1, 1, 2, 5]


def test_slots():
    cores = len(os.sched_getaffinity(0))
    assert module.slots(0, 0, "cpu") == ([None] * cores, 1)
    assert module.slots(0, 10**6, "cpu") == ([None], 10**6)
    assert module.slots(3, 2, "cpu") == ([None] * 3, 2)
    with pytest.raises(ValueError, match="jobs and threads must be 1 or more"):
        module.slots(-1, 0, "cpu")


def test_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert module.slots(3, 1, "auto") == ([0, 1, 0], 1)
    assert module.slots(0, 0, "cuda")[0] == [0, 1]
    assert module.slots(1, 1, "cpu") == ([None], 1)
