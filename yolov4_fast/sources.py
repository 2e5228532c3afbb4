"""What a user can point at, turned into images: files, folders, globs, videos, cameras, streams,
arrays, tensors, PIL.

Two ways in. `frames` walks any mixture of sources and yields one `Frame` per picture, skipping and
remembering what cannot be read; picture files are read by threads, ahead of their turn. `to_image`
turns one member of a batch given to `Detector.detect` into a tensor, without a copy where memory
allows, or says what is wrong with it. Every image is RGB; files have their EXIF orientation
applied.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    ".bmp .dib .jpeg .jpg .jpe .jp2 .png .webp .pbm .pgm .ppm .pnm .tif .tiff".split()
)
VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .ts .webm .wmv".split())

EXPECTED = (
    "give a path, a PIL image, a numpy array [H, W, 3] uint8 RGB, "
    "or a torch tensor [3, H, W] uint8 or floating point in 0..1"
)


def read_image(path: str | Path) -> np.ndarray:  # [H, W, 3] uint8 RGB
    """Decode an image file with its EXIF orientation applied; grey and transparent pictures become
    RGB.

    Raises FileNotFoundError where there is no such file, and ValueError naming it where it cannot
    be decoded.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such image file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image file")
    encoded = np.fromfile(path, dtype=np.uint8)  # and not imread, which cannot open every name
    return decode_image(encoded, str(path))


def decode_image(encoded: np.ndarray, name: str = "image") -> np.ndarray:  # [H, W, 3] uint8 RGB
    """What `read_image` makes of a file with these bytes, [n] uint8.

    Raises ValueError, which calls it `name`.
    """
    if not encoded.size:
        raise ValueError(f"{name} is not a readable image: the file has zero bytes")
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ValueError(f"{name} is not a readable image: {error.err}") from None
    if image is None:
        raise ValueError(f"{name} is not a readable image: its content cannot be decoded")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


@dataclass(frozen=True)
class Frame:
    """One picture of a source."""

    name: str  # what to call it: the file's path, `clip.mp4#12`, `camera 0#3`, `image 2`
    image: np.ndarray  # [H, W, 3] uint8 RGB
    source: str  # what the user pointed at, or the file found through it
    index: int = 0  # its number within the source
    fps: float | None = None  # frames per second of a moving source, None for a still picture


class Frames:
    """Iterates over the frames of sources, in order. What cannot be read is logged, skipped and
    kept in `skipped`.

    sources: paths of images and videos, folders, globs, camera numbers, stream URLs, and whatever
    `to_image` takes. Creating it looks the files up: raises FileNotFoundError for a path or glob
    that matches nothing and ValueError for a folder without pictures.
    """

    def __init__(self, *sources: Any) -> None:
        self.skipped: list[str] = []  # one sentence each, naming the source
        self._sources: list[Any] = []
        for source in sources:
            self._sources.extend(_find(source) if isinstance(source, str | Path) else [source])

    def __len__(self) -> int:
        """Number of sources found; a video or camera, of any number of frames, counts once."""
        return len(self._sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """The pictures and videos among the sources that are files."""
        return tuple(source for source in self._sources if isinstance(source, Path))

    def __iter__(self) -> Iterator[Frame]:
        ahead = os.cpu_count() or 1
        reading: deque[Future[np.ndarray]] = deque()  # pictures that will be asked for, in order
        begun = 0  # sources that were looked at for pictures to read
        pool = ThreadPoolExecutor(ahead)  # which starts no thread before it has work
        try:
            for number, source in enumerate(self._sources):
                for later in self._sources[max(begun, number) : number + ahead]:
                    if _is_picture(later):
                        reading.append(pool.submit(read_image, later))
                begun = number + ahead
                try:
                    if _is_picture(source):
                        yield Frame(str(source), reading.popleft().result(), str(source))
                    else:
                        yield from self._read(number, source)
                except (ValueError, OSError) as error:
                    self.skipped.append(str(error))
                    logger.warning("skipped: %s", error)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, number: int, source: Any) -> Iterator[Frame]:
        if isinstance(source, Path):
            yield from _video(str(source), str(source))
        elif isinstance(source, str):
            yield from _video(source, source)
        elif isinstance(source, int):
            yield from _video(source, f"camera {source}")
        else:
            name = f"image {number}"
            yield Frame(name, to_pixels(to_image(source, name)), name)


