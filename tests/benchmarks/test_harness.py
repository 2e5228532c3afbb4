"""The timing that every benchmark's figures rest on."""

import json

import pytest

from benchmarks.harness import Timing, compare, measure, report


def test_timing_summarises_its_calls():
    timing = Timing.of([float(i) for i in range(11)])
    assert (timing.median, timing.p20, timing.p80) == (5.0, 2.0, 8.0)
    assert timing.minimum == 0.0 and timing.repeats == 11


def test_functions_are_timed_in_turn():
    calls = []
    timings = compare(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        seconds=0.001,
        minimum_repeats=5,
    )
    repeats = timings["a"].repeats
    assert repeats == timings["b"].repeats >= 5
    assert calls[:2] == ["a", "b"]  # warm-up
    assert calls[-4 * repeats :] == ["a", "a", "b", "b"] * repeats


def test_measure_counts_only_calls_after_the_warm_up():
    calls = []
    timing = measure(lambda: calls.append(0), seconds=0.001, minimum_repeats=3)
    assert 3 <= timing.repeats < len(calls)


def test_report_ends_in_one_json_line(capsys):
    report("sleep", {"x": Timing.of([1e-3, 2e-3, 3e-3])}, {"ratio": 0.5, "kept": 7})
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["benchmark"] == "sleep" and record["results"] == {"ratio": 0.5, "kept": 7}
    assert record["timings"]["x"]["median"] == pytest.approx(2e-3)
    assert record["environment"]["torch"]
    assert any("ratio: 0.50" in line for line in lines[:-1])
