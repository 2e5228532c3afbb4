"""decode and diou_nms of the raw maps of one 608 image against copying those maps once, one thread;
on a GPU decode of one and of 32 images' float16 maps against copying those.

The maps are YOLOv4's (22,743 boxes, 80 classes) with the scores of a detector at work: nearly all
cells far below any confidence, and around each of a few dozen objects several cells and anchors
whose boxes overlap, with the object's class likely and some of its kin less so.

`python -m benchmarks.bench_decode` prints the figures; `pytest benchmarks/bench_decode.py` runs the
same calls of the CPU under pytest-benchmark.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Function, compare, report
from yolov4_fast.ops import decode, diou_nms

SIZE, CLASSES, OBJECTS = 608, 80, 40
STRIDES = (8, 16, 32)
SCALES = (1.2, 1.1, 1.05)
ANCHORS = (
    ((12.0, 16.0), (19.0, 36.0), (40.0, 28.0)),
    ((36.0, 75.0), (76.0, 55.0), (72.0, 146.0)),
    ((142.0, 110.0), (192.0, 243.0), (459.0, 401.0)),
)
CONFIDENCES = {0.25: 0.45, 0.001: 0.6}  # confidence to NMS threshold: Darknet's test and valid
CAPACITY = 4096  # candidates an image on the GPU; more are counted
LAYOUTS = {"planes": torch.contiguous_format, "channels last": torch.channels_last}


def realistic_maps(layout: str) -> list[Tensor]:
    """Three maps [1, 255, n, n] of a scene with OBJECTS objects."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], mean: float, deviation: float) -> Tensor:
        return torch.randn(shape, generator=generator) * deviation + mean

    maps = []
    for stride in STRIDES:
        cells = SIZE // stride
        raw = normal((3, 5 + CLASSES, cells, cells), 0, 0.5)
        raw[:, 4] = normal((3, cells, cells), -9.5, 1.6)  # 5 % of all cells are over 0.001
        raw[:, 5:] = normal((3, CLASSES, cells, cells), -8.5, 1.5)
        maps.append(raw)
    for _ in range(OBJECTS):
        head = int(torch.randint(0, 3, (), generator=generator))
        raw, anchors = maps[head], torch.tensor(ANCHORS[head])
        cells = raw.shape[-1]
        size = anchors[1] * torch.exp(normal((2,), 0, 0.3))  # pixels
        center = torch.rand(2, generator=generator) * (cells - 3) + 1.5  # cells
        kinds = torch.randint(0, CLASSES, (4,), generator=generator)
        column, row = center.int().tolist()
        for i, j in product(range(row - 1, row + 2), range(column - 1, column + 2)):
            distance = (center - torch.tensor([j + 0.5, i + 0.5])).norm()
            offset = ((center - torch.tensor([j, i])).clamp(0.05, 0.95)).logit()
            raw[:, 0:2, i, j] = offset + normal((3, 2), 0, 0.2)
            raw[:, 2:4, i, j] = torch.log(size / anchors) + normal((3, 2), 0, 0.1)
            raw[:, 4, i, j] = normal((3,), 2, 1.5) - 3 * distance
            raw[:, 5 + kinds[0], i, j] = normal((3,), 2.5, 1)
            raw[:, 5 + kinds[1:], i, j] = normal((3, 3), -2, 1.5)
    return [
        raw.reshape(1, -1, *raw.shape[2:]).contiguous(memory_format=LAYOUTS[layout]) for raw in maps
    ]


def functions(confidence: float, layout: str) -> dict[str, Function]:
    maps = realistic_maps(layout)
    copies = [torch.empty_like(raw) for raw in maps]

    def copy() -> int:
        for target, raw in zip(copies, maps, strict=True):
            target.copy_(raw)
        return len(copies)

    def decoded() -> Tensor:
        return decode(maps, ANCHORS, SCALES, (False,) * 3, SIZE, SIZE, confidence).counts

    def detected() -> Tensor:
        candidates = decode(maps, ANCHORS, SCALES, (False,) * 3, SIZE, SIZE, confidence)
        return diou_nms(*candidates, CONFIDENCES[confidence], 0.6)[1]

    return {"copy": copy, "decode": decoded, "decode and NMS": detected}


@pytest.mark.parametrize("name", ["copy", "decode", "decode and NMS"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("confidence", list(CONFIDENCES))
def test_decode(benchmark, confidence, layout, name):
    torch.set_num_threads(1)
    assert int(benchmark(functions(confidence, layout)[name])) > 0


def gpu_functions(confidence: float, batch: int) -> tuple[dict[str, Function], Tensor]:
    """And the counts that decode fills. The maps lie as in the CUDA engine, in rows of 256."""
    from yolov4_fast.ops.kernels.decode import append

    maps = []
    for raw in realistic_maps("channels last"):
        _, channels, height, width = raw.shape
        wide = torch.zeros((batch, height, width, 256), dtype=torch.float16, device="cuda")
        wide[..., :channels] = raw.permute(0, 2, 3, 1)
        maps.append(wide[..., :channels])
    copies = [torch.empty_like(raw, memory_format=torch.contiguous_format) for raw in maps]
    boxes = torch.empty((batch, CAPACITY, 4), device="cuda")
    scores = torch.empty((batch, CAPACITY), device="cuda")
    class_ids = torch.empty((batch, CAPACITY), dtype=torch.int32, device="cuda")
    numbers = torch.empty_like(class_ids)
    counts = torch.zeros(batch, dtype=torch.int32, device="cuda")

    def copy() -> None:
        for target, raw in zip(copies, maps, strict=True):
            target.copy_(raw)

    def decoded() -> None:
        append(
            maps, ANCHORS, SCALES, (False,) * 3, SIZE, SIZE, confidence, None,
            boxes, scores, class_ids, numbers, counts,
        )  # fmt: skip

    return {"copy": copy, "decode": decoded}, counts


def gpu() -> None:
    for confidence, batch in product(CONFIDENCES, (1, 32)):
        calls, counts = gpu_functions(confidence, batch)
        timings = compare_kernels(calls)
        report(
            f"decode of {batch} x {SIZE} on the GPU, confidence {confidence}",
            timings,
            {
                "candidates of an image": int(counts.max()),
                "decode / copy": timings["decode"].median / timings["copy"].median,
            },
        )


def main(gpu_only: bool = False) -> None:
    if not gpu_only:
        cpu()
    if torch.cuda.is_available():
        gpu()


def cpu() -> None:
    torch.set_num_threads(1)
    for confidence, layout in product(CONFIDENCES, LAYOUTS):
        calls = functions(confidence, layout)
        timings = compare(calls)
        report(
            f"decode and NMS of one {SIZE} image, confidence {confidence}, {layout}",
            timings,
            {
                "candidates": int(calls["decode"]()),
                "kept": int(calls["decode and NMS"]()),
                "decode and NMS / copy": timings["decode and NMS"].median / timings["copy"].median,
            },
        )


if __name__ == "__main__":
    main()