def frames(*sources: Any) -> Frames:
    """Iterate over everything that the sources hold; see `Frames`."""
    return Frames(*sources)


def to_batch(batch: Any) -> Iterable[Any]:
    """The images of a batch as given to `Detector.detect`: one image, several, or an array of
    images.

    Nothing is read yet, and no generator asked. A tensor [B, 3, H, W] and an array [B, H, W, 3] are
    B images. Raises ValueError.
    """
    if isinstance(batch, Tensor | np.ndarray):
        return list(batch) if batch.ndim == 4 else [batch]
    if isinstance(batch, str | Path) or _is_pil(batch):
        return [batch]
    if isinstance(batch, Iterable) and not isinstance(batch, bytes | bytearray | dict):
        return batch
    raise ValueError(f"a batch cannot be a {type(batch).__name__}: {EXPECTED}, or a sequence")


def to_image(image: Any, name: str = "image") -> Tensor:  # [H, W, 3] uint8, or float32 in 0..1
    """One image of any accepted kind as a tensor, sharing its memory where that is possible.

    name: what to call it in errors. Raises FileNotFoundError, and ValueError saying what would be
    right.
    """
    if isinstance(image, str | Path):
        try:
            return torch.from_numpy(read_image(image))
        except (ValueError, OSError) as error:
            raise type(error)(f"{name}: {error}") from None
    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    if _is_pil(image):
        from PIL import ImageOps

        # Upright, as a file of the same picture would be read.
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    raise ValueError(f"{name} is a {type(image).__name__}: {EXPECTED}")


def to_pixels(image: Tensor) -> np.ndarray:  # [H, W, 3] uint8
    """An image tensor as `to_image` gives it, as uint8 in numpy; floating point is rounded."""
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.cpu().numpy())


def _from_array(image: np.ndarray, name: str) -> Tensor:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{name} is a numpy array {list(image.shape)} {image.dtype}: {EXPECTED}")
    if not image.flags.writeable or min(image.strides) < 0:
        image = image.copy()  # torch shares neither read-only nor reversed memory
    return torch.from_numpy(image)


def _from_tensor(image: Tensor, name: str) -> Tensor:
    known = image.dtype == torch.uint8 or image.is_floating_point()
    if not known or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"{name} is a tensor {list(image.shape)} {image.dtype}: {EXPECTED}")
    if image.is_floating_point():
        image = image.detach().float()
        low, high = (bound.item() for bound in torch.aminmax(image))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name} is a tensor with values in {low:g}..{high:g}: {EXPECTED}")
    return image.permute(1, 2, 0)


def _is_pil(image: Any) -> bool:
    pil = sys.modules.get("PIL.Image")  # an object of PIL can only come from an imported PIL
    return pil is not None and isinstance(image, pil.Image)


def _is_picture(source: Any) -> bool:
    return isinstance(source, Path) and source.suffix.lower() not in VIDEO_SUFFIXES


def _find(source: str | Path) -> list[Path | str | int]:
    """The files, streams and cameras behind one word of the user."""
    text = str(source)
    if "://" in text:
        return [text]
    path = Path(source)
    if path.is_dir():
        known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
        if not found:
            raise ValueError(f"no images or videos in the folder {path}")
        return list(found)
    if path.exists():
        return [path]
    if text.isdecimal():
        return [int(text)]
    matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
    files = [match for match in matches if match.is_file()]
    if not files:
        raise FileNotFoundError(f"no such file, folder, camera or stream: {text}")
    return list(files)


def _video(source: str | int, name: str) -> Iterator[Frame]:
    capture = cv2.VideoCapture(source)
    try:
        if not capture.isOpened():
            raise ValueError(f"{name} cannot be opened as a video")
        fps = capture.get(cv2.CAP_PROP_FPS)
        index = 0
        while True:
            read, image = capture.read()
            if not read:
                break
            rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            yield Frame(f"{name}#{index}", rgb, name, index, fps if fps > 0 else 30.0)
            index += 1
        if not index:
            raise ValueError(f"{name} holds no frame that can be decoded")
    finally:
        capture.release()
