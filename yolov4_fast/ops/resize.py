"""resize: images of any size to one batch of the network's size, and the way back for boxes.

Bilinear with aligned corners, as AlexeyAB/darknet's `resize_image`: output cell i of n lies at
i * (m - 1) / (n - 1) (float32) among the m input cells, and the last output cell is the last input
cell, also where n = 1.

stretch      the image fills the canvas.
letterbox    the image keeps its shape: the tighter side fills the canvas, the other is scaled in
             whole numbers (rounded down, at least 1), the rest is 0.5. It stands at half the
             margin, rounded down (`letterbox_image`); boxes return by half the margin *not*
             rounded (`correct_yolo_boxes`): `placement` is Darknet's also where the margin is odd.

Where rounding puts the last row a hair above the last input row (as for 240 rows to 416), Darknet
drops its second term and the row turns out black; here it is the last input row.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

import yolov4_fast.ops.library  # noqa: F401  registers the operator
from yolov4_fast.ops.implementation import Implementation, choose

Mode = Literal["stretch", "letterbox"]

FILL = 0.5


def resize(
    images: Sequence[Tensor],
    height: int,
    width: int,
    mode: Mode,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Resize images, each its own size, to one batch.

    images: each [H, W, 3], uint8 or float32 in 0..1, any strides (a permuted [3, H, W] is read in
    place), all on one device. implementation: None is the kernel for CUDA images and the extension
    for others. Returns [B, 3, height, width] float32 in 0..1, channels in the images' order; from
    the kernel it lies channels-last in memory. Raises ValueError.
    """
    _check_canvas(height, width, mode)
    for index, image in enumerate(images):
        _check_image(index, image, images[0].device)
    chosen = choose(images[0] if images else torch.empty(0), implementation)
    if not images:
        return torch.empty((0, 3, height, width))
    if chosen == "reference":
        return resize_reference(images, height, width, mode)
    regions = [region(image.shape[:2], height, width, mode) for image in images]
    if chosen == "kernel":
        return _resize_kernel(images, regions, height, width)
    flat = [number for numbers in regions for number in numbers]
    return torch.ops.yolov4_fast.resize(list(images), flat, height, width)


def placement(sizes: Sequence[tuple[int, int]], height: int, width: int, mode: Mode) -> Tensor:
    """How boxes return to the original images: image = net * scale + offset, relative to the sizes.

    sizes: (height, width) of each original image in pixels. Returns [B, 4] float32 on the CPU:
    scale_x, scale_y, offset_x, offset_y.
    """
    _check_canvas(height, width, mode)
    rows = []
    for image_height, image_width in sizes:
        if min(image_height, image_width) < 1:
            raise ValueError(f"an image of {image_width}x{image_height} pixels is empty")
        _, _, new_height, new_width = region((image_height, image_width), height, width, mode)
        rows.append(
            (
                width / new_width,
                height / new_height,
                -(width - new_width) / 2 / new_width,
                -(height - new_height) / 2 / new_height,
            )
        )
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def region(size: Sequence[int], height: int, width: int, mode: Mode) -> tuple[int, int, int, int]:
    """Where an image of size (height, width) stands on the canvas: top, left, height, width."""
    image_height, image_width = size
    if mode == "stretch":
        return 0, 0, height, width
    # float32 like Darknet: which side is tighter can hang on the rounding.
    if np.float32(width) / np.float32(image_width) < np.float32(height) / np.float32(image_height):
        new_height, new_width = max(1, image_height * width // image_width), width
    else:
        new_height, new_width = height, max(1, image_width * height // image_height)
    return (height - new_height) // 2, (width - new_width) // 2, new_height, new_width


def _resize_kernel(
    images: Sequence[Tensor], regions: Sequence[Sequence[int]], height: int, width: int
) -> Tensor:
    from yolov4_fast.ops.kernels.resize import launch, table_row

    device = images[0].device
    rows = [table_row(image, numbers) for image, numbers in zip(images, regions, strict=True)]
    out = torch.empty((len(images), height, width, 3), device=device)
    launch(torch.tensor(rows, dtype=torch.int64, device=device), out)
    return out.permute(0, 3, 1, 2)


def resize_reference(images: Sequence[Tensor], height: int, width: int, mode: Mode) -> Tensor:
    """The definition in torch; arguments and result as in `resize`."""
    canvas = images[0].new_full((len(images), 3, height, width), FILL, dtype=torch.float32)
    for image, out in zip(images, canvas, strict=True):
        top, left, new_height, new_width = region(image.shape[:2], height, width, mode)
        pixels = image.float() / 255 if image.dtype == torch.uint8 else image
        y, y_next, dy = _taps(image.shape[0], new_height, image.device)
        x, x_next, dx = _taps(image.shape[1], new_width, image.device)
        rows = torch.lerp(pixels[:, x], pixels[:, x_next], dx[None, :, None])
        rows = torch.lerp(rows[y], rows[y_next], dy[:, None, None])
        out[:, top : top + new_height, left : left + new_width] = rows.permute(2, 0, 1)
    return canvas


def _taps(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two input cells that each output cell lies between, and its distance from the first."""
    step = torch.tensor((size_in - 1) / max(size_out - 1, 1), dtype=torch.float32)
    position = (torch.arange(size_out, dtype=torch.float32) * step).to(device)
    position[-1] = size_in - 1
    index = position.long()
    return index, (index + 1).clamp(max=size_in - 1), position - index


def _check_canvas(height: int, width: int, mode: str) -> None:
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least 1, not {height} and {width}")
    if mode not in get_args(Mode):
        raise ValueError(
            f"the resize mode must be one of {', '.join(get_args(Mode))}, not {mode!r}"
        )


def _check_image(index: int, image: Tensor, device: torch.device) -> None:
    if image.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"image {index} must be uint8 or float32, not {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or image.numel() == 0:
        raise ValueError(
            f"image {index} must be [height, width, 3] with at least one pixel, "
            f"not {list(image.shape)}"
        )
    if image.device != device:
        raise ValueError(f"image {index} is on {image.device} and the first is on {device}")


@torch.library.register_fake("yolov4_fast::resize")
def _(images: Sequence[Tensor], regions: Sequence[int], height: int, width: int) -> Tensor:
    return images[0].new_empty((len(images), 3, height, width), dtype=torch.float32)
