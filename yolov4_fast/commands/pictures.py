"""Saving annotated pictures and videos."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np

from yolov4_fast.detections import Detections
from yolov4_fast.files import replacing
from yolov4_fast.sources import Frame

VIDEO_CODEC = "mp4v"  # the one encoder that every OpenCV wheel brings for .mp4


class Pictures:
    """Saves annotated pictures, and the frames of each moving source as one .mp4.

    To be left as a context: a video that an error broke off is then removed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.written: list[Path] = []
        self._video: cv2.VideoWriter | None = None
        self._source: str | None = None
        self._partial = folder / f".video.{os.getpid()}.mp4"

    def save(self, frame: Frame, detections: Detections) -> None:
        drawn = detections.draw(frame.image)
        if frame.source != self._source:
            self._finish_video()
            self._source = frame.source
        if frame.fps is None:
            self._picture(self._free_name(frame.source, (".jpg", ".jpeg", ".png")), drawn)
        else:
            self._video_frame(frame.fps, drawn)

    def _picture(self, path: Path, image: np.ndarray) -> None:
        encoded, content = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if not encoded:
            raise OSError(f"{path}: OpenCV could not encode the picture")
        with replacing(path) as temporary:
            temporary.write_bytes(content.tobytes())
        self.written.append(path)

    def _video_frame(self, fps: float, image: np.ndarray) -> None:
        if self._video is None:
            height, width = image.shape[:2]
            fourcc = cv2.VideoWriter.fourcc(*VIDEO_CODEC)
            self._video = cv2.VideoWriter(str(self._partial), fourcc, fps, (width, height))
            if not self._video.isOpened():
                raise OSError(f"{self.folder}: OpenCV cannot write a {VIDEO_CODEC} video there")
        self._video.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def _finish_video(self) -> None:
        if self._video is None or self._source is None:
            return
        self._video.release()
        self._video = None
        path = self._free_name(self._source, (".mp4",))
        self._partial.replace(path)
        self.written.append(path)

    def _free_name(self, source: str, suffixes: tuple[str, ...]) -> Path:
        """A name in the folder that this run has not used: two folders may hold the same name."""
        path = Path(source)
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in path.stem) or "image"
        suffix = path.suffix.lower() if path.suffix.lower() in suffixes else suffixes[0]
        number, name = 1, self.folder / f"{stem}{suffix}"
        while name in self.written:
            number += 1
            name = self.folder / f"{stem}-{number}{suffix}"
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_video()
        elif self._video is not None:
            self._video.release()
        self._partial.unlink(missing_ok=True)
