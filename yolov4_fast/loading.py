"""The images of a batch in chunks, files decoded ahead of their turn by threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from yolov4_fast.sources import to_image


def load(items: Iterable[Any], size: int, whole: str) -> Generator[list[Tensor], None, None]:
    """Images, each [H, W, 3] uint8 or float32 in 0..1, in chunks of `size`, the last one shorter.

    Files are read by threads where there are several, up to a chunk ahead of what was asked for.
    Everything else, and `items` itself, is touched on the caller's thread only and when its turn
    has come. Where an image or `items` raises, what came before is given first, and then the error
    is raised. whole: what errors call the items.
    """
    ahead = _Ahead(iter(items), size, whole)
    try:
        while chunk := ahead.chunk():
            yield chunk
        if ahead.failure is not None:
            raise ahead.failure
    finally:
        ahead.close()


class _Ahead:
    """What was taken from the items and not given yet."""

    def __init__(self, items: Iterator[Any], size: int, whole: str) -> None:
        self.failure: BaseException | None = None
        self._items = items
        self._size = size
        self._whole = whole
        self._count = 0
        self._more = True
        self._waiting: deque[_Image] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def chunk(self) -> list[Tensor]:
        """The next, empty after the last."""
        while self._more and len(self._waiting) < self._enough():
            self._take()
        chunk: list[Tensor] = []
        while self._waiting and len(chunk) < self._size:
            try:
                chunk.append(self._waiting.popleft().result())
            except Exception as error:
                self._waiting.clear()
                self._end(error)
        return chunk

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _enough(self) -> int:
        files = bool(self._waiting) and self._waiting[-1].is_file
        return 2 * self._size if files else self._size

    def _take(self) -> None:
        try:
            item = next(self._items)
        except StopIteration:
            self._end(None)
            return
        except BaseException as error:  # whatever it is, it is for after what came before
            self._end(error)
            return
        image = _Image(item, f"image {self._count} of the {self._whole}")
        self._count += 1
        if image.is_file:
            self._start(image)
        self._waiting.append(image)

    def _start(self, image: _Image) -> None:
        """On a thread, unless it is the only file: starting a thread takes its time too."""
        others = [other for other in self._waiting if other.is_file]
        if self._pool is None and others:
            self._pool = ThreadPoolExecutor(os.cpu_count())
            for other in others:
                other.start(self._pool)
        if self._pool is not None:
            image.start(self._pool)

    def _end(self, failure: BaseException | None) -> None:
        self._more, self.failure = False, failure


class _Image:
    """An item until it is an image."""

    def __init__(self, item: Any, name: str) -> None:
        self.is_file = isinstance(item, str | Path)
        self._item = item
        self._name = name
        self._future: Future[Tensor] | None = None

    def start(self, pool: ThreadPoolExecutor) -> None:
        self._future = pool.submit(to_image, self._item, self._name)

    def result(self) -> Tensor:
        if self._future is not None:
            return self._future.result()
        return to_image(self._item, self._name)
