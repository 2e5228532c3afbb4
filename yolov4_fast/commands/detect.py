"""`yolov4-fast detect`: pictures, videos, cameras and streams -> detections as a table, pictures,
JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from yolov4_fast.commands.arguments import (
    add_device,
    add_engine,
    add_thresholds,
    check_folder,
    check_output,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np

    from yolov4_fast.commands.pictures import Pictures
    from yolov4_fast.detections import Detections
    from yolov4_fast.detector import Detector
    from yolov4_fast.sources import Frame, Frames

Item = TypeVar("Item")


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "detect",
        help="find objects in pictures, videos, cameras and streams",
        description="Find objects and print a table of them; with --save also as annotated "
        "pictures and videos, with --json for programs. What cannot be read is named and skipped, "
        "and the exit status is then 1. Ctrl-C ends a camera or stream and keeps what was found.",
    )
    add_engine(parser)
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="a picture, a video, a folder of them, a glob in quotes, a camera's number (0) or "
        "the URL of a stream",
    )
    add_thresholds(parser)
    parser.add_argument(
        "--save", type=Path, metavar="DIR",
        help="save annotated pictures and videos in this folder, made if need be",
    )  # fmt: skip
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="no table, only the summary")
    parser.add_argument(
        "--json", type=Path, metavar="FILE",
        help='write a list of {"image", "width", "height", "detections": [{"class_id", '
        '"class_name", "score", "box": [x1, y1, x2, y2] in pixels}]}',
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.commands.pictures import Pictures
    from yolov4_fast.detector import Detector
    from yolov4_fast.engines import load_engine
    from yolov4_fast.sources import frames

    source = frames(*arguments.sources)
    check_output(arguments.json, arguments.engine, *source.files)
    if arguments.save:
        _check_save(arguments.save, source)
    engine = load_engine(arguments.engine, device=arguments.device)
    detector = Detector(
        engine, confidence=arguments.confidence, iou=arguments.iou, resize=arguments.resize
    )
    session = Session(detector, None if arguments.quiet else Table())
    with Pictures(arguments.save) if arguments.save else nullcontext() as output:
        session.run(source, output)
    write_json(arguments.json, session.records)
    found = ", ".join(f"{count} {name}" for name, count in session.counts.most_common())
    images = len(session.records)
    print(
        f"{images} {'image' if images == 1 else 'images'}, {session.counts.total()} detections"
        + (f" ({found})" if found else "")
        + f"\n{engine.kind} engine, {engine.precision} on {engine.device}, input "
        f"{engine.width}x{engine.height} ({detector.resize}): {session.seconds:.3f} s"
        + (f", {images / session.seconds:.1f} images/s" if images else "")
    )
    if output and output.written:
        count = len(output.written)
        print(f"saved {count} annotated file{'s' if count > 1 else ''} in {arguments.save}")
    if source.skipped:
        count = len(source.skipped)
        print(f"{count} skipped, as the warning{'s' if count > 1 else ''} above said")
    if session.interrupted:
        print("interrupted: this is what was found until then")
    return 130 if session.interrupted else 1 if source.skipped else 0


def _check_save(folder: Path, source: Frames) -> None:
    check_folder(folder)
    for file in source.files:
        if folder.exists() and folder.samefile(file.parent):
            raise ValueError(
                f"--save {folder}: {file} lies there and would be written over; choose another "
                "folder"
            )


class Session:
    """Detects in all that a source holds, and gathers what was found."""

    def __init__(self, detector: Detector, table: Table | None) -> None:
        self.detector = detector
        self.table = table
        self.records: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.interrupted = False
        self._waiting = Stopwatch()  # for the detector
        self._reading = Stopwatch()  # for the source, which is part of the former

    @property
    def seconds(self) -> float:
        """That the detector took, beyond reading the source. Where it works while the source is
        read, reading counts: the two cannot be told apart.
        """
        overlapped = self.detector.pipeline is not None
        return self._waiting.seconds - (0 if overlapped else self._reading.seconds)

    def run(self, source: Frames, output: Pictures | None) -> None:
        """Until the source ends, or the user stops it: a camera ends in no other way."""
        groups = chunks(source, self.detector.engine.max_batch)
        try:
            for live, some in groupby(groups, key=lambda group: is_live(group[-1])):
                all_frames = chain.from_iterable(some)
                found = map(self._at_once, all_frames) if live else self._stream(all_frames)
                for frame, detections in found:
                    self._take(frame, detections, output)
        except KeyboardInterrupt:
            self.interrupted = True

    def _at_once(self, frame: Frame) -> tuple[Frame, Detections]:
        with self._waiting:
            return frame, self.detector.detect(frame.image)[0]

    def _stream(self, all_frames: Iterable[Frame]) -> Iterator[tuple[Frame, Detections]]:
        """Frames with what was found; the next ones are read meanwhile."""
        waiting: deque[Frame] = deque()

        def images() -> Iterator[np.ndarray]:
            for frame in timed(all_frames, self._reading):
                waiting.append(frame)
                yield frame.image

        for detections in timed(self.detector.stream(images()), self._waiting):
            yield waiting.popleft(), detections

    def _take(self, frame: Frame, detections: Detections, output: Pictures | None) -> None:
        self.counts.update(detection.class_name for detection in detections)
        self.records.append(record(frame, detections))
        if self.table:
            self.table.rows(frame, detections)
        if output:
            output.save(frame, detections)


class Stopwatch:
    """Adds up the time within `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()


def timed(items: Iterable[Item], watch: Stopwatch) -> Iterator[Item]:
    """The same items; the watch runs while the next one is waited for."""
    iterator = iter(items)
    while True:
        with watch:
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


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
