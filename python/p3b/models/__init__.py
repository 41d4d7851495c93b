# SPDX-License-Identifier: MIT
"""Models by name, descriptions of models as JSON, and token reductions by name."""
