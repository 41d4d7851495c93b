# SPDX-License-Identifier: MIT
"""Command-line flags from dataclasses: a field is a flag, its docstring the help.

`--img-size N` is a field `img_size: int`; a bool is `--name`, and `--no-name` where its default is True; values of a
list are separated by commas, a dict is JSON. Fields made with `positional` are positional arguments.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

GIVEN = "given"  # field of a command with the settings from the command line (see `made`)


def positional(**options: Any) -> Any:
    """A field that is a positional argument; options are argparse's (metavar, nargs)."""
    return dataclasses.field(metadata=options | {"positional": True})


def flag(default: Any, *, least: int | None = None, **options: Any) -> Any:
    """A field with a default and a smallest value or options of argparse: metavar, choices, required."""
    if least is not None:
        options["type"] = _at_least(least)
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=options)
    return dataclasses.field(default=default, metadata=options)


def add_flags(parser: Any, cls: type, *, leave_out: Sequence[str] = (), suppressed: bool = False) -> None:
    """Adds an argument for each field of a dataclass, those of its bases last.

    suppressed: a flag that is not given is absent from the parsed namespace, for settings that may also be in a file;
    its default is then part of its help.
    """
    sentences = _sentences(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name != GIVEN]
    fields = sorted(fields, key=lambda field: field.name not in vars(cls).get("__annotations__", {}))
    for field in fields:
        if field.name in leave_out:
            continue
        options = dict(field.metadata)
        options["help"] = sentences[field.name].replace("%", "%%")
        for name, values in getattr(cls, "TEXTS", {}).items():  # known only at run time, as the names of recipes
            options["help"] = options["help"].replace(f"{{{name}}}", ", ".join(values()))
        if options.pop("positional", False):
            parser.add_argument(field.name, **options)
            continue
        name = "--" + field.name.replace("_", "-")
        kind = str(field.type).removesuffix(" | None")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if suppressed and default not in ("", {}, []):
            options["help"] += f" (default: {default})"
        options |= dict(dest=field.name, default=argparse.SUPPRESS if suppressed else default)
        if kind == "bool":
            action = argparse.BooleanOptionalAction if suppressed or default else "store_true"
            parser.add_argument(name, action=action, **options)
        else:
            options.setdefault("type", KINDS[kind])
            options.setdefault("metavar", None if "choices" in options else METAVARS[kind])
            parser.add_argument(name, **options)


def made(cls: Any, options: argparse.Namespace) -> Any:
    """The dataclass of a parsed command line. A field `given` gets the settings that are on the command line."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in vars(options).items() if name in names}
    if GIVEN in names:
        known = {field.name for _, settings, _ in cls.SETTINGS for field in dataclasses.fields(settings)}
        values[GIVEN] = {name: value for name, value in vars(options).items() if name in known}
    return cls(**values)


class Parser(argparse.ArgumentParser):
    """argparse's parser with one-line errors, and similar flags for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2 (argparse also prints the usage)."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = next((word for word in message.split() if word.startswith("--")), "").split("=")[0]
        close = difflib.get_close_matches(wrong, [f for f in flags if f != wrong], n=2, cutoff=0.8)
        close = close or [flag for flag in flags if wrong and flag.endswith(wrong[1:])]  # --epochs: --finetune-epochs
        near = f"; did you mean {' or '.join(close)}?" if close and "unknown flag" in message else ""
        self.exit(2, f"{self.prog}: {message}{near} (see {self.prog} --help)\n")


def _sentences(cls: type) -> dict[str, str]:
    """The docstrings of the fields of a dataclass and its bases."""
    sentences: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        definition = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    sentences[field.target.id] = " ".join(str(text.value.value).split())
    return sentences


def _json(text: str) -> Any:
    return json.loads(text)


_json.__name__ = "JSON"  # for argparse's message "invalid JSON value"


def _at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {value}")
        return value

    return whole


def _values(kind: Callable[[str], Any], name: str) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {name} separated by commas, got {text!r}") from None

    return values


KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "dict": _json,
    "list": _json,
    "list[str]": _values(str, "names"),
    "list[int]": _values(int, "whole numbers"),
    "list[float]": _values(float, "numbers"),
}
METAVARS = {"str": "TEXT", "int": "N", "float": "X", "dict": "JSON", "list": "JSON"}
METAVARS |= dict.fromkeys(("list[str]", "list[int]", "list[float]"), "LIST")
