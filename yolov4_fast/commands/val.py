"""`yolov4-fast val`: AP of an engine file on annotated images."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from yolov4_fast.commands.arguments import (
    add_device,
    add_engine,
    add_json,
    add_thresholds,
    check_output,
    share,
    write_json,
)

if TYPE_CHECKING:
    from yolov4_fast.average_precision import Points

POINTS: dict[str, Points] = {"area": "area", "11": 11, "101": 101}


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "val",
        help="measure an engine's AP on annotated images",
        description="Average precision per class and mean, by VOC or COCO rules. The engine and "
        "the data must have the same classes, in any order. Annotations that cannot be used are "
        "counted in a warning.",
    )
    add_engine(parser)
    parser.add_argument(
        "--data", required=True, metavar="DIR",
        help="a VOC folder (Annotations, JPEGImages, ImageSets/Main), a COCO .json or its folder, "
        "or a Darknet .data file",
    )  # fmt: skip
    parser.add_argument(
        "--split",
        help="which part of the data, such as val or test (default: val, valid, validation or "
        "test, whichever is there first)",
    )
    parser.add_argument(
        "--metric", choices=("voc", "coco"), default="voc",
        help="voc: AP at one IoU, difficult objects ignored; coco: COCO's twelve numbers, AP over "
        "IoU 0.50 to 0.95 first (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--points", choices=tuple(POINTS), default="area",
        help="how VOC AP sums the curve: its area, or 11 or 101 points (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--match-iou", type=share, default=0.5, metavar="F",
        help="IoU from which a detection is a hit, for voc (default: %(default)s)",
    )  # fmt: skip
    add_thresholds(parser, confidence=0.001)
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.datasets import open_dataset
    from yolov4_fast.detector import Detector
    from yolov4_fast.engines import load_engine
    from yolov4_fast.evaluation import evaluate

    check_output(arguments.json, arguments.engine, arguments.data)
    engine = load_engine(arguments.engine, device=arguments.device)
    dataset = open_dataset(arguments.data, arguments.split)
    detector = Detector(
        engine, confidence=arguments.confidence, iou=arguments.iou, resize=arguments.resize
    )
    evaluation = evaluate(
        detector,
        dataset,
        metric=arguments.metric,
        iou_threshold=arguments.match_iou,
        points=POINTS[arguments.points],
        confidence=None,
        progress=sys.stderr.isatty(),
    )
    print(evaluation)
    write_json(arguments.json, evaluation.to_json())
    return 0
