"""``python -m rlhf``: the program from a checkout that is merely on the path."""

import sys

from rlhf.cli import main

sys.exit(main())
