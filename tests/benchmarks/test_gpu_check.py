"""The run of all GPU checks: each section by itself, what it prints kept, none for ever."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_agreement import may_be_missing
from benchmarks.gpu_check import SECTIONS, Section, main, run
from yolov4_fast.engines.engine import DeviceError, EngineError


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_a_section_is_shown_and_kept(tmp_path: Path, capsys):
    section = Section("words", ("-c", "print('found'); open('DIR/x.json', 'w').write('{}')"), 30)
    outcome = run(section, tmp_path, 30)
    assert outcome["section"] == "words" and outcome["result"] == "passed"
    assert (tmp_path / "words.log").read_text() == "found\n"
    assert (tmp_path / "x.json").read_text() == "{}"
    assert "found" in capsys.readouterr().out


def test_a_failure_and_its_exit_status(tmp_path: Path):
    outcome = run(Section("bad", ("-c", "raise SystemExit(3)"), 30), tmp_path, 30)
    assert outcome["result"] == "FAILED with exit status 3"


def test_a_section_that_hangs_is_stopped(tmp_path: Path):
    started = time.monotonic()
    command = ("-c", "import time; print('begun'); time.sleep(60)")
    outcome = run(Section("hangs", command, 60), tmp_path, 1.5)
    assert "stopped after" in str(outcome["result"]) and time.monotonic() - started < 20
    assert (tmp_path / "hangs.log").read_text().startswith("begun\n")


def test_a_section_that_is_stopped_may_write_what_it_has(tmp_path: Path):
    program = (
        "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: "
        "open('DIR/kept', 'w').write('x')"
    )
    run(Section("hangs", ("-c", program), 60), tmp_path, 1.5)
    assert (tmp_path / "kept").read_text() == "x"


def test_what_an_earlier_run_found_is_not_this_ones(tmp_path: Path):
    (tmp_path / "x.json").write_text("{}")
    run(Section("bad", ("-c", "raise SystemExit(3)", "DIR/x.json"), 30), tmp_path, 30)
    assert not (tmp_path / "x.json").exists()


def test_what_is_missing_is_named(tmp_path: Path):
    outcome = run(Section("x", ("-c", ""), 30, ("no_such_package",)), tmp_path, 30)
    assert outcome["result"] == "left out: no_such_package is missing"


def test_every_section_is_there_to_run():
    root = Path(__file__).resolve().parents[2]
    for section in SECTIONS:
        if section.command[0] == "-m" and section.command[1].startswith("benchmarks."):
            assert (root / (section.command[1].replace(".", "/") + ".py")).is_file(), section


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_precision_is_left_out_only_for_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_agreement.available", lambda: None)
    assert may_be_missing("fp8", DeviceError("too old"))
    assert may_be_missing("bf16", DeviceError("too old"))
    assert not may_be_missing("fp16", DeviceError("no GPU"))
    assert not may_be_missing("fp8", EngineError("no kernel computes it rightly"))
    monkeypatch.setattr("benchmarks.gpu_agreement.available", lambda: "is not installed")
    assert may_be_missing("fp8", EngineError("runs on cuDNN's kernels only"))
    assert not may_be_missing("fp16", EngineError("no kernel computes it rightly"))
