"""Trainings as processes: side by side, stopped as by Ctrl-C, and never two in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder there
    fcntl = None  # type: ignore[assignment]

INTERRUPTED = 130  # what training.train ends with after Ctrl-C
LOCK = "lock"  # in the folder of a training
PATIENCE = 15.0  # s; the loader's workers outlive a killed training by a few


class Trainings:
    """Runs `python -m training.train` processes, up to `jobs` at once, from several threads.

    One alone has the terminal: its progress lines are live. Several have a share of the cores each,
    and their lines are printed as they come, behind the label of each.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._guard = Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, label: str, folder: Path, flags: Sequence[str]) -> int:
        """Train with these flags into `folder` and wait. -> the exit status.

        Raises ValueError where another process is training there.
        """
        command = [sys.executable, "-m", "training.train", *flags, "--output", str(folder)]
        environment = dict(os.environ)
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        print(f"{label}: training in {folder}", flush=True)
        with held(folder) as lock:
            with self._guard:
                if self._stopped:
                    return INTERRUPTED
                process = subprocess.Popen(
                    command,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE if self.jobs > 1 else None,
                    stderr=subprocess.STDOUT if self.jobs > 1 else None,
                    pass_fds=lock,  # it keeps the folder also when this process is killed
                    # Ctrl-C reaches this process alone, which hands it on once: a second one would
                    # meet the training while it saves.
                    start_new_session=True,
                )
                self._running.add(process)
            (folder / LOCK).write_text(f"{process.pid}\n")  # for whoever finds the folder held
            for line in process.stdout or ():
                print(f"[{label}] {line}", end="", flush=True)
            status = process.wait()
            with self._guard:
                self._running.remove(process)
                return INTERRUPTED if self._stopped else status

    def stop(self) -> None:
        """Have all trainings save and end; `run` starts no other."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGINT)

    def stopped(self) -> bool:
        return self._stopped


@contextmanager
def held(folder: Path, patience: float = PATIENCE) -> Iterator[tuple[int, ...]]:
    """Hold a folder, made where it is not there. -> descriptors that hold it too once inherited.

    Raises ValueError where another process holds it for longer than `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield ()
        return
    deadline = time.monotonic() + patience
    with open(folder / LOCK, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise ValueError(
                        f"{folder}: another process is training there ({file.read().strip()}); "
                        "wait for its end, or end it"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)  # who held it before
        yield (file.fileno(),)
