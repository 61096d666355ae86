"""Logs: structured, one line an event, for people by default and as JSON on request.

An event is a text and fields. ``request_id`` and ``transfer_id`` are fields wherever they are known, given by
structlog's keywords or, in rooms that use the standard library's loggers, by ``extra``. What is said again and again is
counted instead (``repeats.py``). Never in a log: keys, and the text of prompts and answers.
"""

import logging
import re
import sys
from typing import Any, TextIO

import structlog

from kvbelt.telemetry.repeats import SparingHandler

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(*, json: bool = False, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's loggers to ``stream`` (standard error) in one form. Once a process."""
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
    # An exception's lines become one field of the event, so that a JSON log has one line an event whatever happens.
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if json
        else [
            structlog.processors.format_exc_info,
            _in_one_line,
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0),
        ]
    )
    handler = SparingHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)  # Python's own, which have lines of their own otherwise
    for noisy in ("httpx", "asyncio", "uvicorn.access", "transformers", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _in_one_line(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What a worker or a peer has said must not end this line, begin another, or colour the terminal."""
    for name, value in event.items():
        if isinstance(value, str) and name not in ("exception", "stack"):
            event[name] = _CONTROL.sub(lambda found: repr(found[0])[1:-1], value)
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose events carry key-value pairs."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
