"""`yolov4-fast benchmark`: latency and FPS of an engine file, stage by stage and end to end.

The stages are the detector's own methods, one after the other. `detect` calls them too, unless the
engine has a pipeline of its own: then end to end is that, and streamed is what it makes of many
chunks, several under way at once. The picture is made up (a drawing with noise), so what decoding
and NMS cost depends on what the network sees in it; --image takes a real one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from yolov4_fast.commands.arguments import (
    add_device,
    add_engine,
    add_json,
    add_thresholds,
    check_output,
    positive,
    size,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np

    from yolov4_fast.detector import Detector

STAGES = ("resize", "network", "decode", "NMS", "collect", "end to end", "streamed")
CHUNKS = 16  # of a stream


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "benchmark",
        help="measure an engine's latency and FPS by stage",
        description="Median, p20 and p80 of the latency, and FPS, of each stage and end to end. "
        "End to end is measured on its own: from pictures in memory to detections. Streamed, on "
        "engines where chunks overlap, is the share of one chunk in the time of many.",
    )
    add_engine(parser)
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N",
        help="images per run, at most what the engine was built for (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=size, metavar="N|WxH",
        help="input size in pixels (default: as the engine was built)",
    )  # fmt: skip
    parser.add_argument(
        "--image", metavar="FILE", help="a picture to detect on (default: one drawn, 1280x720)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=5, metavar="N",
        help="how long to measure (default: %(default)s)",
    )  # fmt: skip
    add_thresholds(parser)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.detector import Detector
    from yolov4_fast.engines import load_engine
    from yolov4_fast.sources import read_image

    check_output(arguments.json, arguments.engine)
    engine = load_engine(arguments.engine, device=arguments.device, size=arguments.size)
    detector = Detector(
        engine, confidence=arguments.confidence, iou=arguments.iou, resize=arguments.resize
    )
    image = read_image(arguments.image) if arguments.image else drawn_image(720, 1280)
    batch = [image] * arguments.batch
    if arguments.batch > engine.max_batch:
        raise ValueError(
            f"--batch {arguments.batch}: {arguments.engine} was built for at most "
            f"{engine.max_batch} images a run; build it with --max-batch {arguments.batch}"
        )
    times = measure(detector, batch, arguments.seconds)
    rows = {stage: summary(values, arguments.batch) for stage, values in times.items() if values}
    print(
        f"{arguments.engine}: {engine.kind} engine, {engine.precision} on {engine.device}, input "
        f"{engine.width}x{engine.height} ({detector.resize}), batch {arguments.batch}, picture "
        f"{image.shape[1]}x{image.shape[0]}, {len(times['end to end'])} runs"
    )
    print(f"{'stage':12}{'median ms':>11}{'p20':>9}{'p80':>9}{'share':>8}{'FPS':>10}")
    total = rows["end to end"]["median_ms"]
    for stage, row in rows.items():
        print(
            f"{stage:12}{row['median_ms']:11.3f}{row['p20_ms']:9.3f}{row['p80_ms']:9.3f}"
            f"{row['median_ms'] / total:8.1%}{row['fps']:10.1f}"
        )
    write_json(
        arguments.json,
        {
            "engine": arguments.engine,
            "kind": engine.kind,
            "precision": engine.precision,
            "device": str(engine.device),
            "width": engine.width,
            "height": engine.height,
            "batch": arguments.batch,
            "runs": len(times["end to end"]),
            "stages": rows,
        },
    )
    return 0


def measure(detector: Detector, batch: list[np.ndarray], seconds: float) -> dict[str, list[float]]:
    """Seconds of each stage and of `detect` itself, in turn, after a warm-up; of a chunk within a
    stream where the engine has a pipeline.
    """
    import torch

    from yolov4_fast.sources import to_image

    def wait() -> None:
        if detector.engine.device.type == "cuda":
            torch.cuda.synchronize(detector.engine.device)

    times: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = function()
        wait()
        times[stage].append(time.perf_counter() - started)
        return result

    def once() -> None:
        with torch.inference_mode():
            images = [to_image(image) for image in batch]
            ready = timed("resize", lambda: detector.preprocess(images))
            maps = timed("network", lambda: detector.engine.run(ready.images))
            candidates = timed("decode", lambda: detector.decode(maps, ready.placement))
            keep, kept = timed("NMS", lambda: detector.suppress(candidates))
            timed("collect", lambda: detector.collect(candidates, keep, kept, ready.sizes))
        timed("end to end", lambda: detector.detect(batch))
        if detector.pipeline is not None:
            timed("streamed", lambda: list(detector.stream(batch * CHUNKS, len(batch))))
            times["streamed"][-1] /= CHUNKS

    warm = time.perf_counter()
    while not times["resize"] or time.perf_counter() - warm < seconds / 5:
        once()
    for values in times.values():
        values.clear()
    started = time.perf_counter()
    while len(times["resize"]) < 5 or time.perf_counter() - started < seconds:
        once()
    return times


def summary(seconds: list[float], batch: int) -> dict[str, float]:
    tenths = quantiles(seconds, n=10, method="inclusive")
    return {
        "median_ms": tenths[4] * 1e3,
        "p20_ms": tenths[1] * 1e3,
        "p80_ms": tenths[7] * 1e3,
        "fps": batch / tenths[4],
    }


def drawn_image(height: int, width: int) -> np.ndarray:
    """A picture [height, width, 3] uint8 of rectangles and noise, always the same."""
    import numpy as np

    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), 110, np.uint8)
    for _ in range(40):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        w, h = (int(value) for value in rng.integers(20, 300, 2))
        image[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    noise = rng.integers(-12, 13, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)
