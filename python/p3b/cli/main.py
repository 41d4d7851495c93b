# SPDX-License-Identifier: MIT
"""The command line: `p3b demo | prune | finetune | evaluate | report | bench | scores | compare | visualize | export`.

An error of the user is one line on stderr and exit code 2; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import p3b_ext

from ..data.loaders import worker_death
from ..training.memory import out_of_memory
from ..training.step import Diverged
from . import bench, compare, demo, evaluate, export, report, scores, train, visualize
from .flags import Parser, add_flags, made

# Errors that a user can correct. Any other error is a bug and shows its traceback.
USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, Diverged)
COMMANDS: dict[str, Any] = {  # dataclasses with a sentence, an EXAMPLE and a method `run`
    "demo": demo.Demo,
    "prune": train.Prune,
    "finetune": train.Finetune,
    "evaluate": evaluate.Evaluate,
    "report": report.Report,
    "bench": bench.Bench,
    "scores": scores.Scores,
    "compare": compare.Compare,
    "visualize": visualize.Visualize,
    "export": export.Export,
}
LESS_MEMORY = {  # command -> remedy for an out-of-memory error
    "prune": "a smaller --batch-size needs less, and --accumulate then makes steps of as many images",
    "bench": "a smaller --batch-size needs less",
    "compare": "a smaller timed_batch or fewer --jobs need less",
    "export": "a smaller --batch needs less",
    "visualize": "another --device may have more",
}
LESS_MEMORY["finetune"] = LESS_MEMORY["prune"]
LESS_MEMORY |= dict.fromkeys(("evaluate", "scores"), LESS_MEMORY["bench"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 2 user error, 128 + number of the signal that ended it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, unknown = parser().parse_known_args(arguments)
        if unknown:
            options.parser.error(f"unknown flag {' '.join(unknown)}")
    except SystemExit as end:  # argparse has printed the help or the error
        return int(end.code or 0)
    command = options.command
    try:
        with _stoppable(), _quiet():
            made(COMMANDS[command], options).run(shlex.join(["p3b", *arguments]))
    except KeyboardInterrupt as stop:
        notes = "; ".join(getattr(stop, "__notes__", ["nothing was written"]))
        print(f"p3b {command}: interrupted, {notes}", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, _Stopped) else signal.SIGINT)
    except Exception as error:
        if options.debug or not (isinstance(error, USER_ERRORS) or worker_death(error) or out_of_memory(error)):
            raise
        print(f"p3b {command}: {_one_line(error, command)}", file=sys.stderr)
        return 2
    return 0


def parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="p3b",
        description="Make a Vision Transformer small for your own images: prune it by block benefit, fine-tune it, "
        "compare it with the dense model.",
        epilog="start with: p3b demo; p3b COMMAND --help explains a command",
    )
    top.add_argument("--version", action="version", version=f"p3b {p3b_ext.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, cls in COMMANDS.items():
        text = " ".join(cls.__doc__.split())
        sub = commands.add_parser(
            name,
            help=text,
            usage=getattr(cls, "USAGE", None),
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {cls.EXAMPLE}",
        )
        sub.set_defaults(parser=sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_flags(sub, cls)
        for title, settings, leave_out in getattr(cls, "SETTINGS", ()):
            add_flags(sub.add_argument_group(title), settings, leave_out=leave_out, suppressed=True)
    return top


class _Stopped(KeyboardInterrupt):
    """A signal to end the process, handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt in the block, as Ctrl-C does; with nohup SIGHUP stays ignored."""

    def stop(number: int, _: Any) -> None:
        raise _Stopped(number)

    main_thread = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
    numbers = [s for s in (signal.SIGTERM, signal.SIGHUP) if main_thread and signal.getsignal(s) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings in one line each, without those of huggingface_hub; restored at the end of the block."""
    show, hub = warnings.showwarning, logging.getLogger("huggingface_hub")
    level = hub.level
    warnings.showwarning = _warn
    hub.setLevel(logging.ERROR)  # it warns of every retry of a download
    try:
        yield
    finally:
        warnings.showwarning = show
        hub.setLevel(level)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"p3b: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: BaseException, command: str) -> str:
    text = worker_death(error) or " ".join(str(error).split()) or type(error).__name__
    if short := out_of_memory(error):
        remedy = LESS_MEMORY.get(command, "other programs may hold some of it")
        text = f"out of memory: {short}; {remedy}"
    elif not isinstance(error, (ValueError, NotImplementedError, Diverged)):
        text += f" ({type(error).__name__}; --debug shows where)"
    return "; ".join([text, *getattr(error, "__notes__", [])])
