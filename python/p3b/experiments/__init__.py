# SPDX-License-Identifier: MIT
"""Benchmarks and comparisons."""
