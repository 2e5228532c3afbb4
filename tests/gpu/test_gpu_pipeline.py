"""The pipeline on a GPU: it finds what the stages find, through graphs and streams, with images on
either side, threads, several detectors, buffers that turn out too small, and graphs recorded while
others run.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from yolov4_fast import Detections, Detector, build_engine
from yolov4_fast.engines.cuda import line
from yolov4_fast.engines.cuda.engine import CudaEngine
from yolov4_fast.engines.cuda.pipeline import CudaPipeline
from yolov4_fast.sources import read_image, to_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SETTINGS = {"confidence": 0.05, "resize": "letterbox"}


@pytest.fixture(scope="module", params=["fp16", "f32"])
def engine(request: pytest.FixtureRequest, mini: Any) -> Iterator[CudaEngine]:
    made = build_engine(*mini, engine="cuda", precision=request.param, max_batch=5)
    assert isinstance(made, CudaEngine)
    yield made
    made.close()


@pytest.fixture(scope="module")
def images(darknet_reference: Path) -> list[Any]:
    """As a user gives them, on the host."""
    square, tall, wide = (
        read_image(darknet_reference / f"{name}.png") for name in ("square", "tall", "wide")
    )
    planes = torch.from_numpy(tall).permute(2, 0, 1)
    return [
        square,
        tall,
        wide[10:200, 30:],
        planes.contiguous(),
        planes.float() / 255,
        np.tile(wide, (2, 3, 1)),
        square[:1, :1],
    ]


def staged(detector: Detector, images: Sequence[Any]) -> list[Detections]:
    """One chunk through the stages."""
    with torch.inference_mode():
        batch = detector.preprocess([to_image(image) for image in images])
        candidates = detector.decode(detector.engine.run(batch.images), batch.placement)
        return detector.collect(candidates, *detector.suppress(candidates), batch.sizes)


def assert_same(ours: Sequence[Detections], theirs: Sequence[Detections]) -> None:
    """One to one: the same kernels on the same numbers, but for the order of equal scores."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.image_size == other.image_size and len(one) == len(other)
        assert (np.diff(one.scores) <= 0).all()
        rows, others = (
            np.column_stack((found.boxes / 100, found.scores, found.class_ids))
            for found in (one, other)
        )
        distance = np.abs(rows[:, None] - others[None]).max(-1)
        assert not len(rows) or distance.min(1).max() < 1e-4 > distance.min(0).max()


