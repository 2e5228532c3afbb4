"""Ctrl-C and SIGTERM: the first lets the step under way end, a second stops at once.

with Interrupts() as interrupts:
    with interrupts.held():
        ...  # here the first is only noted in `requested`; elsewhere it raises at once
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0  # s within which a second signal is taken for the first: torchrun passes on its own


class Interrupts:
    """Holds the handlers of both signals while it is entered (in the main thread only)."""

    def __init__(self) -> None:
        self.requested = False
        self._held = False
        self._first = 0.0
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `held`: what need not be ended first."""
        held, self._held = self._held, False
        try:
            yield
        finally:
            self._held = held

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:  # a loader's worker, told to end by its parent
                os._exit(128 + number)
            return  # Ctrl-C reaches workers too, which the parent still needs
        now = time.monotonic()
        if self.requested and now - self._first < SAME:
            return
        if not self._held or self.requested:
            raise KeyboardInterrupt
        self.requested, self._first = True, now
        if os.environ.get("RANK", "0") == "0":  # of several processes one tells
            told = "\nstopping after this step; again to stop at once"
            print(told, file=sys.stderr, flush=True)
