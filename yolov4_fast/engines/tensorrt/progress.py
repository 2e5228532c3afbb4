"""How far a TensorRT build is, as a bar on the terminal, and Ctrl-C, which stops it.

TensorRT reports phases within phases, each of a known number of steps; the bar is of the outermost
one, with the innermost that moved beside it. Reports come from any of its threads.

A build is one long call into C++: Python raises KeyboardInterrupt only after it, or within a
report, where TensorRT would print and drop it. So while a build runs, SIGINT sets a mark, and the
next report tells TensorRT to stop. Python's own handlers run in the main thread alone, which may be
deep in the call while another thread reports: the signal's number, which Python's C handler writes
to a descriptor at once, is looked for as well.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Progress:
    """The reports of one build. stopped: it was told to end."""

    def __init__(self, *, show: bool) -> None:
        self.stopped = False
        self._show = show
        self._lock = threading.Lock()
        self._steps: dict[str, int] = {}  # of the phases that have begun and not ended
        self._outermost: str | None = None
        self._bar: tqdm | None = None
        self._signals: int | None = None  # to read the numbers of signals from

    def begin(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._steps[phase] = steps
            if self._outermost is None:
                self._outermost = phase
                self._bar = tqdm(
                    desc=phase.lower(),
                    total=steps,
                    leave=False,
                    miniters=0,  # what stands beside the bar changes more often than it does
                    disable=None if self._show else True,  # None: shown only on a terminal
                )

    def step(self, phase: str, step: int) -> bool:
        """A step of a phase, counted from 0, is done. False: TensorRT is to stop."""
        with self._lock:
            if self._bar is not None and phase == self._outermost:
                self._bar.update(step + 1 - self._bar.n)
            elif self._bar is not None:
                done = f"{phase.lower()} {step + 1}/{self._steps.get(phase, '?')}"
                self._bar.set_postfix_str(done, refresh=False)
                self._bar.update(0)  # ten times a second at most
        return not self._is_stopped()

    def end(self, phase: str) -> None:
        with self._lock:
            self._steps.pop(phase, None)
            if phase == self._outermost:
                self._outermost = None
                self._close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a build runs: Ctrl-C stops it, and KeyboardInterrupt is raised at the end."""
        try:
            with self._interruptible():
                yield
                self._is_stopped()  # a signal that no report has seen
        finally:
            with self._lock:
                self._close()
        if self.stopped:
            raise KeyboardInterrupt

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Only the main thread can change what a signal does; nothing is where it is ignored."""
        handler = signal.getsignal(signal.SIGINT)
        ours = threading.current_thread() is threading.main_thread()
        if not ours or handler in (signal.SIG_IGN, signal.SIG_DFL, None):
            yield
            return
        reader, written = os.pipe()
        self._signals = reader
        for end in (reader, written):
            os.set_blocking(end, False)
        signal.signal(signal.SIGINT, self._stop)
        before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGINT, handler)
            self._signals = None
            os.close(reader)
            os.close(written)

    def _stop(self, *_: Any) -> None:
        self.stopped = True

    def _is_stopped(self) -> bool:
        if self._signals is not None and not self.stopped:
            try:
                self.stopped = signal.SIGINT in os.read(self._signals, 64)
            except BlockingIOError:
                pass  # no signal
        return self.stopped

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def make_monitor(trt: Any, progress: Progress) -> Any:
    """The tensorrt.IProgressMonitor that reports to `progress`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.begin(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.end(phase_name)

    return Monitor()
