"""What the TensorRT engine takes it gives back, when nothing on the device uses it any more: at
close, when it is dropped, and where a run fails.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from simulated import Machine, SimulatedLane, images_of
from trt_behaviour import BEHAVIOUR
from trt_double import Double

from yolov4_fast import Detector
from yolov4_fast.engines.cuda.pipeline import CudaPipeline
from yolov4_fast.engines.cuda.runtime import CAPTURING
from yolov4_fast.engines.engine import Engine, EngineError
from yolov4_fast.engines.pipeline import Settings
from yolov4_fast.engines.tensorrt import engine as engine_module


def test_a_run_that_fails_half_way_is_waited_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads images and writes maps that the caller's stream may use for something else next."""
    engine = machine.build()
    images = images_of(1, engine)
    machine.run(engine, images)
    done: list[int] = []

    def run(lane: SimulatedLane, work: Any) -> None:
        lane._push(None, lambda: done.append(seed))
        raise EngineError("half way")

    monkeypatch.setattr(SimulatedLane, "run", run)
    for seed in range(8):
        engine._runtime._random.seed(seed)
        with pytest.raises(EngineError, match="half way"):
            engine.run(images)
        machine.wait(engine)
        assert done[-1:] == [seed]
    engine.close()


def test_close_frees_everything_and_can_be_done_twice(
    machine: Machine, pictures: list[np.ndarray]
) -> None:
    engine = machine.build()
    detector = Detector(engine, confidence=0.1)
    detector.detect(pictures)
    machine.run(engine, images_of(2, engine))
    assert machine.pycuda.primary == 1
    assert machine.pycuda.of_kind("DeviceAllocation")
    assert machine.pycuda.of_kind("PagelockedHostAllocation")
    with ThreadPoolExecutor(1) as other:  # than the one that made the context
        other.submit(engine.close).result()
    engine.close()
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0
    for _ in range(2):  # with the contexts that it had, and where a thread would take new ones
        with pytest.raises(EngineError, match="closed"):
            engine.run(images_of(1, engine))
        engine._idle.clear()
    with pytest.raises(EngineError, match="closed"):
        detector.detect(pictures)
    with pytest.raises(EngineError, match="closed"):
        engine.pipeline(detector._pipelines[0])
    with pytest.raises(EngineError, match="closed"):
        engine.learnt()


def test_a_pipeline_that_is_made_while_the_engine_closes_is_closed_too(
    machine: Machine, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = machine.build()
    closing = Thread(target=engine.close)

    class Slow(CudaPipeline):
        def __init__(self, *given: Any) -> None:
            closing.start()
            closing.join(0.3)
            super().__init__(*given)

    monkeypatch.setattr(engine_module, "CudaPipeline", Slow)
    settings = Settings(confidence=0.1, iou=0.5, beta=None, max_detections=0, resize="stretch")
    made = engine.pipeline(settings)
    closing.join()
    with pytest.raises(EngineError, match="closed"):
        made.submit([torch.from_numpy(pictures[0])])
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0


def test_an_engine_that_is_dropped_frees_everything(
    machine: Machine, pictures: list[np.ndarray]
) -> None:
    detector = Detector(machine.build())
    detector.detect(pictures)
    machine.run(detector.engine, images_of(1, detector.engine))
    machine.trt.calls.clear()  # which hold contexts
    del detector
    gc.collect()
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0


def test_an_engine_that_is_dropped_waits_for_its_work(
    machine: Machine, torch_engine: Engine
) -> None:
    engine = machine.build()
    images = images_of(2, engine)
    expected = torch_engine.run(images)
    machine.run(engine, images)
    runtime, maps = engine._runtime, engine.run(images)
    compute = engine._contexts[0]._lane
    del engine
    gc.collect()
    assert not compute.queue
    for lane in runtime._lanes:  # what is left: the caller's stream waits for a lane
        assert all(mark is None or mark.reached for mark, _ in lane.queue)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "method", ["Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"]
)
def test_tensorrt_allocates_while_nothing_is_captured(
    machine: Machine, tmp_path: Path, method: str
) -> None:
    """It may wait for the device, which spoils a capture of another thread."""
    behaviour, free = BEHAVIOUR[method], []

    def capture_elsewhere() -> bool:
        taken = CAPTURING.acquire(blocking=False)
        if taken:
            CAPTURING.release()
        return taken

    def allocate(double: Double, on: Any, **named: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(capture_elsewhere).result())
        return behaviour(double, on, **named)

    machine.trt.script[method] = allocate
    engine = machine.build(path=tmp_path / "trt.engine")  # with its layers, of a context of theirs
    machine.run(engine, images_of(1, engine))
    assert free and not any(free)
    engine.close()
