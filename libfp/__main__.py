"""`python -m libfp` is the `fp` command."""

import sys

from libfp.cli import main

sys.exit(main())
