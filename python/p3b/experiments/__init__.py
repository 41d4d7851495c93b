# SPDX-License-Identifier: MIT
"""Benchmarks, token scores and comparisons of pruning methods."""
