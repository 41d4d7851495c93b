# SPDX-License-Identifier: MIT
"""The command line `p3b`."""

from .main import main

__all__ = ["main"]
