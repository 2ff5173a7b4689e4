"""`python -m dfqc.compiler` in, the command line out."""

import sys

from dfqc.compiler.cli import main

sys.exit(main())
