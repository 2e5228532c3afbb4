"""Training on a GPU: the fused normalisation and activation beside torch's pair of operators, and a
whole step with and without it.

    python -m benchmarks.training_gpu [--model yolov4] [--size 416] [--batch 64] [--precision bf16]

Layers: for each shape that the network normalises before a Mish, forward and backward, ten of them
in one graph of the device, so that launching does not count. Ours must read x twice and write y,
then read x and dy twice and write dx: eight values moved for each of x, whose bytes over the time
stand beside the rate of a copy. Both are first held against float32.

Step: the network under autocast, loss, backward and SGD on random pictures, both programs in turn.
And what a step needs: `kept`, the bytes that autograd holds for the backward pass, parameters
apart, and on a GPU `peak`, the most that was allocated during forward and backward over what was
before. Where memory does not suffice the batch is halved.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Timing, compare, environment
from benchmarks.roofline import copy_rate
from training.batch_norm import BatchNorm, convert
from training.losses import LossConfig, detection_loss
from yolov4_fast.commands.arguments import size
from yolov4_fast.files import replacing
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.layers import Conv, Network
from yolov4_fast.network.module import NetworkModule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "f32": torch.float32}
# Of the largest value, against float32 on the same x and dy: y and dx are rounded once.
LIMITS = {"bf16": 8e-3, "fp16": 1e-3, "f32": 1e-4}
MOVED = 8  # values for each of x
OBJECTS = 8  # in a picture
CLASSES = 80
SMALLEST_BATCH = 4


class Settings(NamedTuple):
    device: torch.device
    precision: str
    seconds: float  # of timing for each program, where no graphs are timed

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


class Shape(NamedTuple):
    channels: int
    height: int
    width: int


def shapes(network: Network, activation: str = "mish") -> Counter[Shape]:
    """Outputs of the network's normalised convolutions with that activation, and how often."""
    return Counter(
        Shape(*shape)
        for layer, shape in zip(network.layers, network.shapes(), strict=True)
        if isinstance(layer, Conv) and layer.batch_normalize and layer.activation == activation
    )


