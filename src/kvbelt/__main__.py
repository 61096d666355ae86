"""``python -m kvbelt`` is ``kvbelt``."""

import sys

from kvbelt.cli import main

sys.exit(main())
