"""resize: one 1280x720 uint8 picture to 416x416 against torch and OpenCV, one thread; on a GPU one
and 32 of them against torch and against the time to move the bytes that must be moved.

`python -m benchmarks.bench_resize` prints the figures; `pytest benchmarks/bench_resize.py` runs
the same calls of the CPU under pytest-benchmark.
"""

import cv2
import pytest
import torch
import torch.nn.functional as F

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Function, compare, report
from benchmarks.roofline import copy_rate
from yolov4_fast.ops import resize
from yolov4_fast.ops.resize import region

SIZE = 416
PICTURE = (720, 1280)  # height, width


def functions() -> dict[str, Function]:
    """Each gives [1, 3, 416, 416] float32 in 0..1 of the same picture; OpenCV's corners differ."""
    image = torch.randint(
        0, 256, (*PICTURE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
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


def gpu_functions(batch: int) -> dict[str, Function]:
    """Each makes [batch, 416, 416, 3] float16 of pictures on the GPU."""
    from yolov4_fast.ops.kernels.resize import launch, table_row

    shape = (batch, *PICTURE, 3)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    out = torch.empty((batch, SIZE, SIZE, 3), dtype=torch.float16, device="cuda")
    tables = {}
    for mode in ("stretch", "letterbox"):
        where = region(PICTURE, SIZE, SIZE, mode)
        rows = [table_row(picture, where) for picture in pictures]
        tables[mode] = torch.tensor(rows, dtype=torch.int64, device="cuda")

    def in_torch() -> torch.Tensor:
        images = pictures.permute(0, 3, 1, 2).half() / 255
        return F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=True)

    return {
        "stretch": lambda: launch(tables["stretch"], out),
        "letterbox": lambda: launch(tables["letterbox"], out),
        "torch interpolate, float16": in_torch,
    }


def gpu() -> None:
    device = torch.device("cuda")
    rate = copy_rate(device, 2**32)
    for batch in (1, 32):
        timings = compare_kernels(gpu_functions(batch))
        moved = batch * 3 * (PICTURE[0] * PICTURE[1] + 2 * SIZE * SIZE)
        report(
            f"resize {batch} x 1280x720 to 416x416 on the GPU",
            timings,
            {
                "torch / ours": timings["torch interpolate, float16"].median
                / timings["stretch"].median,
                "ours / moving the bytes once": timings["stretch"].median / (moved / rate),
            },
        )


def main(gpu_only: bool = False) -> None:
    if not gpu_only:
        cpu()
    if torch.cuda.is_available():
        gpu()


def cpu() -> None:
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
