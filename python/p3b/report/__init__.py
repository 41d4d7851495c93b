# SPDX-License-Identifier: MIT
"""Reports and figures of a run."""
