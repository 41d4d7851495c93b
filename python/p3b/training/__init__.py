# SPDX-License-Identifier: MIT
"""The training loops and what they need."""
