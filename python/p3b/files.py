# SPDX-License-Identifier: MIT
"""Atomic writes, and JSON files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path`, then renames that file to `path`.

    After an error or a crash `path` holds either the old content or the new, both complete.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # an error of write(), such as a full disk, has no file name
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, written atomically."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """A JSON file, written atomically. Numbers that are not finite become null, since JSON has none."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file of a run. Raises a one-line ValueError for a missing or damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not the folder of a run: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def is_temporary(path: Path) -> bool:
    """Whether a file is a temporary one of `write_atomically`."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def umask() -> int:
    """The umask of this process: permission bits that new files do not get."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
