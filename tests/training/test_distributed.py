"""Two processes (gloo) train as one with the whole batch; the first to fail ends both."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_results import Child, assert_same_run, last_step, rows, tensors, two_heads

from training.distributed import Processes

# Rounding is all that may differ: of an Adam or of a sign, little is left where a gradient is tiny.
EXACT = (
    "--optimizer", "sgd", "--mosaic-off-epochs", "0", "--ema-decay", "0.9", "--mosaic", "0.5",
    "--size", "96x64",
)  # fmt: skip


def to(output: Path, command: list[str]) -> list[str]:
    command = list(command)
    command[command.index("--output") + 1] = str(output)
    return command


@pytest.fixture
def start_two(start: Callable[..., Child]) -> Callable[[list[str]], tuple[Child, Child]]:
    """Two processes with the environment that torchrun gives."""

    def start_two(argv: list[str]) -> tuple[Child, Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        first, second = (
            start(argv, **shared, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
            for rank in ("0", "1")
        )
        return first, second

    return start_two


@pytest.fixture
def smooth(command, tmp_path) -> list[str]:
    """Two epochs of the network that rounding changes least."""
    cfg = tmp_path / "smooth.cfg"
    cfg.write_text(two_heads(norm=True, ignore=1))
    command[command.index("--model") + 1] = str(cfg)
    return [*command, *EXACT, "--epochs", "2"]


def error(one: Path, two: Path) -> float:
    """How far apart two runs end, as a share of how long all their tensors are."""
    states = [tensors(folder / "last.safetensors") for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    flat = [torch.cat([state[k].double().flatten() for k in states[0]]) for state in states]
    return ((flat[0] - flat[1]).norm() / flat[0].norm()).item()


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("--subdivisions", "2", "--batch-norm", "cross"),
        ("--subdivisions", "4", "--normaliser", "images", "--learning-rate", "1e-3"),
        ("--adversarial", "0.5", "--multi-scale", "64-128", "--multi-scale-every", "2"),
    ],
    ids=["sync", "cross", "images", "attacked"],
)
def test_two_processes_are_one_with_the_whole_batch(smooth, tmp_path, start_two, start, settings):
    """Weights, running statistics, momentum, averages and losses."""
    command = [*smooth, *settings]
    assert start(command).wait() == 0
    children = start_two(to(tmp_path / "two", command))
    assert [child.wait() for child in children] == [0, 0], children[1].text
    assert children[1].text == ""
    # The sign of a gradient near 0 is what rounding makes it: pictures differ in a few values.
    largest = 2e-3 if "--adversarial" in settings else 5e-5
    assert error(tmp_path / "run", tmp_path / "two") < largest
    for row, other in zip(rows(tmp_path / "run"), rows(tmp_path / "two"), strict=True):
        assert row["total"] == pytest.approx(other["total"], rel=1e-4)


def test_statistics_of_each_process_alone_differ(smooth, tmp_path, start_two):
    """That the test above can fail."""
    for mode in ("sync", "local"):
        children = start_two([*to(tmp_path / mode, smooth), "--batch-norm", mode])
        assert [child.wait() for child in children] == [0, 0]
    told = error(tmp_path / "sync", tmp_path / "local")
    assert told > 1e-3, told


def test_two_processes_go_on_with_the_same_bits(command, tmp_path, start_two):
    command += ["--subdivisions", "2", "--batch-norm", "cross"]
    children = start_two(command)
    assert [child.wait() for child in children] == [0, 0]
    stopped = to(tmp_path / "stopped", command)
    first, second = start_two([*stopped, "--save-every", "1e-9"])
    first.wait_for(lambda: last_step(tmp_path / "stopped") > 3)
    os.kill(first.pid, signal.SIGINT)  # one of them is told: both stop after the same step
    assert (first.wait(), second.wait()) == (130, 130)
    words = shlex.split(first.text.splitlines()[-1])
    assert words[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "training.train"]
    assert second.text == ""
    first, second = start_two(words[5:])
    assert (first.wait(), second.wait()) == (0, 0)
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


@pytest.mark.parametrize("wrong", ["both", "second"])
def test_a_failure_ends_both_with_one_message(command, tmp_path, start, start_two, wrong):
    if wrong == "both":
        command += ["--learning-rate", "1e30"]
    children = start_two([*command, "--epochs", "1000"])
    if wrong == "second":
        children[0].wait_for(lambda: (tmp_path / "run/log.jsonl").exists())
        os.kill(children[1].pid, signal.SIGKILL)
    statuses = [child.wait() for child in children]
    assert statuses == ([2, 2] if wrong == "both" else [2, -signal.SIGKILL])
    told = "".join(child.text for child in children)
    assert told.count("error:") == 1 and "Traceback" not in told, told
    if wrong == "second":
        assert "error: another process of the run has ended" in told
        return
    assert re.search(r"error: the (loss|gradient) became (nan|inf)", told)
    for rank in range(2):
        assert list((tmp_path / "run").glob(f"diverged-at-step-*-of-process-{rank}.safetensors"))


def test_a_batch_must_split_among_them(command, start_two):
    children = start_two([*command, "--batch", "7"])
    assert [child.wait() for child in children] == [2, 2]
    told = "".join(child.text for child in children)
    assert "a batch of 7 does not split into 1 subdivisions on 2 processes" in told
    assert told.count("error:") == 1


@pytest.mark.slow
def test_torchrun(command, tmp_path):
    """The real command line, from a process that has imported nothing."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    run = subprocess.run(
        [*torchrun, "2", "-m", "training.train", *command, "--epochs", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "2 processes, 4 images each" in run.stdout and run.stdout.count("epoch 1/1") == 1
    assert last_step(tmp_path / "run") == 3


def test_one_process_alone_needs_no_others():
    one = Processes.start(torch.device("cpu"))
    tensor = torch.tensor([1.0, 2.0])
    assert (one.rank, one.world, one.main) == (0, 1, True)
    assert one.sum_over(tensor) is tensor and tensor.tolist() == [1, 2]
    assert one.any(True) and not one.any(False) and one.claim_error()
    one.barrier()
    one.close()
