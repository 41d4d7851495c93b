# SPDX-License-Identifier: MIT
"""Gates, masks, budget, probes, the methods, and the shrink."""