def in_threads(work: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("beta", [0.6, None])
def test_finds_what_the_stages_find(
    engine: CudaEngine, images: list[Any], resize: Any, beta: float | None
) -> None:
    detector = Detector(engine, confidence=0.05, resize=resize, beta=beta)
    assert isinstance(detector.pipeline, CudaPipeline)
    for chunk in (images[:1], images[:5], images[2:4], images[4:], images[1:5], images[:5]):
        wanted = staged(detector, chunk)
        assert sum(map(len, wanted)) > 0
        assert_same(detector.detect(chunk), wanted)


def test_max_detections(engine: CudaEngine, images: list[Any]) -> None:
    detector = Detector(engine, max_detections=3, **SETTINGS)
    found = detector.detect(images[:5])
    assert [len(each) for each in found] == [3] * 5
    assert_same(found, staged(detector, images[:5]))


def test_a_stream_overlaps_and_keeps_its_order(engine: CudaEngine, images: list[Any]) -> None:
    detector = Detector(engine, **SETTINGS)
    wanted = [staged(detector, [image])[0] for image in images]
    found = list(detector.stream((images[n % 7] for n in range(50)), 1))
    assert_same(found, [wanted[n % 7] for n in range(50)])
    chunks = [[images[(5 * k + n) % 7] for n in range(5)] for k in range(6)]
    wanted = [found for chunk in chunks for found in staged(detector, chunk)]
    assert_same(list(detector.stream(image for chunk in chunks for image in chunk)), wanted)


def test_cuda_tensors_are_taken_in_place_and_in_order(
    engine: CudaEngine, images: list[Any]
) -> None:
    """Each is only made on the caller's stream, late, and nothing else holds it."""
    detector = Detector(engine, **SETTINGS)
    host = [to_image(image).permute(2, 0, 1) for image in images]
    wanted = [staged(detector, [image])[0] for image in images]
    torch.cuda.synchronize()

    def made() -> Iterator[Tensor]:
        for turn in range(40):
            image = host[turn % 7].to(engine.device, non_blocking=True)
            torch.cuda._sleep(1_000_000)
            yield image.flip(2).flip(2)
            torch.empty_like(image).fill_(0)  # takes the memory as soon as it may

    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert_same(list(detector.stream(made(), 1)), [wanted[n % 7] for n in range(40)])
            mixed = [images[0], host[1].to(engine.device), host[4].to(engine.device), images[2]]
            assert_same(detector.detect(mixed), staged(detector, mixed))
            assert torch.cuda.current_stream() == stream


def test_more_than_the_buffers_take(
    engine: CudaEngine, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "CANDIDATES", 16)
    monkeypatch.setattr(line, "ROWS", 2)
    detector = Detector(engine, **SETTINGS)
    wanted = staged(detector, images[:5])
    for _ in range(3):
        assert_same(list(detector.stream(images[:5] * 3)), wanted * 3)


def test_threads_detectors_and_the_engine_itself(engine: CudaEngine, images: list[Any]) -> None:
    """All over one arena, and graphs are recorded while others run."""
    shared = Detector(engine, **SETTINGS)
    other = {"confidence": 0.2, "resize": "stretch"}
    wanted = {
        name: [staged(Detector(engine, **settings), [image])[0] for image in images]
        for name, settings in (("shared", SETTINGS), ("other", other))
    }
    pixels = torch.rand(2, 3, engine.height, engine.width, device=engine.device)
    maps = engine.run(pixels)
    torch.cuda.synchronize()

    def work(number: int) -> None:
        own = Detector(engine, **other)
        for turn in range(30):
            index = (number + turn) % 7
            match (number + turn) % 3:
                case 0:
                    assert_same(shared.detect(images[index]), [wanted["shared"][index]])
                case 1:
                    assert_same(own.detect(images[index]), [wanted["other"][index]])
                case _:
                    again = engine.run(pixels)
                    assert all(map(torch.equal, again, maps))
            if turn % 10 == 9:
                size = 2 + number % 4
                assert len(own.detect(images[:size])) == size  # perhaps a graph that is new

    in_threads(work, 6)


def test_results_do_not_change_from_run_to_run(engine: CudaEngine, images: list[Any]) -> None:
    detector = Detector(engine, **SETTINGS)
    first = detector.detect(images[:5])
    for _ in range(30):
        for ours, theirs in zip(detector.detect(images[:5]), first, strict=True):
            np.testing.assert_array_equal(ours.boxes, theirs.boxes)
            np.testing.assert_array_equal(ours.scores, theirs.scores)
            np.testing.assert_array_equal(ours.class_ids, theirs.class_ids)


def test_chunks_nobody_asks_for(engine: CudaEngine, images: list[Any]) -> None:
    chunk = [to_image(image) for image in images[:5]]
    wanted = staged(Detector(engine, **SETTINGS), images[:5])
    for _ in range(5):
        detector = Detector(engine, **SETTINGS)
        pipeline = detector.pipeline
        assert pipeline is not None
        for _ in range(3):
            pipeline.submit(chunk)
        del pipeline, detector
        gc.collect()
        assert_same(Detector(engine, **SETTINGS).detect(images[:5]), wanted)


def test_memory_does_not_grow(engine: CudaEngine, images: list[Any]) -> None:
    detector = Detector(engine, **SETTINGS)

    def detect(count: int) -> None:
        for number in range(count):
            detector.detect(images[number % 7])
            if number % 20 == 0:
                detector.detect(images[:5])

    detect(40)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    detect(200)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_close(engine: CudaEngine, images: list[Any]) -> None:
    detector = Detector(engine, **SETTINGS)
    pipeline = detector.pipeline
    assert pipeline is not None
    engine.executor(1)
    gc.collect()
    before = torch.cuda.memory_allocated()
    pending = pipeline.submit([to_image(images[0])])
    assert torch.cuda.memory_allocated() > before
    pipeline.close()
    assert torch.cuda.memory_allocated() <= before
    assert len(pending.result()[0].scores) == len(staged(detector, images[:1])[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu(mini: Any, images: list[Any]) -> None:
    with build_engine(*mini, engine="cuda", max_batch=5, device="cuda:1") as engine:
        detector = Detector(engine, **SETTINGS)
        given = [images[0], to_image(images[1]).permute(2, 0, 1).to("cuda:0"), images[2]]
        assert_same(detector.detect(given), staged(detector, images[:3]))
        assert torch.cuda.current_device() == 0
