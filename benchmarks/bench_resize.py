"""resize: one 1280x720 uint8 picture to 416x416 against torch and OpenCV, one thread.

`python -m benchmarks.bench_resize` prints the figures; `pytest benchmarks/bench_resize.py` runs
the same calls under pytest-benchmark.
"""

import cv2
import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import Function, compare, report
from yolov4_fast.ops import resize

SIZE = 416


def functions() -> dict[str, Function]:
    """Each gives [1, 3, 416, 416] float32 in 0..1 of the same picture; OpenCV's corners differ."""
    image = torch.randint(
        0, 256, (720, 1280, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    planes = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    pixels = image.numpy()

    def in_torch() -> torch.Tensor:
        batch = image.permute(2, 0, 1)[None].float() / 255
        return F.interpolate(batch, (SIZE, SIZE), mode="bilinear", align_corners=True)

    def in_opencv() -> torch.Tensor:
        resized = torch.from_numpy(cv2.resize(pixels, (SIZE, SIZE)))
        return resized.permute(2, 0, 1)[None].float().div_(255).contiguous()

    return {
        "stretch, HWC": lambda: resize([image], SIZE, SIZE, "stretch"),
        "stretch, CHW": lambda: resize([planes], SIZE, SIZE, "stretch"),
        "letterbox, HWC": lambda: resize([image], SIZE, SIZE, "letterbox"),
        "torch interpolate": in_torch,
        "OpenCV, 8-bit": in_opencv,
    }


@pytest.mark.parametrize("name", list(functions()))
def test_resize(benchmark, name):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    result = benchmark(functions()[name])
    assert result.shape == (1, 3, SIZE, SIZE)


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    timings = compare(functions())
    ours = timings["stretch, HWC"].median
    report(
        "resize 1280x720 to 416x416",
        timings,
        {
            "torch / ours": timings["torch interpolate"].median / ours,
            "OpenCV / ours": timings["OpenCV, 8-bit"].median / ours,
        },
    )


if __name__ == "__main__":
    main()
