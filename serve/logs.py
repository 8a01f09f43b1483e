"""How the server's log lines look: an event, then its keys.

Comes in: log records with `extra`. Goes out: one line each on stderr: time, level, logger, event, key=value. Prompts
and images are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class KeyedFormatter(logging.Formatter):
    """Appends what a record was given as `extra`; values as JSON where they are not plain words."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without the traceback."""
        extra = {key: value for key, value in vars(record).items() if key not in PLAIN}
        words = [f"{key}={value if _bare(value) else json.dumps(value, default=str)}" for key, value in extra.items()]
        return " ".join([super().formatMessage(record), *words])

    def formatException(self, ei: Any) -> str:
        """The traceback, each line set in: what a client wrote into an error cannot look like a line of the log."""
        return "\n".join(f"  | {_shown(line)}" for line in super().formatException(ei).split("\n"))


def configure_logs(level: int = logging.INFO) -> None:
    """Sends every record of this process to stderr in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyedFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _shown(line: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in line)


def _bare(value: object) -> bool:
    if isinstance(value, str):
        return bool(value) and value.isprintable() and not set(value) & set(' "=')
    return isinstance(value, int | float)
