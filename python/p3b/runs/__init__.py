# SPDX-License-Identifier: MIT
"""Runs: settings, folders, saved models."""
