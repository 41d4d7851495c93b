# SPDX-License-Identifier: MIT
"""Pruning methods compared on one task."""
