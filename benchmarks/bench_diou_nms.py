"""diou_nms against torchvision.ops.nms on 1,000 and 10,000 boxes of one class, one thread; and on a
GPU, where there is one, for batches of candidates.

Two kinds of boxes: clusters of a detector's candidates around objects, most of which are
suppressed, and boxes scattered at random, most of which stay (the slow case of greedy suppression).

`python -m benchmarks.bench_diou_nms` prints the figures; `pytest benchmarks/bench_diou_nms.py`
runs the same calls under pytest-benchmark. On the GPU a call is a CUDA graph, as in the engine, and
the time is the device's.
"""

from functools import partial
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Function, compare, report
from yolov4_fast.ops import diou_nms
from yolov4_fast.ops.pack import pack

COUNTS = (1_000, 10_000)
KINDS = ("clustered", "scattered")
THRESHOLD = 0.45
BETA = 0.6

CAPACITY = 4096  # candidates an image that the buffers on the GPU hold
DETECTIONS = 300
GPU_BATCHES = (1, 32)
GPU_COUNTS = (0, 100, 300, 1_000, 4_096)
GPU_CLASSES = (1, 80)


def boxes_and_scores(count: int, kind: str) -> tuple[Tensor, Tensor]:
    """boxes [count, 4] xyxy relative to the image and scores [count]."""
    generator = torch.Generator().manual_seed(count)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    objects = 50 if kind == "clustered" else count
    which = torch.randint(0, objects, (count,), generator=generator)
    noise = torch.randn(count, 4, generator=generator)
    size = (uniform(objects, 2) * 0.2 + 0.02)[which]
    center = uniform(objects, 2)[which] + 0.15 * size * noise[:, :2]
    size = size * torch.exp(0.15 * noise[:, 2:])
    return torch.cat((center - size / 2, center + size / 2), 1), uniform(count)


def functions(count: int, kind: str) -> dict[str, Function]:
    boxes, scores = boxes_and_scores(count, kind)
    batch = boxes[None], scores[None], torch.zeros(1, count, dtype=torch.int32)
    counts = torch.tensor([count], dtype=torch.int32)
    calls: dict[str, Function] = {
        "DIoU": lambda: diou_nms(*batch, counts, THRESHOLD, BETA)[1],
        "IoU": lambda: diou_nms(*batch, counts, THRESHOLD, None)[1],
    }
    if find_spec("torchvision"):
        import torchvision

        calls["torchvision"] = lambda: torchvision.ops.nms(boxes, scores, THRESHOLD).shape[0]
    return calls


def gpu_candidates(batch: int, count: int, classes: int, kind: str) -> tuple[Tensor, ...]:
    """boxes, scores, class_ids and counts on the GPU; only `count` of the CAPACITY are real."""
    boxes, scores = boxes_and_scores(CAPACITY, kind)
    # Scores of a detector: most of them low.
    scores = scores**3
    class_ids = torch.arange(CAPACITY, dtype=torch.int32) % classes
    counts = torch.full((batch,), count, dtype=torch.int32)
    tensors = (tensor.expand(batch, *tensor.shape) for tensor in (boxes, scores, class_ids))
    return *(tensor.contiguous().cuda() for tensor in tensors), counts.cuda()


def gpu_main() -> None:
    for batch, kind in product(GPU_BATCHES, KINDS):
        calls: dict[str, Function] = {}
        results: dict[str, object] = {}
        for count, classes in product(GPU_COUNTS, GPU_CLASSES):
            name = f"{count} candidates, {classes} classes"
            case = gpu_candidates(batch, count, classes, kind)
            calls[name] = partial(diou_nms, *case, THRESHOLD, BETA, DETECTIONS)
            keep, kept = diou_nms(*case, THRESHOLD, BETA, DETECTIONS)
            results[f"kept of {name}"] = int(kept[0])
            calls["pack"] = partial(pack, *case, keep, kept)
        report(f"nms on the GPU, batch {batch}, {kind}", compare_kernels(calls), results)


@pytest.mark.parametrize("name", ["DIoU", "IoU", "torchvision"])
@pytest.mark.parametrize(("count", "kind"), list(product(COUNTS, KINDS)))
def test_diou_nms(benchmark, count, kind, name):
    torch.set_num_threads(1)
    if name == "torchvision":
        pytest.importorskip("torchvision")
    assert 0 < int(benchmark(functions(count, kind)[name])) <= count


def main(gpu_only: bool = False) -> None:
    if not gpu_only:
        cpu_main()
    if torch.cuda.is_available():
        gpu_main()


def cpu_main() -> None:
    torch.set_num_threads(1)
    for count, kind in product(COUNTS, KINDS):
        calls = functions(count, kind)
        timings = compare(calls)
        results: dict[str, object] = {
            f"kept by {name}": int(call()) for name, call in calls.items()
        }
        if "torchvision" in timings:
            reference = timings["torchvision"].median
            results |= {
                f"torchvision / {name}": reference / timings[name].median
                for name in ("DIoU", "IoU")
            }
        report(f"nms of {count} {kind} boxes", timings, results)


if __name__ == "__main__":
    main()
