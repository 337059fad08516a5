"""python -m transom.cli: the same as the command `transom`."""

import sys

from . import main

sys.exit(main())
