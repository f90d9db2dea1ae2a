"""`python -m sneakpeek_core.cli`, the same as `sneakpeek`."""

import sys

from . import main

sys.exit(main())
