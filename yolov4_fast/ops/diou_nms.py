"""diou_nms: greedy non-maximum suppression, per class, by IoU or by distance-IoU.

In order of score, a box is dropped when a kept box of its class has

    IoU - (d^2 / c^2) ** beta > threshold        (beta None: IoU > threshold)

with d the distance of the two centres and c the diagonal of the smallest box that encloses both
(Zheng et al. 2020, "Distance-IoU Loss", section 3.3, where beta = 1; Darknet's nms_kind=greedynms
has 0.6 built in, diounms its beta_nms). The penalty is never negative, so it is computed only for
pairs whose IoU is over the threshold.

d and c are measured in the boxes' own units. Darknet measures relative to the image, where x and y
have different scales, and with boxes in pixels the results differ: pass boxes relative to the
image, as `decode` returns them.

Classes are compared by id: shifting boxes apart by class, as is often done, would falsify c. Every
pair that is close is decided in float64. Boxes without area suppress nothing and are not
suppressed; one with a NaN score is never kept.

On a GPU only the best MAX_CANDIDATES of an image take part; the lower scored are not kept (how many
follows from `counts`). Up to there every implementation keeps the same boxes.
"""

import math

import torch
from torch import Tensor

from yolov4_fast.ops.library import Implementation, check_device, check_implementation

MAX_CANDIDATES = 4096  # of an image, on a GPU; csrc/cuda/diou_nms.h has the same number
TILE = 64  # candidates, on a GPU; as in csrc/cuda/diou_nms.h


def diou_nms(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    counts: Tensor,
    iou_threshold: float,
    beta: float | None,
    max_detections: int = 0,
    numbers: Tensor | None = None,
    *,
    implementation: Implementation = "extension",
) -> tuple[Tensor, Tensor]:
    """Suppress duplicates in each image of a batch.

    boxes: [B, K, 4] float32 xyxy relative to the image. scores: [B, K] float32.
    class_ids: [B, K] int32. counts: [B] int32; of image b only the first counts[b] candidates are
    looked at (all K where it is larger).
    iou_threshold: in 0..1. beta: exponent of the penalty, at least 0, or None for plain IoU.
    max_detections: D, the most that an image keeps; 0 for K.
    numbers: [B, K] int32, different ones within an image, or None for the position, 0..K-1; of
    candidates with equal scores the one with the lower number comes first, wherever it lies.
    Returns keep [B, D] int64, positions of the kept candidates by descending score and then -1, and
    kept [B] int32, how many. On CUDA tensors nothing waits for the GPU. Raises ValueError, and
    RuntimeError for CUDA tensors where the operators were built without CUDA.
    """
    check_implementation(implementation)
    _check(boxes, scores, class_ids, counts, iou_threshold, beta, max_detections, numbers)
    if implementation == "reference":
        return diou_nms_reference(
            boxes, scores, class_ids, counts, iou_threshold, beta, max_detections, numbers
        )
    check_device(boxes, "diou_nms")
    return torch.ops.yolov4_fast.diou_nms(
        boxes, scores, class_ids, counts, iou_threshold, beta, max_detections, numbers
    )


def workspace_bytes(candidates: int) -> int:
    """Of the workspace that `diou_nms` takes on a GPU for each image of so many candidates, K;
    csrc/cuda/diou_nms.h lays it out.
    """
    tiles = -(-min(candidates, MAX_CANDIDATES) // TILE)
    words = tiles * (tiles + 1) // 2 * TILE  # of 8 bytes: each candidate about earlier tiles
    return 8 * words + tiles * TILE * (4 * 4 + 4 * 4) + 4  # boxes; four numbers; a count


def diou_nms_reference(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    counts: Tensor,
    iou_threshold: float,
    beta: float | None,
    max_detections: int = 0,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in torch, O(K^2) memory; arguments and result as in `diou_nms`."""
    batch, candidates = scores.shape
    keep = counts.new_full((batch, max_detections or candidates), -1, dtype=torch.int64)
    kept = torch.zeros_like(counts)
    for image in range(batch):
        known = scores[image, : max(0, int(counts[image]))]
        order = torch.arange(len(known), device=known.device)
        if numbers is not None:
            order = torch.sort(numbers[image, : len(known)], stable=True).indices
        order = order[~known[order].isnan()]
        order = order[torch.sort(known[order], descending=True, stable=True).indices]
        overlap = _overlap(boxes[image, order].double(), beta)  # [n, n]
        same_class = class_ids[image, order][:, None] == class_ids[image, order]
        suppresses = (overlap > iou_threshold) & same_class
        alive = torch.ones_like(order, dtype=torch.bool)
        for rank in range(len(order)):
            if alive[rank]:
                alive[rank + 1 :] &= ~suppresses[rank, rank + 1 :]
        survivors = order[alive][: keep.shape[1]]
        keep[image, : len(survivors)] = survivors
        kept[image] = len(survivors)
    return keep, kept


def _overlap(boxes: Tensor, beta: float | None) -> Tensor:
    """IoU, less the penalty, of each pair of boxes [n, 4]; -1 where the two share no area."""
    low = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    side = (high - low).clamp(min=0)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    intersection = side.prod(-1)
    overlap = intersection / (area[:, None] + area - intersection)
    if beta is not None:
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        distance = (center[:, None] - center).square().sum(-1)
        outer_low = torch.minimum(boxes[:, None, :2], boxes[:, :2])
        outer_high = torch.maximum(boxes[:, None, 2:], boxes[:, 2:])
        overlap = overlap - (distance / (outer_high - outer_low).square().sum(-1)) ** beta
    return overlap.where(intersection > 0, -1.0)


def _check(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    counts: Tensor,
    iou_threshold: float,
    beta: float | None,
    max_detections: int,
    numbers: Tensor | None,
) -> None:
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [batch, candidates, 4], not {list(boxes.shape)}")
    expected = {
        "boxes": (boxes, tuple(boxes.shape), torch.float32),
        "scores": (scores, tuple(boxes.shape[:2]), torch.float32),
        "class_ids": (class_ids, tuple(boxes.shape[:2]), torch.int32),
        "counts": (counts, (boxes.shape[0],), torch.int32),
    }
    if numbers is not None:
        expected["numbers"] = (numbers, tuple(boxes.shape[:2]), torch.int32)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {list(shape)} {dtype}, not {list(tensor.shape)} {tensor.dtype}"
            )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in 0..1, not {iou_threshold}")
    if beta is not None and not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be finite and at least 0, or None, not {beta}")
    if max_detections < 0:
        raise ValueError(f"max_detections must be at least 0, not {max_detections}")


@torch.library.register_fake("yolov4_fast::diou_nms")
def _(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    counts: Tensor,
    iou_threshold: float,
    beta: float | None = None,
    max_detections: int = 0,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = max_detections or boxes.shape[1]
    return (
        boxes.new_empty((boxes.shape[0], rows), dtype=torch.int64),
        boxes.new_empty((boxes.shape[0],), dtype=torch.int32),
    )
