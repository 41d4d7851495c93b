# SPDX-License-Identifier: MIT
"""`p3b report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..report.page import write_report
from .flags import positional


@dataclass(kw_only=True)
class Report:
    """write report.md and its figures again from the records of a run"""

    EXAMPLE: ClassVar = "p3b report runs/photos"

    folder: str = positional(metavar="FOLDER")
    """folder of a run (the --output of p3b prune or finetune)"""

    def run(self, line: str) -> None:
        """Writes the page and prints its path."""
        print(f"written: {write_report(self.folder)}")
