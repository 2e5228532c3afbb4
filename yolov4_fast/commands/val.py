"""`yolov4-fast val`: AP of an engine file on annotated images."""

from __future__ import annotations

import argparse
from typing import Any

from yolov4_fast.average_precision import Points
from yolov4_fast.commands.arguments import add_json, add_thresholds, share, write_json

POINTS: dict[str, Points] = {"area": "area", "11": 11, "101": 101}


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "val",
        help="measure an engine's AP on annotated images",
        description="Average precision per class and mean, by VOC or COCO rules.",
    )
    parser.add_argument("engine", metavar="ENGINE", help="an engine file")
    parser.add_argument(
        "--data", required=True, help="a VOC folder, a COCO JSON or a Darknet .data file"
    )
    parser.add_argument("--split", help="which part of the data, such as val or test")
    parser.add_argument("--metric", choices=("voc", "coco"), default="voc")
    parser.add_argument(
        "--points", choices=tuple(POINTS), default="area",
        help="how VOC AP sums the curve: its area, or 11 or 101 points (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--match-iou", type=share, default=0.5, help="IoU of a hit for voc (%(default)s)"
    )
    add_thresholds(parser, confidence=0.001, iou=0.45)
    parser.add_argument("--device", help="where the engine runs, such as cpu")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.datasets import open_dataset
    from yolov4_fast.detector import Detector
    from yolov4_fast.engines import load_engine
    from yolov4_fast.evaluation import evaluate

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
    )
    print(evaluation)
    write_json(arguments.json, evaluation.to_json())
    return 0