class Pair:
    """Ours and torch's on the same x and dy. Each call: y, dx, dweight, dbias."""

    def __init__(self, shape: Shape, batch: int, settings: Settings) -> None:
        torch.manual_seed(0)
        x, dy = (
            torch.randn(batch, *shape, device=settings.device).to(DTYPES[settings.precision])
            for _ in range(2)
        )
        self.x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        self.dy = dy.contiguous(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(shape.channels).to(settings.device)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)
        self.ours = BatchNorm(self.norm, "mish")
        self.ours.implementation = "kernel" if settings.gpu else "reference"

    def fused(self) -> tuple[Tensor, ...]:
        return self._run(self.ours(self.x), self.x, self.dy)

    def plain(self) -> tuple[Tensor, ...]:
        return self._run(F.mish(self.norm(self.x)), self.x, self.dy)

    def exact(self) -> tuple[Tensor, ...]:
        x = self.x.detach().float().requires_grad_()
        return self._run(F.mish(self.norm(x)), x, self.dy.float())

    def _run(self, y: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return y.detach(), *torch.autograd.grad(y, (x, self.norm.weight, self.norm.bias), dy)


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference of any result as a share of its largest value; NaN is infinite."""
    worst = max(
        float((a.float() - b).abs().max() / b.abs().max())
        for a, b in zip(found, exact, strict=True)
    )
    return worst if worst == worst else float("inf")


def layers(network: Network, batch: int, settings: Settings) -> dict[str, Any]:
    """A row for each shape, and the sum over all layers. Raises SystemExit where ours is not right:
    no time is shown then.
    """
    rows = []
    for shape, count in sorted(shapes(network).items()):
        pair = Pair(shape, 2, settings)
        exact = pair.exact()
        errors = {"fused": error(pair.fused(), exact), "torch": error(pair.plain(), exact)}
        if not errors["fused"] <= LIMITS[settings.precision]:
            raise SystemExit(f"{shape}: ours is {errors['fused']:.1e} off: no time is shown")
        pair = Pair(shape, batch, settings)
        timings = timed({"fused": pair.fused, "torch": pair.plain}, settings)
        moved = MOVED * pair.x.numel() * pair.x.element_size()
        rows.append(
            {
                "shape": list(shape),
                "count": count,
                "errors": errors,
                "timings": {name: asdict(timing) for name, timing in timings.items()},
                "ratio": timings["torch"].median / timings["fused"].median,
                "rate": moved / timings["fused"].median,
            }
        )
        print(
            f"  {count:3} x {'x'.join(map(str, shape)):12} fused {timings['fused']}, torch "
            f"{timings['torch']}: {rows[-1]['ratio']:.2f} x, {rows[-1]['rate'] / 1e12:.2f} TB/s",
            flush=True,
        )
    sums = {
        name: sum(row["count"] * row["timings"][name]["median"] for row in rows)
        for name in ("fused", "torch")
    }
    total = sums | {"ratio": sums["torch"] / sums["fused"]}
    print("  all layers: fused {fused:.4f} s, torch {torch:.4f} s: {ratio:.2f} x".format(**total))
    return {"batch": batch, "rows": rows, "total": total}


def timed(programs: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, Timing]:
    if settings.gpu:
        return compare_kernels(programs)
    return compare(programs, seconds=settings.seconds, minimum_repeats=3)


class Step:
    """One program's training step on random pictures."""

    def __init__(self, network: Network, batch: int, settings: Settings, fused: bool) -> None:
        torch.manual_seed(0)
        self.network, self.settings = network, settings
        self.module = NetworkModule(network).to(settings.device).train()
        self.module.to(memory_format=torch.channels_last)
        if fused:
            convert(self.module, "local", implementation="kernel" if settings.gpu else "reference")
        self.optimizer = torch.optim.SGD(self.module.parameters(), 1e-4, 0.9, nesterov=True)
        images = torch.rand(batch, 3, network.height, network.width, device=settings.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.targets = random_targets(batch).to(settings.device)

    def forward(self) -> Tensor:
        dtype = DTYPES[self.settings.precision]
        enabled = dtype != torch.float32
        with torch.autocast(self.settings.device.type, dtype if enabled else None, enabled):
            maps = self.module(self.images)
        return detection_loss(self.network.heads, maps, self.targets, LossConfig()).total

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().backward()
        self.optimizer.step()
        if self.settings.gpu:
            torch.cuda.synchronize()

    def kept(self) -> int:
        """Bytes that autograd keeps for the backward pass, each memory once, but for parameters."""
        parameters = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(storages.values())

    def peak(self) -> int | None:
        """Bytes allocated at most during forward and backward, over what was before."""
        if not self.settings.gpu:
            return None
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.forward().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def random_targets(batch: int) -> Tensor:
    """[batch * OBJECTS, 6]: image, class, cx, cy, w, h; boxes of a tenth to a half of the side."""
    count = batch * OBJECTS
    image = torch.arange(batch).repeat_interleave(OBJECTS)[:, None].float()
    classes = torch.randint(CLASSES, (count, 1)).float()
    return torch.cat(
        [image, classes, 0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.4 * torch.rand(count, 2)], 1
    )


def step(network: Network, batch: int, settings: Settings) -> dict[str, Any]:
    programs = {
        name: Step(network, batch, settings, name == "fused") for name in ("fused", "torch")
    }
    timings = compare(programs, seconds=settings.seconds, minimum_repeats=3)
    record: dict[str, Any] = {
        "batch": batch,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "ratio": timings["torch"].median / timings["fused"].median,
        "kept": {name: program.kept() for name, program in programs.items()},
        "peak": {name: program.peak() for name, program in programs.items()},
    }
    for name, timing in timings.items():
        kept, peak = record["kept"][name], record["peak"][name]
        told = "" if peak is None else f", at most {peak / 2**30:.2f} GiB allocated"
        print(f"  {name}: {timing}, {kept / 2**30:.3g} GiB kept{told}")
    print(f"  step of {batch}: {record['ratio']:.2f} x")
    return record


def fitting(function: Callable[[Network, int, Settings], Any], *arguments: Any) -> Any:
    """The function's result with the first of the batches, each half the one before, that fits."""
    network, batch, settings = arguments
    while True:
        try:
            return function(network, batch, settings)
        except torch.cuda.OutOfMemoryError:
            if batch <= SMALLEST_BATCH:
                raise
        batch //= 2  # outside the handler, which holds on to the memory of the failure
        torch.cuda.empty_cache()
        print(f"  too little memory; batch {batch} next")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="yolov4", help="an architecture's name")
    parser.add_argument("--size", type=size, default=(416, 416), metavar="N|WxH")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each program")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    settings = Settings(arguments.device, arguments.precision, arguments.seconds)
    if settings.gpu and not torch.cuda.is_available():
        print("training: needs an NVIDIA GPU")
        return 2
    torch.backends.cudnn.benchmark = settings.gpu
    width, height = arguments.size
    network = by_name(arguments.model, num_classes=CLASSES, width=width, height=height)
    title = f"training {arguments.model} {width}x{height}, {arguments.precision}"
    record: dict[str, Any] = {
        "benchmark": title,
        "environment": environment(),
        "copy": copy_rate(settings.device, 2**32 if settings.gpu else 2**26),
    }
    print(f"{title}, batch {arguments.batch}, copy {record['copy'] / 1e12:.2f} TB/s")
    for name, part in (("layers", layers), ("step", step)):
        record[name] = fitting(part, network, arguments.batch, settings)
        if arguments.output:  # as it comes, should the other part fail
            with replacing(arguments.output) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
