"""`yolov4-fast detect`: pictures, videos, cameras and streams -> detections as a table,
pictures, JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from yolov4_fast.commands.arguments import add_json, add_thresholds, write_json
from yolov4_fast.detections import Detections
from yolov4_fast.files import replacing
from yolov4_fast.sources import Frame, Frames, frames

VIDEO_CODEC = "mp4v"  # the one encoder that every OpenCV wheel brings for .mp4


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "detect",
        help="find objects in pictures, videos, cameras and streams",
        description="Find objects and print them; with --save also as pictures and videos.",
    )
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, see `yolov4-fast build`")
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="a picture, a video, a folder, a glob, a camera's number or the URL of a stream",
    )
    add_thresholds(parser, confidence=0.25, iou=0.45)
    parser.add_argument("--save", type=Path, metavar="DIR", help="save annotated pictures there")
    parser.add_argument("--device", help="where the engine runs, such as cpu")
    parser.add_argument("--quiet", action="store_true", help="no table, only the summary")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.detector import Detector
    from yolov4_fast.engines import load_engine

    source = frames(*arguments.sources)
    engine = load_engine(arguments.engine, device=arguments.device)
    detector = Detector(
        engine, confidence=arguments.confidence, iou=arguments.iou, resize=arguments.resize
    )
    output = Pictures(arguments.save) if arguments.save else None
    table = None if arguments.quiet else Table()
    records: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    seconds, images, interrupted = 0.0, 0, False
    try:
        for chunk in chunks(source, engine.max_batch):
            started = time.perf_counter()
            found = detector.detect([frame.image for frame in chunk])
            seconds += time.perf_counter() - started
            images += len(chunk)
            for frame, detections in zip(chunk, found, strict=True):
                counts.update(detection.class_name for detection in detections)
                records.append(record(frame, detections))
                if table:
                    table.rows(frame, detections)
                if output:
                    output.save(frame, detections)
    except KeyboardInterrupt:  # how one stops a camera: what was found so far is kept
        interrupted = True
    finally:
        if output:
            output.close()
    write_json(arguments.json, records)
    found_text = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
    print(
        f"{images} images, {sum(counts.values())} detections ({found_text})\n"
        f"{engine.kind} engine, {engine.precision} on {engine.device}, input "
        f"{engine.width}x{engine.height} ({detector.resize}): {seconds:.3f} s"
        + (f", {images / seconds:.1f} images/s" if images else "")
    )
    if output and output.written:
        print(f"saved {len(output.written)} annotated files in {arguments.save}")
    if source.skipped:
        print(
            f"{len(source.skipped)} could not be read and were skipped, see above", file=sys.stderr
        )
    return 130 if interrupted else 1 if source.skipped else 0


def chunks(source: Frames, size: int) -> Iterator[list[Frame]]:
    """Still pictures and video frames in groups of `size`; of a camera or stream each frame at
    once.
    """
    group: list[Frame] = []
    with tqdm(unit=" images", disable=not sys.stderr.isatty(), leave=False) as bar:
        for frame in source:
            group.append(frame)
            if len(group) == size or is_live(frame):
                yield group
                bar.update(len(group))
                group = []
    if group:
        yield group


def is_live(frame: Frame) -> bool:
    return frame.fps is not None and not Path(frame.source).is_file()


def record(frame: Frame, detections: Detections) -> dict[str, Any]:
    height, width = detections.image_size
    return {
        "image": frame.name,
        "width": width,
        "height": height,
        "detections": detections.to_json(),
    }


class Table:
    """Prints one row per detection under a heading."""

    def __init__(self) -> None:
        print(f"{'image':32} {'class':16} {'score':>6}  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}")

    def rows(self, frame: Frame, detections: Detections) -> None:
        name = frame.name if len(frame.name) <= 32 else "…" + frame.name[-31:]
        for found in detections:
            box = " ".join(f"{value:7.1f}" for value in found.box.tolist())
            tqdm.write(f"{name:32} {found.class_name:16} {found.score:6.3f}  {box}")
        if not len(detections):
            tqdm.write(f"{name:32} -")


class Pictures:
    """Saves annotated pictures, and the frames of each moving source as one .mp4."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.written: list[Path] = []
        self._video: cv2.VideoWriter | None = None
        self._source: str | None = None
        self._partial = folder / ".video.partial.mp4"

    def save(self, frame: Frame, detections: Detections) -> None:
        drawn = detections.draw(frame.image)
        if frame.source != self._source:
            self._finish_video()
            self._source = frame.source
        if frame.fps is None:
            self._picture(self._free_name(frame.source, (".jpg", ".png")), drawn)
        else:
            self._video_frame(frame, drawn)

    def _picture(self, path: Path, image: np.ndarray) -> None:
        encoded, content = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if not encoded:
            raise OSError(f"{path}: OpenCV could not encode the picture")
        with replacing(path) as temporary:
            temporary.write_bytes(content.tobytes())
        self.written.append(path)

    def _video_frame(self, frame: Frame, image: np.ndarray) -> None:
        if self._video is None:
            height, width = image.shape[:2]
            fourcc = cv2.VideoWriter.fourcc(*VIDEO_CODEC)
            self._video = cv2.VideoWriter(
                str(self._partial), fourcc, frame.fps or 30.0, (width, height)
            )
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

    def close(self) -> None:
        self._finish_video()
