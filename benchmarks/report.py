"""One JSON line per figure."""

from __future__ import annotations

import json


def report(name: str, **figures: object) -> None:
    """Prints a line; floats are cut to four digits, which is more than they mean."""
    rounded = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in figures.items()
    }
    print(json.dumps({"benchmark": name, **rounded}), flush=True)
