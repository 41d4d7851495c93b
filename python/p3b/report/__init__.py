# SPDX-License-Identifier: MIT
"""Pages and pictures of a run."""
