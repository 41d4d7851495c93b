# SPDX-License-Identifier: MIT
"""Training runs: settings, folders, saved models."""
