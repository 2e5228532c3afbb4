"""Loading: chunks in order, files ahead of their turn and on threads, errors in their place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from yolov4_fast import loading
from yolov4_fast.loading import load


def array(number: int) -> np.ndarray:
    return np.full((4, 5, 3), number, np.uint8)


def numbers(chunks: Any) -> list[list[int]]:
    return [[int(image[0, 0, 0]) for image in chunk] for chunk in chunks]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Nine pictures, each of one value."""
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for number, path in enumerate(paths):
        Image.fromarray(array(number)).save(path)
    return paths


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, threading.Thread]:
    """Which images were turned into tensors, and by whom."""
    by: dict[str, threading.Thread] = {}
    to_image = loading.to_image

    def noted(item: Any, name: str) -> Tensor:
        by[name] = threading.current_thread()
        return to_image(item, name)

    monkeypatch.setattr(loading, "to_image", noted)
    return by


@pytest.mark.parametrize(
    ("count", "size", "lengths"),
    [(0, 3, []), (1, 3, [1]), (3, 3, [3]), (7, 3, [3, 3, 1]), (5, 1, [1] * 5), (2, 9, [2])],
)
@pytest.mark.parametrize("kind", ["files", "arrays", "mixed"])
def test_chunks_in_order(
    files: list[Path], count: int, size: int, lengths: list[int], kind: str
) -> None:
    is_file = {"files": lambda n: True, "arrays": lambda n: False, "mixed": lambda n: n % 3 != 1}
    items = [files[n] if is_file[kind](n) else array(n) for n in range(count)]
    chunks = numbers(load(iter(items), size, "batch"))
    assert [len(chunk) for chunk in chunks] == lengths
    assert [number for chunk in chunks for number in chunk] == list(range(count))


def test_files_are_read_by_threads_a_chunk_ahead(
    files: list[Path], read: dict[str, threading.Thread]
) -> None:
    asked = []

    def paths() -> Iterator[Path]:
        for number, path in enumerate(files):
            asked.append(number)
            yield path

    chunks = load(paths(), 2, "batch")
    next(chunks)
    assert asked == [0, 1, 2, 3]
    next(chunks)
    assert asked == [0, 1, 2, 3, 4, 5]
    chunks.close()
    assert threading.main_thread() not in read.values()
    assert not any(thread.is_alive() for thread in read.values())


def test_a_single_file_needs_no_thread(
    files: list[Path], read: dict[str, threading.Thread]
) -> None:
    assert numbers(load([array(1), files[2], array(3)], 3, "batch")) == [[1, 2, 3]]
    assert set(read.values()) == {threading.main_thread()}


def test_what_is_no_file_waits_for_its_turn() -> None:
    """A generator may fill one array again and again, if it runs one image at a time."""
    buffer = array(0)

    def frames() -> Iterator[np.ndarray]:
        for number in range(4):
            buffer[:] = number
            yield buffer

    assert numbers(load(frames(), 1, "stream")) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_a_bad_image_comes_after_all_before_it(files: list[Path], size: int) -> None:
    files[4].write_text("no picture")
    chunks = load(files, size, "batch")
    found: list[int] = []
    with pytest.raises(ValueError, match=r"image 4 of the batch: .*4\.png is not a readable"):
        for chunk in chunks:
            found += numbers([chunk])[0]
    assert found == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()])
def test_an_error_of_the_items_comes_after_all_before_it(error: BaseException) -> None:
    def items() -> Iterator[np.ndarray]:
        yield array(0)
        yield array(1)
        yield array(2)
        raise error

    found = []
    with pytest.raises(type(error)):
        for chunk in load(items(), 2, "batch"):
            found += numbers([chunk])[0]
    assert found == [0, 1, 2]


def test_names_what_it_loads() -> None:
    with pytest.raises(ValueError, match="image 1 of the stream is a tensor"):
        list(load([array(0), torch.zeros(3, 4, dtype=torch.uint8)], 2, "stream"))
