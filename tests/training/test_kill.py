"""Runs that are killed (SIGKILL) at random moments, again and again, end with the same bits."""

import os
import signal
import time

import numpy as np
import pytest
from run_results import EVERYTHING, assert_same_run, last_step

KILLS = 20
SMALL = ("--size", "64x64", "--epochs", "8", "--batch", "8", "--multi-scale", "32-64")
SAVES = ("--save-every", "0.0005")  # 30 ms: after nearly every step


def to(output, command: list[str]) -> list[str]:
    command = list(command)
    command[command.index("--output") + 1] = str(output)
    return command


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(command, tmp_path, start):
    """With everything on that draws by chance or has a state of its own.

    One run may be done before it was killed often enough; then another is, in a folder of its own.
    """
    command += [*EVERYTHING, *SMALL, *SAVES]
    began = time.monotonic()
    child = start(command)
    child.wait_for(lambda: last_step(tmp_path / "run") > 0)
    ready = time.monotonic() - began
    assert child.wait() == 0, child.text
    length = time.monotonic() - began - ready
    print(f"undisturbed: {ready:.1f} s up to the first checkpoint, then {length:.1f} s")
    rng = np.random.default_rng(0)
    kills, attempts, lives, steps = 0, 0, 0, []
    while kills < KILLS:
        attempts += 1
        output = tmp_path / f"killed-{attempts}"
        status = -1
        while status:
            lives += 1
            assert lives < 3 * KILLS, "the runs do not get on"
            child = start([*to(output, command), "--resume"])
            if kills < KILLS:
                time.sleep(rng.uniform(0, 2 * (ready + length / KILLS)))
                os.kill(child.pid, signal.SIGKILL)
            status = child.wait()
            assert status in (0, -signal.SIGKILL), child.text
            if status:
                kills += 1
                steps.append(last_step(output))
        assert_same_run(tmp_path / "run", output)
    told = f"killed {kills} times, in {attempts} run(s), after steps {steps}"
    print(f"{told}; {time.monotonic() - began:.0f} s")
    assert len({step % 3 for step in steps}) > 1, f"never within an epoch: {told}"
