"""How processes write their logs: lines of text, or a JSON object a line.

What a line is about goes into `extra` of the logging call, for instance
``log.info("leads %s", name, extra={"engine": name})``: it becomes a member of the object. Text
shows the message and an `exception` alone, so that this must name a request by its id.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime

_TEXT = "%(asctime)s %(levelname)s %(name)s{}: %(message)s"
# What every record has; all else is `extra`.
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def configure(level: str, form: str, mark: str = "", **fields: object) -> None:
    """Sets up the log of this process, on standard error.

    Args:
        form: "text" or "json".
        mark: follows the logger's name in text.
        fields: members of every object.
    """
    handler = logging.StreamHandler()
    text = TextFormatter(_TEXT.format(mark))
    handler.setFormatter(JsonFormatter(fields) if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """The message, and a traceback where the record or its `extra` has one."""

    def format(self, record: logging.LogRecord) -> str:
        text, trace = super().format(record), getattr(record, "exception", "")
        return f"{text}\n{trace}" if trace else text


class JsonFormatter(logging.Formatter):
    """An object with `time` (UTC), `level`, `logger`, `message`, `exception`, and more members."""

    def __init__(self, fields: dict[str, object] | None = None) -> None:
        super().__init__()
        self._fields = fields or {}

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        entry |= self._fields
        entry |= {name: value for name, value in vars(record).items() if name not in _OWN}
        return json.dumps(entry, default=str)


def without_values(error: BaseException) -> str:
    """A traceback without the exceptions' own words, which may quote somebody's prompt."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 8:
        frames = "".join(traceback.format_tb(cause.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(cause).__qualname__}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\nwhich came after:\n".join(parts)
