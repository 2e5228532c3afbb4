"""The timing cache of TensorRT builds: kept by version and GPU, added to, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from trt_behaviour import run_phases
from trt_double import VERSIONS, Double
from trt_models import build

from yolov4_fast.engines.tensorrt import timing_cache as module
from yolov4_fast.engines.tensorrt.options import TensorRtOptions
from yolov4_fast.engines.tensorrt.timing_cache import cache_path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "yolov4_fast" / "tensorrt"

    def path(**options: Any) -> Path | None:
        return cache_path(TensorRtOptions(**options), "10.16.1.11", "NVIDIA H200 / NVL", 90)

    assert path() == folder / "nvidia-h200-nvl-sm90-10.16.1.11.timings"
    assert path(timing_cache=Path("mine")) == Path("mine")
    assert path(timing_cache=None) is None


def test_no_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(module, "cache_folder", no_home)
    assert cache_path(TensorRtOptions(), "11", "gpu", 90) is None
    assert len(warnings(caplog)) == 1


def test_it_is_kept_and_used_again(
    trt_double: Double, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build(timing_cache="default")
    (path,) = (tmp_path / "yolov4_fast" / "tensorrt").iterdir()
    assert path.name == f"nvidia-h200-sm90-{VERSIONS[trt_double.major]}.timings"
    assert path.read_bytes() == b"timings:conv"
    written = path.stat().st_mtime_ns
    build(timing_cache="default")
    given = trt_double.arguments("IBuilderConfig.create_timing_cache")
    assert [entry["serialized_timing_cache"] for entry in given] == [b"", b"timings:conv"]
    assert path.stat().st_mtime_ns == written  # it learnt nothing new
    assert all(
        entry["ignore_mismatch"] is False
        for entry in trt_double.arguments("IBuilderConfig.set_timing_cache")
    )


def test_none_is_none(trt_double: Double) -> None:
    build(timing_cache=None)
    assert not [name for name in trt_double.names() if "timing_cache" in name]


def test_what_others_added_meanwhile_stays(trt_double: Double, tmp_path: Path) -> None:
    path = tmp_path / "times"
    path.write_bytes(b"timings:old")

    def other_build(network: Any) -> None:
        path.write_bytes(b"timings:old,other")

    def build_slowly(double: Double, on: Any, network: Any, config: Any, **_: Any) -> Any:
        other_build(network)
        config.state["cache"].state["entries"].add(b"ours")
        return double.make("IHostMemory")

    trt_double.script["Builder.build_serialized_network"] = build_slowly
    build(timing_cache=path)
    assert path.read_bytes() == b"timings:old,other,ours"


@pytest.mark.parametrize("refusal", ["create", "set"])
def test_a_damaged_or_foreign_one(
    trt_double: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture, refusal: str
) -> None:
    path = tmp_path / "times"
    path.write_bytes(b"not timings" if refusal == "create" else b"timings:foreign")
    if refusal == "set":

        def refuse(double: Double, on: Any, cache: Any, ignore_mismatch: bool) -> bool:
            fits = b"foreign" not in cache.state["entries"]
            if fits:
                on.state["cache"] = cache
            return fits

        trt_double.script["IBuilderConfig.set_timing_cache"] = refuse
    assert build(timing_cache=path).plan
    assert warnings(caplog) == [
        f"{path}: is damaged or of another GPU or TensorRT; kernels are timed anew"
    ]
    assert path.read_bytes() == b"timings:conv"


def test_a_folder_that_cannot_be_written_to(
    trt_double: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the way of the folder: what stops root too."""
    (tmp_path / "file").touch()
    assert build(timing_cache=tmp_path / "file" / "times").plan
    (warning,) = warnings(caplog)
    assert "times: " in warning and "Not a directory" in warning
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_cannot_be_written(
    trt_double: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "times"
    path.write_bytes(b"timings:old")
    monkeypatch.setattr("yolov4_fast.files.os.replace", full)
    assert build(timing_cache=path).plan
    assert warnings(caplog) == [
        f"{path}: cannot keep the timings of kernels (No space left on device)"
    ]
    assert path.read_bytes() == b"timings:old" and os.listdir(tmp_path) == ["times"]


def test_a_folder_of_its_name(
    trt_double: Double, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert build(timing_cache=tmp_path).plan
    assert warnings(caplog) == [
        f"{tmp_path}: cannot be read (Is a directory); kernels are timed anew"
    ]


def test_what_an_interrupted_build_timed_is_kept(trt_double: Double, tmp_path: Path) -> None:
    def interrupted(double: Double, on: Any, network: Any, config: Any, **_: Any) -> None:
        config.state["cache"].state["entries"].add(b"half")
        config.state["progress_monitor"].phase_start("Building", None, 1)
        os.kill(os.getpid(), 2)
        assert not run_phases(config.state["progress_monitor"])

    trt_double.script["Builder.build_serialized_network"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        build(timing_cache=tmp_path / "times")
    assert (tmp_path / "times").read_bytes() == b"timings:half"
