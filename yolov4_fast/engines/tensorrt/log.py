"""What TensorRT has to say: it reports failures to a logger, and returns None or False."""

from __future__ import annotations

import logging
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Log(Protocol):
    """A tensorrt.ILogger that remembers. errors: since the last time that they were taken."""

    errors: list[str]

    def take(self) -> str:
        """The errors in one line, the first first, and forget them; "no reason given" of none."""


def make_log(trt: Any) -> Any:
    """A `Log` for TensorRT's objects, which must not outlive it. Errors are kept for the exception
    that tells of them; the rest goes to Python's logging: warnings as INFO, as they rarely are
    anything that a user could change, everything else as DEBUG.
    """

    class Collecting(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            """Called by any of TensorRT's threads; nothing may be raised here."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(" ".join(msg.split()))
                return
            level = logging.INFO if severity == trt.ILogger.WARNING else logging.DEBUG
            logger.log(level, "%s", msg)

        def take(self) -> str:
            errors, self.errors = list(dict.fromkeys(self.errors)), []
            return "; ".join(errors) or "no reason given"

    return Collecting()
