# SPDX-License-Identifier: MIT
"""Models: by name, in words, and the token reductions that fit them."""
