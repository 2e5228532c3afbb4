"""FPS of `detect` on a GPU beside PyTorch, and each stage beside its roofline, in one run.

    python -m benchmarks.fps_gpu --model yolov4 --size 416 --batch 1 32 --precision fp16

End to end is from uint8 pictures in the host's memory to detections in the host's memory. PyTorch's
network runs between our resize, decoding and NMS (see torch_peer). Before a time is shown, the raw
maps are held against PyTorch's in float32: they may lose twice what PyTorch itself loses in half
precision, which on random weights is much; FP8 is held to detections elsewhere (gpu_check).

The weights are random, with heads that find boxes all over the picture, so that NMS has work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import compare, environment
from benchmarks.roofline import Rates, costs, measure_rates, time_on
from benchmarks.torch_peer import MAX_DETECTIONS, TorchPeer
from yolov4_fast import Detector, build_engine
from yolov4_fast.commands.arguments import size
from yolov4_fast.commands.benchmark import drawn_image
from yolov4_fast.engines.cuda.engine import CudaEngine
from yolov4_fast.engines.pipeline import Settings
from yolov4_fast.files import replacing
from yolov4_fast.model import Model, open_model
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops.full_precision import full_precision
from yolov4_fast.ops.kernels import resize

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SPREAD = 2.0  # standard deviation of the logits of a lively network
DEVICE = torch.device("cuda")
CANDIDATE = 28  # bytes: box, score, class id, number


def lively(model: Model) -> Model:
    """The model with heads whose logits spread enough to find boxes."""
    module = NetworkModule(model.network)
    module.load_state_dict(model.state)
    picture = drawn_image(model.network.height, model.network.width)
    with torch.inference_mode():
        maps = module.eval()(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    state = dict(model.state)
    for head, raw in zip(model.network.heads, maps, strict=True):
        weight = f"layers.{head.inputs[0]}.conv.weight"
        bias = state[f"layers.{head.inputs[0]}.conv.bias"]
        state[weight] = state[weight] * (SPREAD / (raw - bias[:, None, None]).std())
    return replace(model, state=state)


def disagreement(maps: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest value of the reference map."""
    pairs = zip(maps, reference, strict=True)
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def check(engine: CudaEngine, peers: dict[str, TorchPeer], model: Model, batch: int) -> None:
    """Raise SystemExit where a program does not compute the same network."""
    images = torch.rand(batch, 3, engine.height, engine.width, device=DEVICE)
    reference = NetworkModule(model.network)
    reference.load_state_dict(model.state)
    with torch.inference_mode():
        with full_precision():
            expected = reference.eval().to(DEVICE)(images)
        half = images.half().to(memory_format=torch.channels_last)
        lost = {name: disagreement(peer.module(half), expected) for name, peer in peers.items()}
        ours = disagreement(engine.run(images), expected)
    limit = 2 * min(lost.values())
    for name, difference in {f"our {engine.precision}": ours, **lost}.items():
        print(f"{name}: maps differ from float32 by {difference:.1e} of their range")
        if engine.precision != "fp8" and not difference <= limit:
            raise SystemExit(f"{name} does not compute the same network: no time is shown")


def stages(
    engine: CudaEngine, peer: TorchPeer, picture: np.ndarray, batch: int, rates: Rates
) -> dict[str, Any]:
    """Seconds of each stage alone on the device, each captured as a graph of its own, and what it
    takes at least by the bytes it must move.
    """
    executor = engine.executor(batch)
    maps = [raw.permute(0, 3, 1, 2) for raw in executor.maps]

    def network() -> None:
        resize.launch(peer.table, executor.image)  # a run leaves nothing of the image
        executor.run()

    parts: dict[str, Callable[[], object]] = {
        "copy in": lambda: peer.staged.copy_(peer.host, non_blocking=True),
        "resize": lambda: resize.launch(peer.table, executor.image),
        "network": network,
        "decode": lambda: peer.decode(maps),
        "NMS": peer.suppress,
        "pack": peer.pack,
    }
    seconds = {name: time_on(DEVICE, graphed(part)) for name, part in parts.items()}
    seconds["network"] -= seconds["resize"]
    ours = {name: seconds[name] for name in ("resize", "network", "decode", "NMS", "pack")}
    steps = costs(engine.plan, batch, 1 if engine.precision == "fp8" else 2)
    moved = bytes_of(engine, picture, batch, int(peer.counts.sum()))
    floors = {name: size / rates.copy for name, size in moved.items()}
    floors["network"] = sum(step.floor(rates) for step in steps)
    floors["copy in"] = peer.host.numel() / host_rate()
    return {
        "seconds": seconds,
        "floors": floors,
        "share of resize, decode and NMS": 1 - ours["network"] / sum(ours.values()),
        "network bytes": sum(step.bytes for step in steps),
        "network operations": sum(step.operations for step in steps),
        "candidates": int(peer.counts.sum()),
    }


