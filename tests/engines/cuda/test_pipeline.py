"""The pipeline on a stand-in for CUDA that delays and mixes all work as far as streams and marks
allow: it finds what the stages find, however much is under way at once.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from delayed_runtime import DelayedLane, DelayedRuntime
from torch import Tensor

from yolov4_fast import Detector, build_engine
from yolov4_fast.engines.cuda import line, slot, staging
from yolov4_fast.engines.cuda.engine import CudaEngine
from yolov4_fast.engines.cuda.pipeline import CudaPipeline, batch_sizes, image_bytes
from yolov4_fast.engines.engine import DeviceError, EngineError
from yolov4_fast.engines.pipeline import Found, Settings
from yolov4_fast.ops.diou_nms import workspace_bytes
from yolov4_fast.sources import read_image

SETTINGS = Settings(confidence=0.05, iou=0.45, beta=0.6, max_detections=0, resize="stretch")


@pytest.fixture(scope="module")
def delayed_device(cpu_device: type) -> type:
    class DelayedDevice(cpu_device):
        """The marks of a runtime, where there is one; until then everything happens at once."""

        runtime: DelayedRuntime | None = None

        def active(self) -> AbstractContextManager[object]:
            if self.runtime is not None:
                self.runtime.pause()
            return nullcontext()

        def mark(self) -> object:
            return self.runtime.current().mark() if self.runtime else None

        def wait(self, mark: Any) -> None:
            if self.runtime and mark:
                self.runtime.current().wait(mark)

    return DelayedDevice


@pytest.fixture(scope="module")
def engine(mini: Any, delayed_device: type, tmp_path_factory: pytest.TempPathFactory) -> CudaEngine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = build_engine(
            *mini, engine="cuda", precision="f32", max_batch=5, device=delayed_device()
        )
        assert isinstance(made, CudaEngine)
        for batch in batch_sizes(made.max_batch):
            made.executor(batch)
        return made


@pytest.fixture
def runtime(engine: CudaEngine, request: pytest.FixtureRequest) -> Any:
    """The seed of the order of work may be given as a parameter."""
    device = engine._device
    device.runtime = DelayedRuntime(getattr(request, "param", 0))
    engine._last = None
    yield device.runtime
    device.runtime, engine._last = None, None


@pytest.fixture(scope="module")
def images(darknet_reference: Any) -> list[Tensor]:
    """Eight of different sizes, layouts and types."""
    files = [read_image(darknet_reference / f"{name}.png") for name in ("square", "tall", "wide")]
    square, tall, wide = map(torch.from_numpy, files)
    return [
        square,
        tall,
        wide,
        wide[10:200, 30:],
        tall.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        square.flip(1).float() / 255,
        (wide.permute(2, 0, 1).contiguous() / 255).permute(1, 2, 0),
        square[:1, :1],
    ]


@pytest.fixture(scope="module")
def expected(engine: CudaEngine, images: list[Tensor]) -> Callable[[Settings], list[Found]]:
    """Through the stages, one image at a time."""

    def find(settings: Settings) -> list[Found]:
        detector = Detector(
            engine, confidence=settings.confidence, iou=settings.iou, beta=settings.beta,
            max_detections=settings.max_detections, resize=settings.resize,
        )  # fmt: skip
        found = []
        for image in images:
            batch = detector.preprocess([image])
            with torch.inference_mode():
                candidates = detector.decode(engine.run(batch.images), batch.placement)
            keep, kept = detector.suppress(candidates)
            best = keep[0, : int(kept[0])]
            parts = [part[0, best].numpy() for part in candidates[:3]]
            found.append(Found(*parts, 0))
        return found

    return find


def assert_same(found: Sequence[Found], wanted: Sequence[Found], tolerance: float = 2e-5) -> None:
    """One to one. The last bits of a score, and so the order of equal ones, hang on the batch."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.boxes.dtype == ours.scores.dtype == np.float32
        assert ours.class_ids.dtype == np.int64 and ours.dropped == theirs.dropped
        assert (np.diff(ours.scores) <= 0).all()
        distance = np.abs(as_rows(ours)[:, None] - as_rows(theirs)[None]).max(-1)
        assert distance.shape[0] == distance.shape[1]
        if distance.size:
            nearest = distance.argmin(1)
            assert distance[range(len(nearest)), nearest].max() < tolerance
            assert len(set(nearest.tolist())) == len(nearest)


def as_rows(found: Found) -> np.ndarray:
    return np.column_stack((found.boxes, found.scores, found.class_ids))


LETTERBOX = replace(SETTINGS, resize="letterbox", beta=None, confidence=0.2)
FEW = replace(SETTINGS, max_detections=7)


