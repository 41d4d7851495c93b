# SPDX-License-Identifier: MIT
"""What leaves this software: exported models."""
