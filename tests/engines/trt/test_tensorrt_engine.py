"""The TensorRT engine whole, over doubles of TensorRT (both major versions) and pycuda: what it
finds is what the torch engine finds, whatever the order in which the device works.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cpu_device import CpuDevice
from simulated import MAX_BATCH, Machine, Simulated, SimulatedLane, images_of
from trt_double import Double

from yolov4_fast import Detector, load_engine
from yolov4_fast.engines.bundle import read_bundle
from yolov4_fast.engines.engine import Engine
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.engines.tensorrt.contexts import Contexts
from yolov4_fast.engines.tensorrt.options import TensorRtOptions


def assert_same(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs) > 0
        np.testing.assert_array_equal(ours.class_ids, theirs.class_ids)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=2e-5)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=2e-2)


def test_finds_what_the_torch_engine_finds(
    machine: Machine, torch_engine: Engine, pictures: list[np.ndarray]
) -> None:
    engine = machine.build()
    for settings in ({"confidence": 0.1}, {"resize": "letterbox", "beta": None}):
        detector = Detector(engine, **settings)
        assert detector.pipeline is not None
        wanted = Detector(torch_engine, **settings).detect(pictures * 3)
        assert_same(detector.detect(pictures * 3), wanted)
        assert_same(list(detector.stream(iter(pictures), batch=2)), wanted[:3])
    assert 0 not in machine.streams
    assert machine.streams <= set(machine.pycuda.of_kind("Stream"))
    engine.close()


@pytest.mark.parametrize("batch", [1, 2, MAX_BATCH])
def test_run_gives_the_maps_of_the_torch_engine(
    machine: Machine, torch_engine: Engine, batch: int
) -> None:
    engine = machine.build()
    for seed in range(3):
        images = images_of(batch, engine, seed)
        maps = machine.run(engine, images)
        for ours, theirs in zip(maps, torch_engine.run(images), strict=True):
            assert ours.is_contiguous() and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    engine.close()


def test_maps_belong_to_the_caller(machine: Machine) -> None:
    engine = machine.build()
    first = machine.run(engine, images_of(2, engine))
    kept = [raw.clone() for raw in first]
    machine.run(engine, images_of(2, engine, 1))
    engine.close()
    for raw, before in zip(first, kept, strict=True):
        assert torch.equal(raw, before)


def test_a_context_for_each_batch_size_and_one_graph(machine: Machine) -> None:
    """Everything is made at the first run of a size: shapes, addresses, a warm run, a capture."""
    engine = machine.build()
    pictures = {batch: images_of(batch, engine) for batch in (1, 3)}
    for batch in (1, 3):
        machine.run(engine, pictures[batch])
    captures, count = engine._runtime.captures, len(machine.trt.calls)
    assert captures == 2
    allocations = len(machine.pycuda.live)
    for batch in (3, 1, 3):
        machine.run(engine, pictures[batch])
    assert engine._runtime.captures == captures
    assert {call.name for call in machine.trt.calls[count:]} == {
        "IExecutionContext.execute_async_v3"
    }
    assert len(machine.trt.calls) == count + 3
    assert len(machine.pycuda.live) == allocations
    shapes = machine.trt.arguments("IExecutionContext.set_input_shape")
    assert sorted(next(iter(shape["shape"])) for shape in shapes) == [1, 3, MAX_BATCH]
    engine.close()


def test_the_calls_before_a_run_are_in_order(machine: Machine) -> None:
    engine = machine.build()
    machine.run(engine, images_of(MAX_BATCH, engine))
    names = [name.split(".")[1] for name in machine.trt.names() if "IExecutionContext" in name]
    maps = len(engine.network.heads)
    assert names[: 4 + maps + 1] == [
        "set_device_memory", "set_input_shape", *["set_tensor_address"] * (1 + maps),
        "infer_shapes", "execute_async_v3",
    ]  # fmt: skip
    (memory,) = machine.trt.arguments("IExecutionContext.set_device_memory")
    addresses = machine.trt.arguments("IExecutionContext.set_tensor_address")
    starts = sorted(call["memory"] for call in addresses)
    assert all((start - starts[0]) % 256 == 0 for start in (*starts, memory["memory"]))
    assert memory["memory"] > starts[-1]
    engine.close()


def test_threads_take_contexts_of_their_own(
    machine: Machine, torch_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = machine.build()
    images = [images_of(1 + n % 3, engine, n) for n in range(12)]
    run, all_run = Contexts.run, Barrier(4)

    def together(contexts: Contexts, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        all_run.wait(60)
        return run(contexts, given)

    monkeypatch.setattr(Contexts, "run", together)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(engine.run, images))
    machine.wait(engine)
    for image, maps in zip(images, found, strict=True):
        for ours, theirs in zip(maps, torch_engine.run(image), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(engine._idle) == len(engine._contexts) == 4
    engine.close()


def test_maps_are_found_by_name(machine: Machine, torch_engine: Engine) -> None:
    """TensorRT may list inputs and outputs in any order."""

    def listed(double: Double, on: Any, index: int) -> str:
        return list(on.state["tensors"])[::-1][index]

    machine.trt.script["ICudaEngine.get_tensor_name"] = listed
    engine = machine.build()
    images = images_of(2, engine)
    for ours, theirs in zip(machine.run(engine, images), torch_engine.run(images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    engine.close()


@pytest.mark.parametrize("seed", range(4))
def test_pipelines_and_runs_at_once(
    machine: Machine,
    torch_engine: Engine,
    pictures: list[np.ndarray],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two detectors with chunks under way, and a run between them, in any order of the work."""
    monkeypatch.setattr(Simulated, "seed", seed)
    engine = machine.build()
    settings = ({"confidence": 0.1}, {"confidence": 0.2, "resize": "letterbox"})
    wanted = [Detector(torch_engine, **each).detect(pictures) for each in settings]
    images = images_of(2, engine, seed)
    tensors = [torch.from_numpy(picture) for picture in pictures]
    lines = [Detector(engine, **each).pipeline for each in settings]
    pending = [line.submit(tensors[:2]) for line in lines]
    maps = engine.run(images)
    pending += [line.submit(tensors[2:]) for line in lines]
    found = [ticket.result() for ticket in pending]
    machine.wait(engine)
    for ours, theirs in zip(maps, torch_engine.run(images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for number in range(2):
        for ours, theirs in zip(found[number] + found[number + 2], wanted[number], strict=True):
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=2e-5)
    engine.close()


def test_a_run_waits_for_the_stream_of_its_caller(machine: Machine, torch_engine: Engine) -> None:
    """The image has yet to be made when `run` is called, and is changed after it, all in one stream
    that nobody waits for; in several orders of the work.
    """
    engine = machine.build()
    image, wanted = torch.zeros(1, 3, engine.height, engine.width), images_of(1, engine)
    expected = torch_engine.run(wanted)
    mine = engine._runtime.lane()
    for seed in range(8):
        engine._runtime._random.seed(seed)
        with mine.active():
            mine.run(lambda: image.copy_(wanted))
            maps = engine.run(image)
            mine.run(image.zero_)
        mine.synchronize()
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    engine.close()


@pytest.mark.filterwarnings("ignore:invalid value")  # of counts that were never written
@pytest.mark.parametrize("broken", ["wait", "exclusive"])
def test_the_simulation_notices_what_is_not_ordered(
    machine: Machine,
    torch_engine: Engine,
    pictures: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    """Without the waits of lanes, or of contexts, some order of work gives wrong results."""
    settings = ({"confidence": 0.1}, {"confidence": 0.2, "resize": "letterbox"})
    wanted = [Detector(torch_engine, **each).detect(pictures[:2]) for each in settings]
    tensors = [torch.from_numpy(picture) for picture in pictures[:2]]
    if broken == "wait":
        monkeypatch.setattr(SimulatedLane, "wait", lambda *_: None)
    else:
        monkeypatch.setattr(Contexts, "exclusive", lambda self: nullcontext())

    def fails(seed: int) -> bool:
        monkeypatch.setattr(Simulated, "seed", seed)
        engine = machine.build()
        lines = [Detector(engine, **each).pipeline for each in settings]
        pending = [(line, line.submit(tensors)) for _ in range(2) for line in lines]
        try:
            for line, ticket in pending:
                scores = [one.scores for one in ticket.result()]
                for ours, theirs in zip(scores, wanted[lines.index(line)], strict=True):
                    np.testing.assert_allclose(ours, theirs.scores, atol=2e-5)
        except (AssertionError, RuntimeError, ValueError):
            return True
        return False

    assert any(map(fails, range(8)))


def test_the_file_runs_and_tells_what_it_was_built_with(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "trt.engine"
    built = machine.build(path=path, precision="fp16")
    bundle = read_bundle(path)
    assert bundle.manifest.kind == "tensorrt" and bundle.manifest.precision == "fp16"
    assert bundle.manifest.gpu == {"name": "NVIDIA H200", "sm": "90"}
    assert bundle.manifest.versions["tensorrt"] == machine.trt.module.__version__
    facts = json.loads(bundle.payload["plan.json"])
    assert facts["tensorrt"] == machine.trt.module.__version__
    assert json.loads(bundle.payload["layers.json"])["Layers"]
    loaded = load_engine(path, CpuDevice())
    images = images_of(2, built)
    for ours, theirs in zip(machine.run(loaded, images), machine.run(built, images), strict=True):
        assert torch.equal(ours, theirs)
    built.close()
    loaded.close()


def test_a_plan_for_no_less_than_two_images_runs_one(
    machine: Machine, torch_engine: Engine
) -> None:
    engine = machine.build(tensorrt=TensorRtOptions(min_batch=2, timing_cache=None))
    images = images_of(1, engine)
    maps = machine.run(engine, images)
    for ours, theirs in zip(maps, torch_engine.run(images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    engine.close()


@pytest.mark.parametrize("method", [None, "percentile"])
def test_int8_is_built_of_what_the_quantiser_makes(
    machine: Machine, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked: list[dict[str, Any]] = []

    def quantize(network: Any, state: Any, images: Any, **options: Any) -> Any:
        asked.append(options | {"images": [tuple(image.shape) for image in images]})
        return SimpleNamespace(model=export_onnx(network, state, precision="fp16"))

    module = ModuleType("yolov4_fast.engines.quantize")
    module.quantize = quantize
    monkeypatch.setitem(sys.modules, module.__name__, module)
    calibration = [torch.from_numpy(picture) for picture in pictures]
    engine = machine.build(precision="int8", calibration=calibration, calibration_method=method)
    images = [(1, 3, 128, 160)] * 3
    assert asked == [{"types": "fp16", "method": method, "progress": False, "images": images}]
    machine.run(engine, images_of(1, engine))
    engine.close()
