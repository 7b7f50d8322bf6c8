"""The server's log: lines for people, or one JSON object a line; in a file that is rotated.

A line of JSON has ``time`` (RFC 3339, UTC), ``level``, ``event`` (what happened, in a word; the logger's name where nobody said), ``message``,
``pid``, and where there are any ``fields`` and ``exception`` (a traceback). Whoever logs gives ``extra={"event": …, "fields": {…}}``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from .wire import LogFormat

_FILE_BYTES = 1 << 20
_OLD_FILES = 3


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
            "pid": record.process,
        }
        if fields := getattr(record, "fields", None):
            line["fields"] = fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogFile(RotatingFileHandler):
    """The pool's log, which also gets whatever else the process writes; the last few that were full are kept beside it."""

    def __init__(self, path: Path, size: int = _FILE_BYTES) -> None:
        super().__init__(path, maxBytes=size, backupCount=_OLD_FILES, encoding="utf-8")

    def _open(self) -> Any:
        fd = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for output in (sys.__stdout__, sys.__stderr__):
            if output is not None:
                os.dup2(fd, output.fileno())
        return os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace")


def log_to(handler: logging.Handler, form: LogFormat) -> None:
    """Sends all that is logged there."""
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s [%(process)d] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
