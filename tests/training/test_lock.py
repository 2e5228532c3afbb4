"""One training in a folder at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.lock import alone
from training.train import main

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from training.lock import alone
with alone(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker of the loader, which may outlive it a little
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_trainings_do_not_share_a_folder(command, tmp_path, capsys):
    output = Path(command[command.index("--output") + 1])
    command = [*command, "--epochs", "1", "--mosaic-off-epochs", "0"]
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"another process is training there ({other.pid})" in told and str(output) in told
        other.kill()
        other.wait()
        assert main(command) == 0  # at once, though the other's child is still there
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def test_the_lock_ends_with_its_block(tmp_path):
    folder = tmp_path / "new" / "run"
    with pytest.raises(RuntimeError), alone(folder):
        raise RuntimeError
    with alone(folder):
        assert (folder / ".running").read_text() == f"{os.getpid()}\n"
