"""Structured logs: one line per event, as text by default and as JSON on request.

An event has a text and fields. ``request_id`` and ``transfer_id`` are fields wherever they are known, passed as
structlog keywords or, with the standard library's loggers, through ``extra``. Repeated events are rate-limited
(``rate_limit.py``). Keys and the text of prompts and answers are never logged.
"""

import logging
import re
import sys
from typing import Any, TextIO

import structlog

from kvbelt.telemetry.rate_limit import RateLimitedHandler

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(*, json: bool = False, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send structlog and the standard loggers to ``stream`` (standard error) in one format. Call once per process."""
    stream = sys.stderr if stream is None else stream
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if json else "%H:%M:%S.%f", utc=json),
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
        renderers += [_in_one_line, structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0)]
    handler = RateLimitedHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)  # warnings would be printed in their own format
    for noisy in ("httpx", "asyncio", "uvicorn.access", "transformers", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _in_one_line(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape control characters in values from other processes, which could end the line or colour the terminal."""
    for name, value in event.items():
        if isinstance(value, str) and name not in ("exception", "stack"):
            event[name] = _CONTROL.sub(lambda found: repr(found[0])[1:-1], value)
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
