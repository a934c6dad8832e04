"""``python -m pomona``."""

import sys

from pomona.cli import main

sys.exit(main())
