"""pack: what non-maximum suppression kept, as one tensor that a single copy brings to the host.

    out[b, 0]     = kept[b], counts[b], 0, 0, 0, 0
    out[b, 1 + d] = x1, y1, x2, y2, score, class id of candidate keep[b, d]      d < kept[b]
    out[b, 1 + d] = 0                                                            d >= kept[b]

Whole numbers up to 2^24 are exact in float32; class ids and counts stay far below it.
"""

import torch
from torch import Tensor

from yolov4_fast.ops.library import Implementation, check_device, check_implementation


def pack(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    counts: Tensor,
    keep: Tensor,
    kept: Tensor,
    *,
    implementation: Implementation = "extension",
) -> Tensor:
    """Gather the kept candidates of each image of a batch.

    boxes: [B, K, 4] float32. scores: [B, K] float32. class_ids: [B, K] int32. counts: [B] int32,
    how many candidates were found, more than K where the buffer was too small. keep: [B, D] int64
    and kept: [B] int32 as `diou_nms` returns them.
    Returns [B, D + 1, 6] float32. Raises ValueError, and RuntimeError on the CPU where keep or kept
    points outside (a GPU, which cannot raise, gives rows of NaN).
    """
    check_implementation(implementation)
    _check(boxes, scores, class_ids, counts, keep, kept)
    if implementation == "reference":
        return pack_reference(boxes, scores, class_ids, counts, keep, kept)
    check_device(boxes, "pack")
    return torch.ops.yolov4_fast.pack(boxes, scores, class_ids, counts, keep, kept)


def pack_reference(
    boxes: Tensor, scores: Tensor, class_ids: Tensor, counts: Tensor, keep: Tensor, kept: Tensor
) -> Tensor:
    """The definition in torch; arguments and result as in `pack`."""
    batch, detections = keep.shape
    packed = boxes.new_zeros(batch, detections + 1, 6)
    for image, count in enumerate(kept.tolist()):
        chosen = keep[image, :count]
        packed[image, 0, 0] = count
        packed[image, 0, 1] = counts[image]
        packed[image, 1 : count + 1, :4] = boxes[image, chosen]
        packed[image, 1 : count + 1, 4] = scores[image, chosen]
        packed[image, 1 : count + 1, 5] = class_ids[image, chosen].float()
    return packed


def _check(
    boxes: Tensor, scores: Tensor, class_ids: Tensor, counts: Tensor, keep: Tensor, kept: Tensor
) -> None:
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [batch, candidates, 4], not {list(boxes.shape)}")
    batch = boxes.shape[0]
    if keep.ndim != 2:
        raise ValueError(f"keep must be [{batch}, detections], not {list(keep.shape)}")
    expected = {
        "boxes": (boxes, tuple(boxes.shape), torch.float32),
        "scores": (scores, tuple(boxes.shape[:2]), torch.float32),
        "class_ids": (class_ids, tuple(boxes.shape[:2]), torch.int32),
        "counts": (counts, (batch,), torch.int32),
        "keep": (keep, (batch, keep.shape[1]), torch.int64),
        "kept": (kept, (batch,), torch.int32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {list(shape)} {dtype}, not {list(tensor.shape)} {tensor.dtype}"
            )


@torch.library.register_fake("yolov4_fast::pack")
def _(
    boxes: Tensor, scores: Tensor, class_ids: Tensor, counts: Tensor, keep: Tensor, kept: Tensor
) -> Tensor:
    return boxes.new_empty((keep.shape[0], keep.shape[1] + 1, 6))
