"""Every detection that Darknet itself makes on three images, matched one to one by every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.darknet.names import read_names
from yolov4_fast.darknet.weights import read_weights
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops import decode, diou_nms, placement, resize
from yolov4_fast.sources import read_image

Run = Callable[[Tensor], tuple[Tensor, ...]]

CONFIDENCE, IOU = 0.25, 0.45
COUNTS = {"stretch": 103, "letterbox": 172}  # 275 detections in all


def module(network: Network, state: dict[str, Tensor], names: tuple[str, ...]) -> Run:
    plain = NetworkModule(network).eval()
    plain.load_state_dict(state)
    return plain


def folded_module(network: Network, state: dict[str, Tensor], names: tuple[str, ...]) -> Run:
    return module(*fold(network, state), names)


def engine(kind: str, precision: str) -> Callable[..., Run]:
    def make(network: Network, state: dict[str, Tensor], names: tuple[str, ...]) -> Run:
        from yolov4_fast.engines.build import build_engine

        if kind == "openvino":
            pytest.importorskip("openvino")
        return build_engine(network, state, names, engine=kind, precision=precision).run

    return make


ENGINES = {
    "module": (module, 1e-4),
    "folded module": (folded_module, 1e-4),
    "torch": (engine("torch", "f32"), 1e-4),
    "openvino": (engine("openvino", "f32"), 2e-3),
}


@pytest.fixture(scope="module")
def reference(darknet_reference: Path) -> tuple[Network, dict[str, Tensor], tuple[str, ...]]:
    network = read_cfg(darknet_reference / "mini.cfg")
    state = read_weights(darknet_reference / "mini.weights", network)
    return network, state, read_names(darknet_reference / "mini.names")


def detect(network: Network, run: Run, images: list[Tensor], mode: str) -> list[np.ndarray]:
    """Detections of each image: [N, 6] float64 (class, score, centre x, y, width, height)."""
    height, width = network.height, network.width
    placed = placement([tuple(image.shape[:2]) for image in images], height, width, mode)
    with torch.inference_mode():
        maps = run(resize(images, height, width, mode))
    candidates = decode(
        maps,
        [head.anchors for head in network.heads],
        [head.scale_x_y for head in network.heads],
        [head.new_coords for head in network.heads],
        height,
        width,
        CONFIDENCE,
        placed,
    )
    keep, kept = diou_nms(*candidates, IOU, network.nms_beta)
    found = []
    for index, count in enumerate(kept.tolist()):
        chosen = keep[index, :count]
        low, high = candidates.boxes[index, chosen].double().split(2, -1)
        class_ids = candidates.class_ids[index, chosen, None].double()
        scores = candidates.scores[index, chosen, None].double()
        found.append(torch.cat((class_ids, scores, (low + high) / 2, high - low), -1).numpy())
    return found


def expected_of(detections: list[dict[str, float]]) -> np.ndarray:
    keys = ("class_id", "confidence", "center_x", "center_y", "width", "height")
    return np.array([[detection[key] for key in keys] for detection in detections])


@pytest.mark.parametrize("mode", COUNTS)
@pytest.mark.parametrize("name", ENGINES)
def test_every_detection_of_darknet_is_matched(
    name: str,
    mode: str,
    reference: tuple[Network, dict[str, Tensor], tuple[str, ...]],
    darknet_reference: Path,
) -> None:
    make, tolerance = ENGINES[name]
    network = reference[0]
    truth = json.loads((darknet_reference / f"detections-{mode}.json").read_text())
    images = [torch.from_numpy(read_image(darknet_reference / one["image"])) for one in truth]
    assert sum(len(one["detections"]) for one in truth) == COUNTS[mode]

    found = detect(network, make(*reference), images, mode)
    for one, ours in zip(truth, found, strict=True):
        theirs = expected_of(one["detections"])
        assert len(ours) == len(theirs), one["image"]
        difference = np.abs(ours[:, None] - theirs[None]).max(-1)  # [ours, theirs]
        matches = difference.argmin(1)
        assert sorted(matches) == list(range(len(theirs))), one["image"]
        assert difference.min(1).max() < tolerance, one["image"]
