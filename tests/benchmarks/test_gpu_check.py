"""The run of all GPU checks: each section by itself, what it prints kept, none for ever."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import SECTIONS, Section, main, run, summary


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
    assert (tmp_path / "hangs.log").read_text() == "begun\n"


def test_what_is_missing_is_named(tmp_path: Path):
    outcome = run(Section("x", ("-c", ""), 30, ("no_such_package",)), tmp_path, 30)
    assert outcome["result"] == "left out: no_such_package is missing"


def test_every_section_is_there_to_run():
    root = Path(__file__).resolve().parents[2]
    for section in SECTIONS:
        if section.command[0] == "-m" and section.command[1].startswith("benchmarks."):
            assert (root / (section.command[1].replace(".", "/") + ".py")).is_file(), section


def test_the_summary_of_a_run(tmp_path: Path):
    entry = {
        "batch": 2,
        "timings": {"detect": {"median": 0.001}, "torch": {"median": 0.003}},
        "streamed": 0.0008,
        "rates": {"copy": 4e12, "matrix": 7e14},
        "stages": {"seconds": {"network": 0.0005}, "network floor": 0.0003},
    }
    (tmp_path / "fps-x.json").write_text(json.dumps({"benchmark": "x", "runs": [entry]}))
    text = summary(tmp_path, [{"section": "fps", "result": "passed", "seconds": 3.0}])
    assert "| fps | passed | 3.0 |" in text
    assert "| 2 | detect | 1.000 | 2000 |" in text
    assert "| 2 | stream, overlapped | 0.800 | 2500 |" in text
    assert "floor of the network 0.300 at 4.00 TB/s and 700 TFLOP/s" in text


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
