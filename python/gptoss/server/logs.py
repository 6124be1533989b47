"""Logs as JSON lines on stderr: what happened to which request, never what it said."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

_FIELDS = "gptoss_fields"


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, event and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= _failure(record.exc_info[1])
        return json.dumps(line, ensure_ascii=True)


def set_up_logs(level: str = "info") -> None:
    """Send this package's and uvicorn's records to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("gptoss", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def log(logger: logging.Logger, event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event with fields. They must hold no message text."""
    logger.log(level, event, extra={_FIELDS: fields})


def log_failure(
    logger: logging.Logger,
    event: str,
    error: BaseException,
    with_message: bool = False,
    **fields: object,
) -> None:
    """Log an exception: its type and where it was raised.

    Its message too only if asked for: what a handler raised may quote a request, what the core
    raised does not.
    """
    if with_message:
        fields["message"] = str(error)
    log(logger, event, logging.ERROR, **fields, **_failure(error))


def _failure(error: BaseException) -> dict[str, object]:
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "where": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
