"""Structured logs: one line per event, as text by default and as JSON on request.

An event has a text and fields. ``request_id`` and ``transfer_id`` are fields wherever they are known, passed as
structlog keywords or, with the standard library's loggers, through ``extra``. Repeated events are rate-limited
(``rate_limit.py``). Keys and the text of prompts and answers are never logged.
"""

import logging
import re
import sys
from datetime import datetime
from typing import Any, TextIO

import structlog

from kvbelt.telemetry.rate_limit import REQUESTS, RateLimitedHandler

#: An engine id: of the key and of the process's life. A person needs the beginning of the second.
_ENGINE_ID = re.compile(r"\b(?:[0-9a-f]{16}-)?([0-9a-f]{12})[0-9a-f]{20}\b")
#: A client's ids are searched for as they are.
_WHOLE = frozenset({"request_id", "transfer_id", "exception", "stack"})
_OF_REQUEST = frozenset({"event", "level", "timestamp", "request_id", "requests"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(*, json: bool = False, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send structlog and the standard loggers to ``stream`` (standard error) in one format. Call once per process."""
    stream = sys.stderr if stream is None else stream
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso") if json else _clock,
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    # A traceback becomes one field, so that a JSON log has one line per event.
    renderers: list[structlog.typing.Processor] = [structlog.processors.format_exc_info]
    if json:
        renderers.append(structlog.processors.JSONRenderer())
    else:
        renderers += [
            _in_one_line,
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0, pad_level=False),
        ]
    handler = RateLimitedHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _own_fields],
            processors=[
                *([] if json else [_for_people]),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderers,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)  # warnings would be printed in their own format
    for noisy in ("httpx", "asyncio", "uvicorn", "uvicorn.access", "transformers", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


_add_fields = structlog.stdlib.ExtraAdder()


def _own_fields(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Kvbelt's fields only: other packages pass what their own handlers need, such as uvicorn's ``color_message``."""
    own = event["_record"].name.partition(".")[0] == "kvbelt"
    return _add_fields(logger, method, event) if own else event


def _clock(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event["timestamp"] = f"{datetime.now().astimezone():%H:%M:%S.%f}"[:-3]  # local, as people read it
    return event


def _for_people(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Short: long ids are cut, and a request's line says in its text what its fields say."""
    of_request = event["_record"] is not None and event["_record"].name == REQUESTS
    for name in list(event):
        if of_request and name not in _OF_REQUEST and not name.startswith("_"):
            del event[name]
        elif isinstance(event[name], str) and name not in _WHOLE:
            event[name] = _ENGINE_ID.sub(r"\1", event[name])
    return event


def _in_one_line(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape control characters in values from other processes, which could end the line or colour the terminal."""
    for name, value in event.items():
        if isinstance(value, str) and name not in ("exception", "stack"):
            event[name] = _CONTROL.sub(lambda found: repr(found[0])[1:-1], value)
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
