"""The data plane: model forward, paged attention, block moves and sampling on one engine."""

import os

# Read once, when torch loads OpenMP. By default its threads spin while they wait, and a step takes
# several times as long as soon as any other process wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
