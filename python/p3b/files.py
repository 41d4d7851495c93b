# SPDX-License-Identifier: MIT
"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file under another name beside `path`, then gives it its name in one step.

    Whatever happens, `path` holds all of the old or all of the new.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~umask())  # safetensors lets nobody else read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk is found by a write, which knows no name
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of one that `write_atomically` was making."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def umask() -> int:
    """The permission bits that new files of this process go without."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