@pytest.mark.parametrize("settings", [SETTINGS, LETTERBOX, FEW], ids=["all", "letterbox", "few"])
def test_finds_what_the_stages_find(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
    settings: Settings,
) -> None:
    wanted = expected(settings)
    assert sum(len(found.scores) for found in wanted) > 50
    pipeline = CudaPipeline(engine, settings, runtime)
    for size in (1, 2, 4, 5, 3):
        assert_same(pipeline.submit(images[:size]).result(), wanted[:size])
    assert_same(pipeline.submit(images[3:]).result(), wanted[3:])


@pytest.mark.parametrize("runtime", range(12), indirect=True)
def test_whatever_the_order_of_work(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    """Five chunks begun before any is read, of two pipelines in turn, read in another order."""
    wanted = {settings: expected(settings) for settings in (LETTERBOX, FEW)}
    pipelines = {settings: CudaPipeline(engine, settings, runtime) for settings in wanted}
    chunks = [slice(0, 2), slice(2, 3), slice(3, 8), slice(1, 4), slice(6, 8)]
    pending = [
        (settings, chunk, pipelines[settings].submit(images[chunk]))
        for chunk in chunks
        for settings in wanted
    ]
    for settings, chunk, ticket in pending[::-3] + pending:
        assert_same(ticket.result(), wanted[settings][chunk])


@pytest.mark.filterwarnings("ignore:invalid value")  # of counts that were never written
@pytest.mark.parametrize("broken", ["marks", "exclusive"])
def test_the_stand_in_notices_what_is_not_ordered(
    engine: CudaEngine,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    """Without the waits of lanes, or of the engine, some order of work gives wrong results."""
    wanted = {settings: expected(settings)[:2] for settings in (LETTERBOX, FEW)}
    if broken == "marks":
        monkeypatch.setattr(DelayedLane, "wait", lambda *_: None)
    else:
        monkeypatch.setattr(engine, "exclusive", nullcontext)

    def fails(seed: int) -> bool:
        runtime = engine._device.runtime = DelayedRuntime(seed)
        pipelines = {settings: CudaPipeline(engine, settings, runtime) for settings in wanted}
        pending = [(s, p.submit(images[:2])) for s, p in pipelines.items() for _ in range(2)]
        try:
            for settings, ticket in pending:
                assert_same(ticket.result(), wanted[settings])
        except (AssertionError, RuntimeError, ValueError):
            return True
        finally:
            engine._device.runtime, engine._last = None, None
        return False

    assert any(map(fails, range(8)))


def test_more_than_the_buffers_take(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Candidates and detections beyond the first sizes are found all the same, and the buffers stay
    large; also where another chunk has used the arena, and other buffers, since.
    """
    monkeypatch.setattr(line, "CANDIDATES", 16)
    monkeypatch.setattr(line, "ROWS", 3)
    wanted = expected(SETTINGS)
    pipeline = CudaPipeline(engine, SETTINGS, runtime)
    first, second = pipeline.submit(images[:3]), pipeline.submit(images[5:])
    assert_same(second.result(), wanted[5:])
    assert_same(first.result(), wanted[:3])
    for _ in range(2):  # either slot once more in its final size
        pending = [pipeline.submit(images[:3]) for _ in range(2)]
        assert_same(pending[0].result() + pending[1].result(), wanted[:3] * 2)
    runtime.captures, runtime.launches = 0, 0
    assert_same(pipeline.submit(images[:3]).result(), wanted[:3])
    assert (runtime.captures, runtime.launches) == (0, 1)


def test_a_limit_of_detections_is_no_overflow(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    pipeline = CudaPipeline(engine, FEW, runtime)
    found = pipeline.submit(images[:1]).result()
    assert len(found[0].scores) == FEW.max_detections
    assert runtime.launches == 2  # before it is captured, and the graph
    assert_same(found, expected(FEW)[:1])


def test_tells_what_nms_did_not_look_at(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in (line, slot):
        monkeypatch.setattr(module, "MAX_CANDIDATES", 550)
    pipeline = CudaPipeline(engine, SETTINGS, runtime)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            crowded, other = pipeline.submit([images[7], images[2]]).result()
    assert crowded.dropped > 0 and other.dropped == 0
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"an image has {crowded.dropped + 550} candidates over the confidence of 0.05"
    ]


def test_images_on_the_device_are_read_in_place_and_in_order(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    """The caller's stream still has to make one of them when it is submitted."""
    wanted = expected(LETTERBOX)
    pipeline = CudaPipeline(engine, LETTERBOX, runtime)
    made, mine = torch.zeros_like(images[2]), runtime.lane()
    runtime.held = [made, images[5]]
    with mine.active():
        mine.run(lambda: made.copy_(images[2]))  # type: ignore[arg-type, return-value]
        pending = pipeline.submit([images[0], made, images[5]])
    assert runtime.copies[0] < images[0].nbytes + 1024
    assert_same(pending.result(), [wanted[0], wanted[2], wanted[5]])


def test_images_on_the_device_live_until_they_are_read(
    engine: CudaEngine, runtime: DelayedRuntime, images: list[Tensor]
) -> None:
    pipeline = CudaPipeline(engine, SETTINGS, runtime)
    image = images[0].clone()
    alive = weakref.ref(image)
    runtime.holds = lambda image: image is alive()  # type: ignore[method-assign]
    pending = pipeline.submit([image])
    del image
    gc.collect()
    assert alive() is not None
    pending.result()
    assert alive() is None


def test_images_on_the_device_must_stay_until_the_result(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are read where they lie, and again where the buffers were too small."""
    image = images[0].clone()
    runtime.held.append(image)
    pipeline = CudaPipeline(engine, SETTINGS, runtime)
    early = pipeline.submit([image])
    image.zero_()
    wanted = expected(SETTINGS)[0]
    assert len(early.result()[0].scores) != len(wanted.scores)

    image.copy_(images[0])
    monkeypatch.setattr(line, "CANDIDATES", 1)
    pipeline = CudaPipeline(engine, SETTINGS, runtime)
    launches = runtime.launches
    pending = pipeline.submit([image])
    assert_same(pending.result(), [wanted])
    assert runtime.launches > launches + 2  # the run before the capture, the graph, and again
    image.zero_()
    assert_same(pending.result(), [wanted])


def test_host_memory_may_change_at_once(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    pipeline = CudaPipeline(engine, LETTERBOX, runtime)
    pending, image = [], images[0].clone()
    for _ in range(4):
        pending.append(pipeline.submit([image, images[1]]))
        image.zero_()
    wanted = expected(LETTERBOX)[:2]
    assert_same(pending[0].result(), wanted)
    assert_same(pending[3].result()[1:], wanted[1:])
    assert len(pending[3].result()[0].scores) != len(wanted[0].scores)


def test_one_copy_each_way_and_one_graph(
    engine: CudaEngine, runtime: DelayedRuntime, images: list[Tensor]
) -> None:
    """Nothing is recorded again for pictures of other sizes, as long as they fit."""
    pipeline = CudaPipeline(engine, FEW, runtime)
    pipeline.submit(images[4:7]).result()
    runtime.copies, runtime.launches, runtime.captures = [], 0, 0
    for chunk in (images[5:], images[1:4], images[:3]):
        pipeline.submit(chunk).result()
    assert len(runtime.copies) == 6 and runtime.launches == 3 and runtime.captures == 0
    assert set(runtime.copies[1::2]) == {3 * (FEW.max_detections + 1) * 6 * 4}
    pixels = sum(image.nbytes for image in images[:3])
    assert pixels < runtime.copies[4] < pixels + 3 * (256 + 112)

    larger = [image.repeat(3, 3, 1) for image in images[:3]]
    pipeline.submit(larger).result()
    assert runtime.captures == 1


def test_threads_and_pipelines_share_an_engine(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    wanted = {settings: expected(settings) for settings in (FEW, LETTERBOX)}
    pipelines = {settings: CudaPipeline(engine, settings, runtime) for settings in wanted}

    def detect(number: int) -> None:
        settings = (FEW, LETTERBOX)[number % 2]
        start = number % 5
        chunk = slice(start, start + 1 + number % 3)
        assert_same(pipelines[settings].submit(images[chunk]).result(), wanted[settings][chunk])

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(detect, range(30)))


def test_chunks_nobody_asks_for(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    pipeline = CudaPipeline(engine, FEW, runtime)
    for _ in range(5):
        pipeline.submit(images[:2])
    assert_same(pipeline.submit(images[2:4]).result(), expected(FEW)[2:4])
    dying = weakref.ref(pipeline._slots[0])
    pipeline.submit(images[:2])
    del pipeline
    gc.collect()
    assert dying() is None


def test_close(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    pipeline = CudaPipeline(engine, FEW, runtime)
    pending = [pipeline.submit(images[:2]) for _ in range(2)]
    pipeline.close()
    for ticket in pending:
        assert_same(ticket.result(), expected(FEW)[:2])
    with pytest.raises(EngineError, match="the pipeline is closed"):
        pipeline.submit(images[:2])
    pipeline.close()


def test_what_goes_wrong_is_raised_where_it_belongs(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the result of the chunk that failed; the slot serves the next one."""
    pipeline = CudaPipeline(engine, FEW, runtime)
    pipeline.submit(images[:1]).result()
    good = runtime.decode

    def bad(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(runtime, "decode", bad)
    failed = pipeline.submit(images[:1])
    other = pipeline.submit(images[:2])
    with pytest.raises(RuntimeError, match="illegal memory"):
        failed.result()
    with pytest.raises(RuntimeError, match="illegal memory"):
        other.result()
    with pytest.raises(RuntimeError, match="illegal memory"):
        failed.result()
    monkeypatch.setattr(runtime, "decode", good)
    for _ in range(3):
        assert_same(pipeline.submit(images[:2]).result(), expected(FEW)[:2])


def test_too_little_memory(
    engine: CudaEngine, runtime: DelayedRuntime, images: list[Tensor], monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    pipeline = CudaPipeline(engine, FEW, runtime)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "memory", full)
        with pytest.raises(DeviceError, match=r"detect in 3 images at once: .*smaller max_batch"):
            pipeline.submit(images[:3])
    assert len(pipeline.submit(images[:3]).result()) == 3


def test_what_an_image_takes_is_known_beforehand(
    engine: CudaEngine, runtime: DelayedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All memory that the slots hold, to the byte, and that of the kernels."""
    taken = []
    memory = runtime.memory

    def counted(*shape: int, **options: Any) -> Tensor:
        taken.append(memory(*shape, **options))
        return taken[-1]

    monkeypatch.setattr(runtime, "memory", counted)
    pipeline = CudaPipeline(engine, replace(SETTINGS, confidence=1.0), runtime)
    picture = torch.zeros(1080, 1920, 3, dtype=torch.uint8)
    chunk = [picture] * engine.max_batch
    for pending in [pipeline.submit(chunk) for _ in range(pipeline.depth)]:
        pending.result()
    held = sum(tensor.nbytes for tensor in taken)
    allowed = engine.max_batch * pipeline.depth * slot.held_bytes()
    assert 0 <= allowed - held < engine.max_batch * pipeline.depth * staging.LINE
    kernels = image_bytes(engine.network) - pipeline.depth * slot.held_bytes()
    assert kernels == (pipeline.depth + 1) * slot.graph_bytes(engine.network)
    assert slot.graph_bytes(engine.network) > workspace_bytes(line.CANDIDATES) > 1.19e6


def test_closing_the_engine_frees_its_pipelines(
    mini: Any,
    cpu_device: type,
    images: list[Tensor],
    tuning_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "yolov4_fast.engines.cuda.pipeline.CudaRuntime"
    monkeypatch.setattr(module, lambda device: DelayedRuntime())
    made = build_engine(*mini, engine="cuda", precision="f32", max_batch=1, device=cpu_device())
    assert isinstance(made, CudaEngine)
    pipeline = made.pipeline(FEW)
    pending = pipeline.submit(images[:1])
    storage = weakref.ref(made._storage)
    made.close()
    assert len(pending.result()) == 1
    assert storage() is None
    with pytest.raises(EngineError, match="closed"):
        pipeline.submit(images[:1])


@pytest.mark.parametrize("count", [0, 6])
def test_refuses_chunks_of_another_size(
    engine: CudaEngine, runtime: DelayedRuntime, images: list[Tensor], count: int
) -> None:
    with pytest.raises(EngineError, match=f"a chunk of {count} images: this engine runs 1 to 5"):
        CudaPipeline(engine, FEW, runtime).submit(images[:count])


def test_a_closed_engine(
    mini: Any, cpu_device: type, images: list[Tensor], tuning_folder: Any
) -> None:
    made = build_engine(*mini, engine="cuda", precision="f32", max_batch=1, device=cpu_device())
    assert isinstance(made, CudaEngine)
    pipeline = CudaPipeline(made, FEW, DelayedRuntime())
    pipeline.submit(images[:1]).result()
    made.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        pipeline.submit(images[:1])


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (5, (1, 2, 3, 4, 5)),
        (8, (1, 2, 3, 4, 6, 8)),
        (33, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 33)),
    ],
)
def test_batch_sizes(largest: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(largest) == sizes


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_the_kernels_themselves(
    engine: CudaEngine,
    runtime: DelayedRuntime,
    images: list[Tensor],
    expected: Callable[[Settings], list[Found]],
) -> None:
    """Resize and decode as on a GPU, run by Triton's interpreter."""
    decode = pytest.importorskip("yolov4_fast.ops.kernels.decode")
    resize = pytest.importorskip("yolov4_fast.ops.kernels.resize")
    runtime.resize, runtime.table_row = resize.launch, resize.table_row
    runtime.decode = decode.append
    pipeline = CudaPipeline(engine, LETTERBOX, runtime)
    assert_same(pipeline.submit(images[1:2]).result(), expected(LETTERBOX)[1:2])
