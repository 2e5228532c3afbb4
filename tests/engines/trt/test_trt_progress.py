"""The progress of TensorRT builds on the terminal, and Ctrl-C."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from typing import Any

import pytest
from trt_behaviour import run_phases
from trt_double import Double
from trt_models import build

from yolov4_fast.engines.tensorrt.progress import Progress, make_monitor


class Terminal:
    """A stderr that says that it is one."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called within a test: pytest sets its own stderr after the fixtures."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_the_bar_is_of_the_outermost_phase(
    trt_double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = a_terminal(monkeypatch)
    progress = Progress(show=True)
    assert run_phases(make_monitor(trt_double.module, progress))
    assert "building:   0%" in terminal.text and "building" not in terminal.text.split("\r")[-2]
    progress.begin("Building", None, 2)
    assert progress.step("Building", 0) and progress._bar is not None and progress._bar.n == 1
    progress.begin("Timing", "Building", 3)
    assert progress.step("Timing", 1) and progress._bar.postfix == "timing 2/3"
    progress.end("Timing")
    assert progress.step("Building", 1) and progress._bar.n == 2
    progress.end("Building")
    assert progress._bar is None


@pytest.mark.parametrize("show", [False, True])
def test_no_bar_where_nobody_looks(
    trt_double: Double, show: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not asked for, or no terminal."""
    assert run_phases(make_monitor(trt_double.module, Progress(show=show)))
    assert capsys.readouterr() == ("", "")


def test_an_unasked_bar_is_not_shown(trt_double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    assert run_phases(make_monitor(trt_double.module, Progress(show=False)))
    assert not terminal.text


def press_ctrl_c() -> None:
    """Nothing may be raised at once: in a real build C++ is the caller, and drops it."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
    except KeyboardInterrupt:
        pytest.fail("raised within the build")


def interrupting(where: str) -> Any:
    """A build in which Ctrl-C is pressed; `told` becomes what the reports after it return."""

    def run(double: Double, on: Any, network: Any, config: Any, **_: Any) -> Any:
        monitor = config.state["progress_monitor"]
        assert run_phases(monitor)
        monitor.phase_start("Building", None, 3)
        if where == "between":
            press_ctrl_c()
        assert monitor.step_complete("Building", 0) is (where != "between")
        if where == "last":
            press_ctrl_c()
        monitor.phase_finish("Building")
        return double.make("IHostMemory") if where == "last" else None

    return run


@pytest.mark.parametrize("where", ["between", "last"])
def test_ctrl_c_ends_the_build(trt_double: Double, where: str) -> None:
    """Also where it came too late for TensorRT to notice."""
    before = signal.getsignal(signal.SIGINT)
    trt_double.script["Builder.build_serialized_network"] = interrupting(where)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1
    del trt_double.script["Builder.build_serialized_network"]
    assert build().plan  # the next one runs


def test_ctrl_c_while_another_thread_reports(trt_double: Double) -> None:
    """The main thread is in C without the lock of the interpreter, as in a real build, so none of
    Python's signal handlers can run until that returns.
    """
    told: list[bool] = []

    def run(double: Double, on: Any, network: Any, config: Any, **_: Any) -> None:
        monitor = config.state["progress_monitor"]

        def report() -> None:
            time.sleep(0.1)  # until the other is in C
            told.append(monitor.step_complete("Building", 0))
            os.kill(os.getpid(), signal.SIGINT)
            end = time.monotonic() + 5
            while time.monotonic() < end and told[-1]:
                told.append(monitor.step_complete("Building", 0))
            told.append(calling)

        worker = threading.Thread(target=report)
        calling = True
        worker.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 600_000)
        calling = False
        worker.join()

    trt_double.script["Builder.build_serialized_network"] = run
    with pytest.raises(KeyboardInterrupt):
        build()
    assert told[0] and told[-2:] == [False, True]  # noticed during the call


def test_an_ignored_ctrl_c_stays_ignored(trt_double: Double) -> None:
    def run(double: Double, on: Any, network: Any, config: Any, **_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        assert run_phases(config.state["progress_monitor"])
        return double.make("IHostMemory")

    trt_double.script["Builder.build_serialized_network"] = run
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        build()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_build_in_a_thread(trt_double: Double) -> None:
    """Where signals cannot be changed."""
    built: list[Any] = []
    worker = threading.Thread(target=lambda: built.append(build()))
    worker.start()
    worker.join()
    assert built[0].plan
