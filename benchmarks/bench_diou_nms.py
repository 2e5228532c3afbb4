"""diou_nms against torchvision.ops.nms on 1,000 and 10,000 boxes of one class, one thread.

Two kinds of boxes: clusters of a detector's candidates around objects, most of which are
suppressed, and boxes scattered at random, most of which stay (the slow case of greedy suppression).

`python -m benchmarks.bench_diou_nms` prints the figures; `pytest benchmarks/bench_diou_nms.py`
runs the same calls under pytest-benchmark.
"""

from itertools import product

import pytest
import torch
import torchvision
from torch import Tensor

from benchmarks.harness import Function, compare, report
from yolov4_fast.ops import diou_nms

COUNTS = (1_000, 10_000)
KINDS = ("clustered", "scattered")
THRESHOLD = 0.45
BETA = 0.6


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
    return {
        "DIoU": lambda: diou_nms(*batch, counts, THRESHOLD, BETA)[1],
        "IoU": lambda: diou_nms(*batch, counts, THRESHOLD, None)[1],
        "torchvision": lambda: torchvision.ops.nms(boxes, scores, THRESHOLD).shape[0],
    }


@pytest.mark.parametrize("name", ["DIoU", "IoU", "torchvision"])
@pytest.mark.parametrize(("count", "kind"), list(product(COUNTS, KINDS)))
def test_diou_nms(benchmark, count, kind, name):
    torch.set_num_threads(1)
    assert 0 < int(benchmark(functions(count, kind)[name])) <= count


def main() -> None:
    torch.set_num_threads(1)
    for count, kind in product(COUNTS, KINDS):
        calls = functions(count, kind)
        timings = compare(calls)
        reference = timings["torchvision"].median
        results: dict[str, object] = {
            f"kept by {name}": int(call()) for name, call in calls.items()
        }
        results |= {
            f"torchvision / {name}": reference / timings[name].median for name in ("DIoU", "IoU")
        }
        report(f"nms of {count} {kind} boxes", timings, results)


if __name__ == "__main__":
    main()
