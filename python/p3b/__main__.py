# SPDX-License-Identifier: MIT
"""`python -m p3b` is `p3b`."""

import sys

from .cli import main

sys.exit(main())
