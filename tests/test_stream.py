"""Detector.stream, and detect through an engine's pipeline: lazy, in order, as many chunks under
way as the pipeline takes, errors after what came before them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from yolov4_fast import Detections, Detector, build_engine
from yolov4_fast.engines import Engine
from yolov4_fast.engines.pipeline import Found, Pending, Pipeline, Settings
from yolov4_fast.sources import read_image

NAMES = ("square.png", "tall.png", "wide.png")


class Staged(Pipeline):
    """The stages behind the pipeline's interface: a chunk is worked on when it is asked for."""

    depth = 2

    def __init__(self, engine: Engine, settings: Settings, log: list[str]) -> None:
        self.stages = Detector(engine, **vars(settings))
        self.settings = settings
        self.log = log

    def submit(self, images: Sequence[Tensor]) -> Pending:
        self.log.append(f"submit {len(images)}")
        return StagedPending(self, list(images))

    def close(self) -> None:
        pass


class StagedPending(Pending):
    def __init__(self, pipeline: Staged, images: list[Tensor]) -> None:
        self.pipeline = pipeline
        self.images = images

    def result(self) -> list[Found]:
        self.pipeline.log.append(f"result {len(self.images)}")
        stages = self.pipeline.stages
        with torch.inference_mode():
            batch = stages.preprocess(self.images)
            maps = stages.engine.run(batch.images)
            candidates = stages.decode(maps, batch.placement)
            keep, kept = stages.suppress(candidates)
        found = []
        for index, count in enumerate(kept.tolist()):
            best = keep[index, :count]
            boxes, scores, class_ids = (part[index, best].numpy() for part in candidates[:3])
            found.append(Found(boxes, scores, class_ids.astype(np.int64), 0))
        return found


@pytest.fixture(scope="module")
def plain(mini: Any) -> Engine:
    return build_engine(*mini, engine="torch", precision="f32", max_batch=2)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture(params=["stages", "pipeline"])
def engine(
    plain: Engine, request: pytest.FixtureRequest, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> Engine:
    """The same engine with and without a pipeline."""
    if request.param == "pipeline":

        def pipeline(settings: Settings) -> Pipeline:
            log.append("pipeline")
            return Staged(copy.copy(bare), settings, log)

        bare = copy.copy(plain)
        engine = copy.copy(plain)
        engine.pipeline = pipeline  # type: ignore[method-assign]
        return engine
    return plain


@pytest.fixture(scope="module")
def paths(darknet_reference: Path) -> list[Path]:
    return [darknet_reference / name for name in NAMES]


@pytest.fixture(scope="module")
def expected(plain: Engine, paths: list[Path]) -> list[Detections]:
    detector = Detector(plain)
    return [found for path in paths for found in detector.detect(path)]


def assert_same(ours: Sequence[Detections], theirs: Sequence[Detections]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.image_size == other.image_size
        np.testing.assert_array_equal(one.class_ids, other.class_ids)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=1e-2)


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_finds_what_detect_finds(
    engine: Engine, paths: list[Path], expected: list[Detections], count: int, batch: int | None
) -> None:
    detector = Detector(engine)
    given = [paths[number % 3] if number % 2 else read_image(paths[number % 3])
             for number in range(count)]  # fmt: skip
    wanted = [expected[number % 3] for number in range(count)]
    assert_same(list(detector.stream(iter(given), batch)), wanted)
    assert_same(detector.detect(item for item in given), wanted)


@pytest.mark.parametrize("engine", ["pipeline"], indirect=True)
def test_two_chunks_are_under_way(engine: Engine, paths: list[Path], log: list[str]) -> None:
    """The third begins as soon as the first is done, before anybody looks at that."""
    image = read_image(paths[0])

    def images() -> Iterator[np.ndarray]:
        for number in range(7):
            log.append(f"image {number}")
            yield image

    found = Detector(engine).stream(images())
    assert log == []
    next(found)
    begun = ["pipeline", "image 0", "image 1", "submit 2", "image 2", "image 3", "submit 2",
             "image 4", "image 5", "result 2", "submit 2"]  # fmt: skip
    assert log == begun
    next(found)
    assert log == begun
    assert len(list(found)) == 5
    assert log[len(begun) :] == ["image 6", "result 2", "submit 1", "result 2", "result 1"]


@pytest.mark.parametrize("engine", ["stages"], indirect=True)
def test_without_a_pipeline_nothing_is_asked_for_early(engine: Engine, paths: list[Path]) -> None:
    image, asked = read_image(paths[0]), []

    def images() -> Iterator[np.ndarray]:
        for number in range(5):
            asked.append(number)
            yield image

    found = Detector(engine).stream(images(), 1)
    for number in range(5):
        next(found)
        assert asked == list(range(number + 1))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_an_error_comes_after_all_before_it(
    engine: Engine, paths: list[Path], expected: list[Detections], count: int
) -> None:
    def images() -> Iterator[Path]:
        yield from (paths[number % 3] for number in range(count))
        raise KeyError("mine")

    found = []
    with pytest.raises(KeyError, match="mine"):
        for detections in Detector(engine).stream(images()):
            found.append(detections)
    assert_same(found, [expected[number % 3] for number in range(count)])


def test_names_the_bad_image(engine: Engine, paths: list[Path]) -> None:
    found = Detector(engine).stream([*paths, "none.png", *paths])
    for _ in paths:
        next(found)
    with pytest.raises(FileNotFoundError, match=r"image 3 of the stream: no such .*none\.png"):
        next(found)


@pytest.mark.parametrize("batch", [0, 3, -1])
def test_refuses_a_batch_at_once(engine: Engine, batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch {batch}: this engine runs 1 to 2 images"):
        Detector(engine).stream([], batch)


@pytest.mark.parametrize("images", [None, 3, b"abc", {"a": 1}])
def test_refuses_what_is_no_stream_at_once(engine: Engine, images: Any) -> None:
    with pytest.raises(ValueError, match="a batch cannot be a"):
        Detector(engine).stream(images)


def test_may_be_left_early(engine: Engine, paths: list[Path], expected: list[Detections]) -> None:
    detector = Detector(engine)
    found = detector.stream(paths * 3)
    assert_same([next(found)], expected[:1])
    found.close()
    assert_same(detector.detect(paths), expected)


@pytest.mark.parametrize("engine", ["pipeline"], indirect=True)
def test_a_pipeline_goes_with_its_settings(engine: Engine, paths: list[Path]) -> None:
    """It is made once, and again for a copy whose confidence was changed, as `evaluate` does."""
    detector = Detector(engine, max_detections=5, beta=None)
    pipeline = detector.pipeline
    assert isinstance(pipeline, Staged) and detector.pipeline is pipeline
    assert pipeline.settings == Settings(
        confidence=0.25, iou=0.45, beta=None, max_detections=5, resize="stretch"
    )
    other = copy.copy(detector)
    assert other.pipeline is pipeline
    other.confidence = 0.9
    assert len(other.detect(paths[0])[0]) < len(detector.detect(paths[0])[0])
    assert detector.pipeline is pipeline and other.pipeline is not pipeline


@pytest.mark.parametrize("engine", ["stages"], indirect=True)
def test_no_state_of_torch_leaks_between_images(engine: Engine, paths: list[Path]) -> None:
    for _ in Detector(engine).stream(paths, 1):
        assert not torch.is_inference_mode_enabled()
