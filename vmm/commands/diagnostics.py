"""What ``-v`` tells developers on standard error. structlog is imported only then: it takes 50 ms."""

from __future__ import annotations

import sys
import time
from typing import Any


class Diagnostics:
    """Tells what happened and how many milliseconds after the last event, if ``wanted``."""

    def __init__(self, *, wanted: bool) -> None:
        self._log: Any = _logger() if wanted else None
        self._last = time.perf_counter()

    def tell(self, event: str, **fields: object) -> None:
        """Something happened."""
        if self._log is not None:
            now = time.perf_counter()
            self._log.info(event, **fields, milliseconds=round((now - self._last) * 1000, 1))
            self._last = now


def _logger() -> Any:  # noqa: ANN401 - structlog's loggers have no static type
    import structlog  # noqa: PLC0415 - see above

    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
    )
