"""Before any test file is imported: what must be set before torch is loaded."""

import os

# Threads that spin while they wait make tests many times slower wherever something else runs too:
# other tests, the runtimes' own threads. The command line sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
