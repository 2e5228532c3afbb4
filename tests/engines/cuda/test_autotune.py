"""Which kernel wins: of those that agree the fastest; what was learnt is kept and found again."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from yolov4_fast.engines.cuda import choices as choices_module
from yolov4_fast.engines.cuda.autotune import KernelWarning, Trial, tune
from yolov4_fast.engines.cuda.choices import (
    KERNEL_SOURCES,
    Choice,
    Choices,
    Key,
    cache_file,
    environment,
    read_choices,
    write_choices,
)
from yolov4_fast.engines.cuda.device import Run
from yolov4_fast.engines.engine import EngineError

WHERE = {"gpu": "NVIDIA H200", "driver": "570.1"}


class Bench(Trial):
    """Kernels that are (seconds, what is wrong with them), or an exception that making raises."""

    def __init__(self, **kernels: tuple[float, str | None] | Exception) -> None:
        self.kernels = kernels
        self.made: list[str] = []
        self.timed: list[str] = []
        self.names = list(kernels)
        self._ran = ""

    def make(self, name: str) -> Run:
        self.made.append(name)
        kernel = self.kernels[name]
        if isinstance(kernel, Exception):
            raise kernel
        return partial(setattr, self, "_ran", name)

    def problem(self, run: Run) -> str | None:
        run()
        kernel = self.kernels[self._ran]
        assert isinstance(kernel, tuple)
        return kernel[1]

    def seconds(self, run: Run) -> float:
        run()
        self.timed.append(self._ran)
        kernel = self.kernels[self._ran]
        assert isinstance(kernel, tuple)
        return kernel[0]


def choose(bench: Bench, choices: Choices, key: Key, measure: bool = True) -> bool:
    trials: dict[Key, Callable[[], Trial]] = {key: lambda: bench}
    return tune(trials, choices, bench.seconds, measure=measure, progress=False)


def test_the_fastest_wins() -> None:
    bench, choices = Bench(slow=(3.0, None), fast=(1.0, None), middle=(2.0, None)), Choices(WHERE)
    assert choose(bench, choices, Key("conv", 1))
    assert choices.table == {Key("conv", 1): Choice("fast", 1.0)}
    assert bench.timed == ["slow", "fast", "middle"]


def test_a_kernel_that_disagrees_is_named_and_never_timed() -> None:
    bench, choices = Bench(wrong=(0.1, "7 of 8 values are off"), right=(5.0, None)), Choices(WHERE)
    with pytest.warns(KernelWarning) as caught:
        choose(bench, choices, Key("convolution 3x3", 4))
    (message,) = (str(warning.message) for warning in caught)
    for words in ("the kernel wrong", "convolution 3x3 at batch 4", "7 of 8 values are off"):
        assert words in message
    assert choices.table[Key("convolution 3x3", 4)].kernel == "right"
    assert bench.timed == ["right"]


def test_it_is_named_once_and_excluded_everywhere() -> None:
    benches = {Key(f"conv {n}", 1): Bench(wrong=(0.1, "off"), right=(1.0, None)) for n in range(3)}
    choices = Choices(WHERE)
    with pytest.warns(KernelWarning) as caught:
        tune(
            {key: partial(lambda b: b, bench) for key, bench in benches.items()},
            choices,
            lambda run: 1.0,
            measure=True,
            progress=False,
        )
    assert len(caught) == 1
    assert {choice.kernel for choice in choices.table.values()} == {"right"}


def test_a_kernel_that_cannot_run_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(big=RuntimeError("out of resource: shared memory"), small=(1.0, None))
    choices = Choices(WHERE)
    with caplog.at_level(logging.INFO, logger="yolov4_fast"), warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(bench, choices, Key("conv", 1))
    assert choices.table[Key("conv", 1)].kernel == "small"
    assert "big cannot run conv at batch 1: out of resource" in caplog.text


def test_a_kernel_that_cannot_be_timed_is_passed_over() -> None:
    bench, choices = Bench(odd=(1.0, None), plain=(2.0, None)), Choices(WHERE)

    def seconds(run: Run) -> float:
        if bench.seconds(run) == 1.0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 2.0

    key = Key("conv", 1)
    tune({key: lambda: bench}, choices, seconds, measure=True, progress=False)
    assert choices.table[key] == Choice("plain", 2.0)


def test_none_that_is_right_is_an_error() -> None:
    bench = Bench(
        one=(1.0, "7 are off"), two=RuntimeError("no\n  way"), three=ValueError("x" * 999)
    )
    with pytest.warns(KernelWarning), pytest.raises(EngineError) as caught:
        choose(bench, Choices(WHERE), Key("conv", 2))
    assert str(caught.value) == (
        "no kernel computes conv at batch 2 rightly on this GPU "
        f"(tried: one: 7 are off; two: no way; three: {'x' * 77}...)"
    )


@pytest.mark.parametrize("measure", [True, False])
def test_too_little_memory_for_all_of_them_is_what_is_raised(measure: bool) -> None:
    short = torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    bench, choices = Bench(large=short, bad=(1.0, "off")), Choices(WHERE)
    choices.table[Key("conv", 1)] = Choice("bad", 1.0)
    with (
        pytest.warns(KernelWarning),
        pytest.raises(torch.OutOfMemoryError, match=r"^tried to allocate 2\.00 GiB$") as caught,
    ):
        choose(bench, choices, Key("conv", 2), measure)
    assert caught.value is not short  # whose traceback holds the memory of the trial


def test_too_little_memory_for_one_of_them_is_passed_over() -> None:
    bench = Bench(large=torch.OutOfMemoryError("2.00 GiB"), small=(1.0, None))
    choices = Choices(WHERE)
    choose(bench, choices, Key("conv", 1))
    assert choices.table[Key("conv", 1)].kernel == "small"


def test_a_broken_device_ends_it() -> None:
    bench = Bench(bad=torch.AcceleratorError("an illegal memory access"), good=(1.0, None))
    with pytest.raises(
        EngineError, match="the kernel bad broke off on conv at batch 1: an illegal"
    ):
        choose(bench, Choices(WHERE), Key("conv", 1))
    assert bench.made == ["bad"]


def test_what_is_known_is_not_measured_again() -> None:
    choices = Choices(WHERE, {Key("conv", 1): Choice("fast", 1.0)})
    bench = Bench(fast=(1.0, None))
    assert not choose(bench, choices, Key("conv", 1))
    assert not bench.made


def test_another_batch_takes_the_nearest_choice_and_only_checks_it() -> None:
    choices = Choices(
        WHERE, {Key("conv", 1): Choice("small", 1.0), Key("conv", 32): Choice("large", 9.0)}
    )
    for batch, expected in ((2, "small"), (5, "small"), (8, "large"), (31, "large")):
        bench = Bench(other=(0.1, None), small=(1.0, None), large=(1.0, None))
        assert choose(bench, choices, Key("conv", batch), measure=False)
        assert choices.table[Key("conv", batch)] == Choice(expected)
        assert bench.made == [expected] and not bench.timed


def test_a_nearest_choice_need_not_be_one_to_try_here() -> None:
    bench = Bench(elsewhere=(1.0, None), here=(1.0, None))
    bench.names = ["here"]
    choices = Choices(WHERE, {Key("conv", 1): Choice("elsewhere", 1.0)})
    choose(bench, choices, Key("conv", 2), measure=False)
    assert choices.table[Key("conv", 2)] == Choice("elsewhere")
    assert not bench.timed


def test_a_choice_that_was_only_checked_leads_no_further() -> None:
    choices = Choices(WHERE, {Key("conv", 1): Choice("a", 1.0), Key("conv", 15): Choice("b")})
    assert choices.nearest(Key("conv", 16)) == Choice("a", 1.0)


def test_a_nearest_choice_that_is_wrong_at_this_batch_is_measured() -> None:
    choices = Choices(WHERE, {Key("conv", 1): Choice("a", 1.0)})
    bench = Bench(a=(1.0, "off"), b=(2.0, None), c=(3.0, None))
    with pytest.warns(KernelWarning, match="the kernel a"):
        choose(bench, choices, Key("conv", 3), measure=False)
    assert choices.table[Key("conv", 3)] == Choice("b", 2.0)


def test_measuring_replaces_what_was_only_checked() -> None:
    choices = Choices(WHERE, {Key("conv", 8): Choice("slow")})
    assert choose(Bench(slow=(2.0, None), fast=(1.0, None)), choices, Key("conv", 8))
    assert choices.table[Key("conv", 8)] == Choice("fast", 1.0)


def test_choices_are_kept(tmp_path: Path) -> None:
    first = Choices(WHERE, {Key("conv", 1): Choice("a", 1e-5)})
    second = Choices(WHERE, {Key("conv", 2): Choice("b", None)})
    write_choices(first, tmp_path)
    write_choices(second, tmp_path)
    assert read_choices(WHERE, tmp_path).table == first.table | second.table
    elsewhere = WHERE | {"driver": "580.2"}
    assert not read_choices(elsewhere, tmp_path).table
    assert cache_file(WHERE, tmp_path).name.startswith("nvidia-h200-")
    assert len(list(tmp_path.iterdir())) == 1  # nothing half written is left


def test_choices_of_another_environment_are_not_taken_over() -> None:
    choices = Choices(WHERE)
    choices.update(Choices(WHERE | {"gpu": "other"}, {Key("conv", 1): Choice("a")}))
    assert not choices.table


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"format": "yolov4_fast.tuning"}', b"\xff", b"[1",
             b'{"format": "yolov4_fast.tuning", "environment": {}, "choices": [[1]]}',
             b'{"format": "yolov4_fast.tuning", "environment": 3, "choices": []}'],
)  # fmt: skip
def test_a_damaged_cache_is_named_and_measured_anew(
    text: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache_file(WHERE, tmp_path)
    path.write_bytes(text)
    assert not read_choices(WHERE, tmp_path).table
    assert str(path) in caplog.text and "measured anew" in caplog.text
    write_choices(Choices(WHERE, {Key("conv", 1): Choice("a")}), tmp_path)
    assert read_choices(WHERE, tmp_path).table


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    write_choices(Choices(WHERE, {Key("conv", 1): Choice("a")}), tmp_path / "file")
    assert "cannot keep the choice of kernels" in caplog.text


def test_every_source_of_a_kernel_counts() -> None:
    package = Path(choices_module.__file__).parents[2]
    for pattern in KERNEL_SOURCES:
        assert list(package.glob(pattern)), pattern


def test_the_environment_names_all_that_matters(cpu_device) -> None:
    here = environment(cpu_device())
    assert set(here) == {
        "gpu", "sm", "driver", "torch", "cuda", "cudnn", "triton", "cudnn_frontend", "kernels",
    }  # fmt: skip
    assert all(isinstance(value, str) and value for value in here.values())
    assert here != environment(cpu_device(name="NVIDIA L4", sm=89))
    json.dumps(here)


@pytest.mark.parametrize(
    "text",
    [b"{", b"\xff", b"1", b"{}", *(
        json.dumps({"format": "yolov4_fast.tuning", "environment": {}, "choices": rows}).encode()
        for rows in ([["a", 1]], [["a", "x", "torch", 1]], [["a", 0, "torch", 1]],
                     [["a", float("inf"), "torch", 1]], [["a", 1, "torch", "x"]], 3)
    )],
)  # fmt: skip
def test_a_damaged_table_says_so(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^is (damaged|not a table of choices)"):
        Choices.from_json(text)
