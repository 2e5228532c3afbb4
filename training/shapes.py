"""A generated data set: scenes of drawn objects of eight classes, in VOC format.

    python -m training.shapes --output DIR --train 400 --val 100 --size 416x416 --seed 0

Objects vary in size, proportions, rotation, colour and texture, and overlap each other and the
border; scenes vary in background, clutter, light, blur and noise. Boxes are tight around what is
visible of an object, and an object of which less than 30 % is visible is not annotated. Every scene
is a function of (seed, split, number) alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from training.scene import CLASS_NAMES, Scene, scene

JPEG_QUALITY = 92


def write_dataset(output: Path, counts: dict[str, int], height: int, width: int, seed: int) -> None:
    """Writes `counts[split]` scenes per split as a VOC folder; one that is already there raises
    ValueError.

    The lists in ImageSets/Main come last, so that a folder left unfinished is not taken for a data
    set.
    """
    if min(height, width) < 64:
        raise ValueError(f"the size must be at least 64x64, not {width}x{height}")
    if (output / "Annotations").exists():
        raise ValueError(f"{output} already holds a data set; give another folder")
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    (output / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    lists: dict[str, list[str]] = {}
    for number, (split, count) in enumerate(counts.items()):
        lists[split] = [f"{split}_{i:05d}" for i in range(count)]
        for i, name in enumerate(tqdm(lists[split], desc=split, disable=None)):
            drawn = scene(height, width, np.random.default_rng((seed, number, i)))
            image_file = output / "JPEGImages" / f"{name}.jpg"
            bgr = cv2.cvtColor(drawn.image, cv2.COLOR_RGB2BGR)
            encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
            image_file.write_bytes(encoded.tobytes())
            annotation = voc_xml(f"{name}.jpg", drawn)
            (output / "Annotations" / f"{name}.xml").write_text(annotation, encoding="utf-8")
    for split, names in lists.items():
        list_file = output / "ImageSets" / "Main" / f"{split}.txt"
        list_file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def voc_xml(filename: str, drawn: Scene) -> str:
    """The VOC annotation of a scene: 1-based pixels, right and bottom inclusive."""
    height, width = drawn.image.shape[:2]
    objects = "".join(
        f"  <object>\n    <name>{CLASS_NAMES[class_id]}</name>\n    <difficult>0</difficult>\n"
        f"    <bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n  </object>\n"
        for (x1, y1, x2, y2), class_id in zip(drawn.boxes, drawn.class_ids, strict=True)
    )
    return (
        f"<annotation>\n  <folder>JPEGImages</folder>\n  <filename>{filename}</filename>\n"
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
        f"{objects}</annotation>\n"
    )


def _size(text: str) -> tuple[int, int]:
    """Width and height from "416" or "416x320"."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 416 or 416x320")
    return int(parts[0]), int(parts[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=400, help="training scenes (default 400)")
    parser.add_argument("--val", type=int, default=100, help="validation scenes (default 100)")
    parser.add_argument("--size", type=_size, default=(416, 416), help="N or WIDTHxHEIGHT")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    width, height = options.size
    try:
        counts = {"train": options.train, "val": options.val}
        write_dataset(options.output, counts, height, width, options.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {options.train} train and {options.val} val scenes of "
          f"{width}x{height}, classes {', '.join(CLASS_NAMES)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