def bytes_of(
    engine: CudaEngine, picture: np.ndarray, batch: int, candidates: int
) -> dict[str, int]:
    """What the stages beside the network must read and write."""
    canvas = engine.height * engine.width * 3
    anchors = sum(
        len(head.mask) * (engine.height // head.stride) * (engine.width // head.stride)
        for head in engine.network.heads
    )
    return {
        # Four neighbours of each cell, or all of the picture where it is smaller; half precision.
        "resize": batch * (min(picture.nbytes, 4 * canvas) + 2 * canvas),
        # A sector of 32 bytes for each objectness; what was found is read and written.
        "decode": batch * anchors * 32 + candidates * (engine.network.num_classes + 5) * 2,
        "NMS": candidates * CANDIDATE,
        "pack": batch * (MAX_DETECTIONS + 1) * 2 * CANDIDATE,
    }


def host_rate() -> float:
    """Bytes per second of a large copy from pinned memory."""
    source = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=DEVICE)
    return source.numel() / time_on(DEVICE, lambda: target.copy_(source, non_blocking=True))


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The function as one launch, without the gaps between its kernels' launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def streamed(detector: Detector, pictures: Sequence[np.ndarray], batches: int) -> float:
    """Seconds a batch of a stream takes, copies and computation overlapped."""
    batch = len(pictures)
    results: Iterator[object] = detector.stream(cycle(pictures), batch)
    for _ in islice(results, 5 * batch):
        pass
    started = time.perf_counter()
    for _ in islice(results, batches * batch):
        pass
    return (time.perf_counter() - started) / batches


def measure(
    model: Model, precision: str, batch: int, compiled: bool, seconds: float, picture: np.ndarray
) -> dict[str, Any]:
    """All figures of one batch size; prints them as they come."""
    settings = Settings(0.25, 0.45, model.network.nms_beta, MAX_DETECTIONS, "stretch")
    engine = build_engine(
        model.network,
        model.state,
        model.class_names,
        engine="cuda",
        precision=precision,
        max_batch=batch,
        calibration=[torch.from_numpy(picture)] if precision == "fp8" else None,
    )
    assert isinstance(engine, CudaEngine)
    pictures = [picture] * batch
    peers = {"torch eager fp16": TorchPeer(model, pictures, settings)}
    if compiled:
        peers["torch.compile fp16"] = TorchPeer(model, pictures, settings, compiled=True)
    for peer in peers.values():
        peer.detect(pictures)  # compiles
    check(engine, peers, model, batch)
    detector = Detector(engine, max_detections=MAX_DETECTIONS)
    ours = f"detect, cuda {precision}"
    timings = compare(
        {ours: lambda: detector.detect(pictures)}
        | {name: (lambda peer=peer: peer.detect(pictures)) for name, peer in peers.items()},
        seconds=seconds,
    )
    rates = measure_rates(DEVICE, DTYPES[precision])
    parts = stages(engine, next(iter(peers.values())), picture, batch, rates)
    per_batch = streamed(detector, pictures, max(20, int(seconds / timings[ours].median)))
    for name, timing in timings.items():
        ratio = timing.median / timings[ours].median
        print(
            f"  batch {batch:3} {name:24} {timing}  {batch / timing.median:9.1f} FPS  x{ratio:.2f}"
        )
    print(
        f"  batch {batch:3} {'stream, overlapped':24} {1e3 * per_batch:.3f} ms  "
        f"{batch / per_batch:9.1f} FPS"
    )
    for name, value in parts["seconds"].items():
        print(f"    {name:8} {1e3 * value:.4f} ms, floor {1e3 * parts['floors'][name]:.4f} ms")
    engine.close()
    return {
        "batch": batch,
        "precision": precision,
        "picture": list(picture.shape),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "streamed": per_batch,
        "rates": asdict(rates),
        "stages": parts,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="yolov4", help="an architecture's name")
    parser.add_argument("--size", type=size, default=(416, 416), metavar="N|WxH")
    parser.add_argument("--picture", type=size, default=(640, 480), metavar="N|WxH")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each program")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)

    model = lively(open_model(arguments.model, size=arguments.size, random=True))
    picture = drawn_image(arguments.picture[1], arguments.picture[0])
    title = f"{arguments.model} {arguments.size[0]}x{arguments.size[1]} {arguments.precision}"
    print(f"{title}, {torch.cuda.get_device_name()}")
    record: dict[str, Any] = {"benchmark": title, "environment": environment(), "runs": []}
    for batch in arguments.batch:
        record["runs"].append(
            measure(
                model,
                arguments.precision,
                batch,
                not arguments.no_compile,
                arguments.seconds,
                picture,
            )
        )
        if arguments.output:  # after each: a run that is cut short keeps what it has
            with replacing(arguments.output) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
