"""Says in the log how far loading a model is, where no terminal shows transformers' own bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from transformers.utils import logging as transformers_logging

log = logging.getLogger(__name__)

EVERY_SECONDS = 0.5
_WEIGHTS = "Loading weights"


def log_weight_loading() -> None:
    """From now on a load that takes a while is logged as "loading weights: 40 %"."""
    transformers_logging.set_tqdm_hook(_bar)


def _bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called by transformers instead of tqdm."""
    if kwargs.get("desc") == _WEIGHTS and args:
        return _logged(args[0])
    return factory(*args, **kwargs)


def _logged(items: Collection[Any]) -> Iterator[Any]:
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= EVERY_SECONDS:
            said = time.monotonic()
            log.info("loading weights: %d %%", 100 * done // len(items))
        yield item
    log.info("loading weights: %d %%", 100)
