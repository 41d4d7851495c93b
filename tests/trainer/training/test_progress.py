"""What a run shows: a bar on a terminal, one line a phase on a log."""

import re

from p3b.training.progress import ProgressBar


def test_progress_on_a_log_is_one_line_a_phase(capsys):
    with ProgressBar() as progress:
        progress.phase("prune", 2)
        for epoch in range(2):
            for step in range(3):
                values = dict(loss=1.0 / (1 + step), accuracy=50.0 + epoch, params=1_500_000)
                progress.step(phase="prune", epoch=epoch, step=step, steps=3, **values)
    line = capsys.readouterr().err
    assert re.fullmatch(r"prune: epoch 2/2  loss 0\.333  top-1 51\.0 %  1\.500 M params  \d+\.\d s\n", line)


def test_progress_bar_shows_phase_epoch_loss_accuracy_and_parameters(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ProgressBar() as progress:
        progress.phase("prune", 1)
        progress.step(phase="prune", epoch=0, step=2, steps=3, loss=0.25, accuracy=75.0, params=2_000_000)
    shown = capsys.readouterr().err
    for part in ("prune", "100%", "epoch 1/1", "loss 0.250", "top-1 75.0 %", "2.000 M params"):
        assert part in shown
