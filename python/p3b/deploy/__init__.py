# SPDX-License-Identifier: MIT
"""Export of models to other runtimes."""
