"""`python -m vhostpy` is `vhostpy`."""

import sys

from vhostpy.cli import main

sys.exit(main())
