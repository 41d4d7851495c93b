# SPDX-License-Identifier: MIT
"""Comparison of pruning methods on one task."""
