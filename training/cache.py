"""Decoded pictures kept ready: in memory, or on disk in one file that is mapped into memory.

The file is `MAGIC`, the place of its index (8 bytes, little-endian), the pictures as raw uint8 one
behind the other, and the index as JSON. It takes its place whole, when all pictures are in it, so
what is there is complete. On opening, each picture is held against the source file's path, size and
time of change; if any differs, a new file is written, with the pictures that are still good copied
over. Processes that map the old one go on with it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from yolov4_fast.files import replacing

MAGIC = b"yolov4-fast pictures 1\n\0"
START = len(MAGIC) + 8
THREADS = 4  # that decode
CHUNK = 64  # pictures decoded ahead at most


class Picture(NamedTuple):
    """A decoded picture, perhaps shrunk, and the size it had."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    height: int  # px in the file
    width: int


Load = Callable[[int], Picture]


class Entry(NamedTuple):
    """A picture in the file."""

    source: tuple[str, int, int]  # path, bytes and time of change (ns) of the file it was read from
    offset: int
    shape: tuple[int, int]  # height and width here
    original: tuple[int, int]  # height and width there


def in_memory(count: int, load: Load, limit: int, progress: bool = False) -> dict[int, Picture]:
    """The first of `count` pictures, as many as fit into `limit` bytes."""
    pictures: dict[int, Picture] = {}
    for index, picture in enumerate(_loaded(range(count), load, progress)):
        limit -= picture.image.nbytes
        if limit < 0:
            break
        pictures[index] = picture
    return pictures


def on_disk(
    file: Path,
    sources: Sequence[Path],
    size: tuple[int, int],
    load: Load,
    progress: bool = False,
) -> MappedPictures:
    """The pictures of all `sources` from `file`, which is written where it is not there or not of
    them as they are now.

    size: what `load` shrinks to; a file made for another is not used. Raises OSError if it cannot
    be written.
    """
    stamps = [_stamp(path) for path in sources]
    kept = {entry.source: entry for entry in _entries(file, size)}
    if all(stamp in kept for stamp in stamps):
        return MappedPictures(file, [kept[stamp] for stamp in stamps])
    old = MappedPictures(file, list(kept.values())) if kept else None
    numbers = {stamp: number for number, stamp in enumerate(kept)}

    def fresh(index: int) -> Picture:
        number = numbers.get(stamps[index])
        return load(index) if number is None or old is None else old[number]

    pictures = _loaded(range(len(sources)), fresh, progress)
    return MappedPictures(file, _write(file, stamps, pictures, size))


class MappedPictures(Mapping[int, Picture]):
    """The pictures of a file, each read when it is asked for. A copy in another process maps the
    same file.
    """

    def __init__(self, file: Path, entries: Sequence[Entry]) -> None:
        self.file = file
        self.entries = entries
        self._bytes: np.ndarray = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedPictures, (self.file, self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.entries)))

    def __getitem__(self, index: int) -> Picture:
        entry = self.entries[index]
        height, width = entry.shape
        flat = self._bytes[entry.offset : entry.offset + height * width * 3]
        return Picture(flat.reshape(height, width, 3), *entry.original)


def _loaded(indices: Sequence[int], load: Load, progress: bool) -> Iterator[Picture]:
    """`load` of each, in order, by several threads."""
    with (
        ThreadPoolExecutor(max_workers=THREADS) as pool,
        tqdm(total=len(indices), desc="reading images", disable=not progress) as bar,
    ):
        for start in range(0, len(indices), CHUNK):
            for picture in pool.map(load, indices[start : start + CHUNK]):
                yield picture
                bar.update()


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.absolute()), status.st_size, status.st_mtime_ns


def _entries(file: Path, size: tuple[int, int]) -> list[Entry]:
    """What a file holds; nothing if it is not there, not whole or not for this size."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(START)
            if head[: len(MAGIC)] != MAGIC:
                return []
            end = int.from_bytes(head[len(MAGIC) :], "little")
            stream.seek(end)
            index = json.loads(stream.read())
        if tuple(index["size"]) != size:
            return []
        entries = [
            Entry((path, *stamp), offset, tuple(shape), tuple(original))
            for path, *stamp, offset, shape, original in index["pictures"]
        ]
        fits = all(START <= e.offset <= end - e.shape[0] * e.shape[1] * 3 for e in entries)
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return entries if fits else []


def _write(
    file: Path,
    stamps: Sequence[tuple[str, int, int]],
    pictures: Iterable[Picture],
    size: tuple[int, int],
) -> list[Entry]:
    entries: list[Entry] = []
    try:
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            _write_pictures(stream, stamps, pictures, size, entries)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        written = sum(entry.shape[0] * entry.shape[1] * 3 for entry in entries)
        needed = written / len(entries) * len(stamps) if entries else 0
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: the {len(stamps)} pictures take about "
            f"{needed / 1e9:.1f} GB when decoded; cache them in another folder, or not on disk",
            str(file),
        ) from None
    return entries


def _write_pictures(
    stream: BinaryIO,
    stamps: Sequence[tuple[str, int, int]],
    pictures: Iterable[Picture],
    size: tuple[int, int],
    entries: list[Entry],
) -> None:
    """Writes the file and appends to `entries` what is in it."""
    offset = START
    stream.seek(START)
    for stamp, (image, height, width) in zip(stamps, pictures, strict=True):
        entries.append(Entry(stamp, offset, (image.shape[0], image.shape[1]), (height, width)))
        stream.write(np.ascontiguousarray(image).data)
        offset += image.nbytes
    rows = [(*e.source, e.offset, e.shape, e.original) for e in entries]
    stream.write(json.dumps({"size": size, "pictures": rows}).encode())
    stream.seek(0)
    stream.write(MAGIC + offset.to_bytes(8, "little"))
