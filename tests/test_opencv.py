"""OpenCV's DNN module as a second opinion: it reads what we export, and the raw maps agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from yolov4_fast.darknet.cfg import write_cfg
from yolov4_fast.darknet.weights import write_weights
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule

HEIGHT, WIDTH = 128, 160


def conditioned(network: Network) -> NetworkModule:
    """Random weights, and statistics of a batch so that activations stay near 1.

    OpenCV adds 1e-6 to a variance where Darknet adds 1e-5: weights are large so that it is all one.
    """
    torch.manual_seed(0)
    module = NetworkModule(network, bn_momentum=1.0)
    for index, conv in network.convolutions():
        block = module.layers[str(index)]
        if conv.batch_normalize:
            block.conv.weight.data *= 30
            torch.nn.init.uniform_(block.bn.weight, 0.5, 1.5)
            torch.nn.init.normal_(block.bn.bias, std=0.3)
        else:
            torch.nn.init.normal_(block.conv.weight, std=0.05)
            torch.nn.init.normal_(block.conv.bias)
    module.train()
    with torch.no_grad():
        module(torch.rand(2, 3, HEIGHT, WIDTH))
    return module.eval()


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("yolov4", {}),
        ("yolov4-tiny", {}),
        ("yolov3-tiny", {}),
        ("yolov4-csp", {}),
        ("yolov4", {"sam": True}),
        ("yolov4", {"csp": False, "spp": False, "pan": False}),
    ],
)
def test_raw_maps_agree_with_opencv(name: str, switches: dict[str, Any], tmp_path: Path) -> None:
    width_multiple = 1.0 if name in ("yolov4", "yolov4-tiny") and not switches else 0.25
    network = by_name(name, width=WIDTH, height=HEIGHT, width_multiple=width_multiple, **switches)
    module = conditioned(network)
    (tmp_path / "x.cfg").write_text(write_cfg(network))
    write_weights(tmp_path / "x.weights", network, module.state_dict())
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))

    opencv = cv2.dnn.readNetFromDarknet(str(tmp_path / "x.cfg"), str(tmp_path / "x.weights"))
    opencv.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    opencv.enableFusion(False)  # which would hide layers that are asked for by name
    opencv.enableWinograd(False)  # its rounding is ten times that of plain sums
    opencv.setInput(image.numpy())
    # An activation is a layer of its own there, counted from one more than its convolution.
    theirs = opencv.forward(
        [
            f"logistic_{head.inputs[0] + 1}" if head.new_coords else f"conv_{head.inputs[0]}"
            for head in network.heads
        ]
    )

    with torch.inference_mode():
        ours = [raw.numpy() for raw in module(image)]
    assert len(ours) == len(theirs) == len(network.heads)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert 0.1 < np.abs(our).max() < 1000
        assert np.abs(our - their).max() <= 1e-3 * np.abs(our).max()
