# SPDX-License-Identifier: MIT
"""`p3b compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..experiments.compare.report import table
from ..experiments.compare.runner import compare
from ..experiments.compare.task import Task, comparisons
from .flags import flag, positional


@dataclass(kw_only=True)
class Compare:
    """compare pruning methods on one task, over ratios and seeds: table and plots"""

    EXAMPLE: ClassVar = "p3b compare fashion-5k --source mnist.npz --data fashion_mnist.npz --output runs/fashion"

    TEXTS: ClassVar = {"comparisons": comparisons}

    config: str = positional(metavar="CONFIG")
    """TOML file of a comparison, or the name of one shipped with p3b: {comparisons}"""
    output: str = flag("", metavar="DIR", required=True)
    """new folder, or that of a comparison to continue"""
    source: str = flag("", metavar="SOURCE")
    """images of the source stage, in place of the file's"""
    data: str = flag("", metavar="SOURCE")
    """images of the target stage, in which models are pruned, in place of the file's"""
    methods: list[str] = flag([])
    """these methods, as p3b,taylor, in place of the file's"""
    ratios: list[float] = flag([])
    """these prune ratios, as 0.5,0.75, in place of the file's"""
    seeds: list[int] = flag([])
    """these seeds, as 0,1,2, in place of the file's"""
    jobs: int = 0
    """concurrent runs (default: one per GPU, else the cores divided by --threads)"""
    threads: int = 0
    """CPU threads of each run (default: 1; with GPUs an equal share of the cores)"""

    def run(self, line: str) -> None:
        """Prints the table. Raises ValueError where a job has failed."""
        task = Task.from_file(self.config).use(
            source=self.source, data=self.data, methods=self.methods, ratios=self.ratios, seeds=self.seeds
        )
        result = compare(task, self.output, jobs=self.jobs, threads=self.threads, command=line, say=_say)
        print(table(result))
        print(f"\nwritten to {self.output}: table.md, results.json, plots and the folder of every run")
        failed = [row["name"] for row in result["jobs"] if "error" in row]
        if failed:
            raise ValueError(f"{len(failed)} of {len(result['jobs'])} jobs failed: {', '.join(failed)}")


def _say(text: str) -> None:
    print(text, flush=True)
