"""Says how far loading a model is: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from transformers.utils import logging as transformers_logging

log = logging.getLogger(__name__)

EVERY_SECONDS = 0.5
BAR_WIDTH = 40
Item = TypeVar("Item")
_WEIGHTS = "Loading weights"


class Pulse:
    """Counts what a start gets done, so that whoever waits for it sees whether it gets on.

    There is one for a process, as there is one log. Ranks that have done the same count the same.
    """

    def __init__(self) -> None:
        self.count = 0

    def beat(self) -> None:
        self.count += 1


pulse = Pulse()


class LoadProgress:
    """Counts the bytes of weights as they arrive, and shows them twice a second.

    Only the shown one writes while it goes on: of a tensor parallel group that is the first
    rank. When it is left, every one says in the log how many bytes took how long.
    """

    def __init__(self, total_bytes: int, *, shown: bool = True) -> None:
        self._total = total_bytes
        self._done = 0
        self._shown = shown
        self._terminal = sys.stderr.isatty()
        self._started = self._said = time.monotonic()

    def __enter__(self) -> LoadProgress:
        return self

    def advance(self, count: int) -> None:
        """Note that so many more bytes are where they will stay."""
        self._done += count
        pulse.beat()
        now = time.monotonic()
        if now - self._said >= EVERY_SECONDS and self._done < self._total:
            self._said = now
            self._say()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._say()
        if self._terminal and self._shown:
            print(file=sys.stderr)
        if kind is None:
            seconds = time.monotonic() - self._started
            log.info("loaded %.2f GB of weights in %.1f s", self._done / 1e9, seconds)

    def _say(self) -> None:
        if not self._shown:
            return
        _say("loading weights", 100 * self._done // self._total if self._total else 100)


def shown(items: Collection[Item], what: str) -> Iterator[Item]:
    """Yields the items, and shows how many of them are done."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= EVERY_SECONDS:
            said = time.monotonic()
            _say(what, 100 * done // len(items))
        yield item
        pulse.beat()
    if items:
        _say(what, 100)
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _say(what: str, percent: int) -> None:
    if sys.stderr.isatty():
        bar = "█" * (BAR_WIDTH * percent // 100)
        line = f"\r{what}: {bar:░<{BAR_WIDTH}} {percent} %"
        print(line, end="", file=sys.stderr, flush=True)
    else:
        log.info("%s: %d %%", what, percent)


def log_weight_loading() -> None:
    """From now on a load by transformers itself is logged as "loading weights: 40 %" too."""
    transformers_logging.set_tqdm_hook(_bar)


def _bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called by transformers instead of tqdm."""
    if kwargs.get("desc") == _WEIGHTS and args:
        return shown(args[0], "loading weights")
    return factory(*args, **kwargs)
