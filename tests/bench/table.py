"""The kernel benchmarks' JSON as a page of markdown tables.

    make bench
    python tests/bench/table.py build/bench.json > docs/results/cpu_zen3_kernels.md

Reads what `pytest --benchmark-json` writes, from one file or from runs of parts. One table per family (the group's name
up to its first comma), one row per benchmark: median and fastest time of a call, then what the benchmark put into
extra_info, floats with three digits.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from timing import table

OWN_COLUMNS = ("function", "machine")  # entries of extra_info that have a place of their own


def page(report: dict, source: str) -> str:
    """The tables of one report, headed by where they come from."""
    found = report["benchmarks"]
    machines = list(dict.fromkeys(b["extra_info"]["machine"] for b in found))
    parts = [
        "# Kernel benchmarks",
        f"Written by `python tests/bench/table.py {source}` from the JSON of `make bench`; do not edit.\n"
        f"{report['datetime'][:10]}; {'; '.join(machines)}.",
        "ms: median and fastest call on its own. Ratios and all that stands behind them: medians over calls that took\n"
        "turns with what they are compared with.",
    ]
    families: dict[str, list[dict]] = {}
    groups = list(dict.fromkeys(b["group"] for b in found))
    for benchmark in sorted(found, key=lambda b: groups.index(b["group"])):
        families.setdefault(benchmark["group"].partition(", ")[0], []).append(benchmark)
    for family, benchmarks in families.items():
        columns = list(dict.fromkeys(key for b in benchmarks for key in b["extra_info"] if key not in OWN_COLUMNS))
        rows = [
            [
                b["group"].partition(", ")[2],
                b["extra_info"]["function"],
                b["stats"]["median"] * 1e3,
                b["stats"]["min"] * 1e3,
                *(b["extra_info"].get(column, "") for column in columns),
            ]
            for b in benchmarks
        ]
        parts += [
            f"## {family[0].upper()}{family[1:]}",
            table(["case", "function", "ms", "fastest ms", *columns], rows),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+", help="what pytest --benchmark-json wrote")
    paths = parser.parse_args().json
    report: dict = {"datetime": "", "benchmarks": []}
    for path in paths:
        try:
            part = json.loads(path.read_text())
            report["datetime"] = max(report["datetime"], part["datetime"])
            report["benchmarks"] += part["benchmarks"]
        except (OSError, ValueError, KeyError, TypeError) as error:  # JSONDecodeError is a ValueError
            sys.exit(f"table: {path} must be the JSON of pytest-benchmark: {error!r}")
    if not report["benchmarks"]:
        sys.exit(f"table: {paths[0]} must be the JSON of pytest-benchmark with at least one benchmark, got none")
    print(page(report, " ".join(map(str, paths))), end="")


if __name__ == "__main__":
    main()
