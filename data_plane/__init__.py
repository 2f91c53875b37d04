"""The data plane: model forward, paged attention, block moves and sampling on one engine."""

import os

# Read once, when torch loads OpenMP. By default its threads spin for long while they wait, and a
# step takes several times as long as soon as any other process wants one of the cores; asleep at
# once, each of a step's several hundred operations waits for a thread to wake. A short spin is
# 1.13 times as fast as none, if no more threads wait than there are cores: OpenMP keeps a pool for
# each thread that ever computed, so the model is loaded on the thread that runs it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
