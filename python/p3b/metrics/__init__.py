# SPDX-License-Identifier: MIT
"""Accuracy and costs of models."""
