"""What Triton Inference Server runs around a network: pictures in, boxes out (its Python backend).

`yolov4-fast export --triton-repository` copies this file into the repository as `1/model.py`, where
the server loads it; nothing else imports it. The server's Python needs yolov4_fast.

In, one of two, N pictures a request:
    image_bytes  [N, 1]        encoded pictures (JPEG, PNG, ...), of any sizes
    image        [N, H, W, 3]  uint8 RGB
Out, K the most found in a picture of the request, at least 1:
    num_detections     [N, 1] int32
    detection_boxes    [N, K, 4] float32 xyxy in pixels of the picture, clipped to it
    detection_scores   [N, K] float32, descending
    detection_classes  [N, K] int32
What is over num_detections is 0, and -1 in detection_classes.

The server's dynamic batcher hands over several requests at once. Their pictures go through the
network, a model of the server's own, as one batch. A request that cannot be read fails alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # the server's own
from torch import Tensor

from yolov4_fast import ops
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.sources import decode_image, to_image

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a picture: boxes, scores, classes


class TritonPythonModel:
    """One instance of the model; the server makes several, each in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """args: the server's, the model's configuration as JSON among them."""
        parameters = json.loads(args["model_config"])["parameters"]
        values = {key: value["string_value"] for key, value in parameters.items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self.network = read_cfg(folder / "network.cfg")
        self.model_name = values["network_model"]
        self.outputs = values["network_outputs"].split()
        self.has_nms = values["network_has_nms"] == "yes"
        self.resize: Any = values["resize"]
        if not self.has_nms:
            self.confidence = float(values["confidence"])
            self.iou = float(values["iou"])
            self.max_detections = int(values["max_detections"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request, in order."""
        groups: list[list[Tensor] | str] = []
        for request in requests:
            try:
                groups.append(_pictures(request))
            except ValueError as error:
                groups.append(str(error))
        readable = [group for group in groups if not isinstance(group, str)]
        try:
            found = iter(self.detect([picture for group in readable for picture in group]))
        except pb_utils.TritonModelException as error:
            return [_failure(group if isinstance(group, str) else str(error)) for group in groups]
        return [
            _failure(group) if isinstance(group, str) else _response([next(found) for _ in group])
            for group in groups
        ]

    @torch.inference_mode()
    def detect(self, pictures: list[Tensor]) -> list[Found]:
        """pictures: each [H, W, 3] uint8. Raises TritonModelException of the network's model."""
        if not pictures:
            return []
        height, width = self.network.height, self.network.width
        sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
        placement = ops.placement(sizes, height, width, self.resize)
        outputs = self.run(ops.resize(pictures, height, width, self.resize))
        if self.has_nms:
            kept, boxes, scores, classes = outputs
            scale, offset = placement[:, None].split(2, -1)  # [B, 1, 2] each
            boxes = boxes * scale.repeat(1, 1, 2) + offset.repeat(1, 1, 2)
        else:
            kept, boxes, scores, classes = self.decode(outputs, placement)
        return [
            _found(boxes[index, :count], scores[index, :count], classes[index, :count], size)
            for index, (count, size) in enumerate(zip(kept.flatten().tolist(), sizes, strict=True))
        ]

    def decode(self, maps: list[Tensor], placement: Tensor) -> tuple[Tensor, ...]:
        """Count, boxes relative to the pictures, scores and classes of raw maps."""
        heads = self.network.heads
        candidates = ops.decode(
            maps,
            [head.anchors for head in heads],
            [head.scale_x_y for head in heads],
            [head.new_coords for head in heads],
            self.network.height,
            self.network.width,
            self.confidence,
            placement,
        )
        keep, kept = ops.diou_nms(*candidates, self.iou, self.network.nms_beta, self.max_detections)
        chosen = keep.clamp(min=0)  # -1 where there are no more
        if not candidates.scores.shape[1]:  # nothing to choose from
            chosen = chosen[:, :0]
        return (
            kept,
            candidates.boxes.gather(1, chosen[:, :, None].expand(-1, -1, 4)),
            candidates.scores.gather(1, chosen),
            candidates.class_ids.gather(1, chosen),
        )

    def run(self, images: Tensor) -> list[Tensor]:
        """The network's outputs for images [B, 3, height, width] float32, in host memory."""
        response = pb_utils.InferenceRequest(
            model_name=self.model_name,
            requested_output_names=self.outputs,
            inputs=[pb_utils.Tensor("images", images.numpy())],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{self.model_name}: {response.error().message()}")
        arrays = [
            pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in self.outputs
        ]
        return [torch.from_numpy(np.array(array)) for array in arrays]


def _pictures(request: Any) -> list[Tensor]:
    """The pictures of a request, each [H, W, 3] uint8. Raises ValueError for what is none."""
    encoded = pb_utils.get_input_tensor_by_name(request, "image_bytes")
    arrays = pb_utils.get_input_tensor_by_name(request, "image")
    if (encoded is None) == (arrays is None):
        raise ValueError("a request brings either image_bytes or image, and not both")
    if encoded is not None:
        pictures = [
            decode_image(np.frombuffer(content, np.uint8), f"picture {number}")
            for number, content in enumerate(encoded.as_numpy().flatten())
        ]
    else:
        pictures = list(arrays.as_numpy())
    return [to_image(picture, f"picture {number}") for number, picture in enumerate(pictures)]


def _found(boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int]) -> Found:
    """boxes: relative to a picture of this size (height, width)."""
    height, width = size
    pixels = boxes.numpy().clip(0, 1) * (width, height, width, height)
    return pixels.astype(np.float32), scores.numpy(), classes.numpy()


def _response(found: list[Found]) -> Any:
    """Of one request: what was found in its pictures, padded to the same number."""
    counts = [len(scores) for _, scores, _ in found]
    most = max(1, *counts)
    boxes = np.zeros((len(found), most, 4), np.float32)
    scores = np.zeros((len(found), most), np.float32)
    classes = np.full((len(found), most), -1, np.int32)
    for row, (count, of_picture) in enumerate(zip(counts, found, strict=True)):
        for padded, values in zip((boxes, scores, classes), of_picture, strict=True):
            padded[row, :count] = values
    arrays = {
        "num_detections": np.array(counts, np.int32)[:, None],
        "detection_boxes": boxes,
        "detection_scores": scores,
        "detection_classes": classes,
    }
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(name, array) for name, array in arrays.items()]
    )


def _failure(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
