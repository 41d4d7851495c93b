"""GPU, driver, versions and commit: what a figure means nothing without."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    path = options.output
    found = {
        "gpu": output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "nvcc": output("nvcc", "--version").splitlines()[-1:],
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "commit": output("git", "rev-parse", "HEAD") or os.environ.get("P3B_COMMIT", ""),  # a copy without .git
        "changed": output("git", "status", "--short", "--untracked-files=no").splitlines(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count
        if torch.cuda.is_available()
        else 0,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(found["gpu"] or "no GPU")
    return 0 if options.device == "cpu" or torch.cuda.is_available() else 1


if __name__ == "__main__":
    sys.exit(main())
