"""INT8 in OpenVINO: what it costs in AP, method by method, and what it gains in speed.

    python -m benchmarks.quantization accuracy my.safetensors --data runs/more-scenes
    python -m benchmarks.quantization speed yolov4 --size 416

accuracy: finds the scales with training images (as `yolov4-fast build --calibrate` does), then AP
on those to evaluate on, at a confidence of 0.001, for float32, bfloat16 and each way to INT8; and
how far ONNX Runtime finds the same in the Q/DQ ONNX as OpenVINO does. `--other NAME=FILE` measures
a Q/DQ ONNX of another quantiser beside them. speed: one image at a time, in turn within one run;
the weights are random, for speed does not depend on them; with the heads alone in higher precision,
and with as much as a build ever keeps there. Tables for people, one JSON line for
programs.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import openvino as ov
import torch
from torch import Tensor

from benchmarks.agreement import Agreement, agreement
from benchmarks.harness import compare, environment, report
from yolov4_fast import Detector, ops
from yolov4_fast.commands.arguments import size
from yolov4_fast.commands.calibration import open_calibration
from yolov4_fast.datasets import Dataset
from yolov4_fast.engines.engine import Engine, Manifest
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.engines.openvino_engine import MODEL, OpenVinoEngine
from yolov4_fast.engines.quantize import METHODS, Quantised, quantize
from yolov4_fast.engines.quantize.insert import quantised_model
from yolov4_fast.engines.quantize.regions import head_convolutions
from yolov4_fast.engines.quantize.sensitivity import SHARE
from yolov4_fast.evaluation import evaluate
from yolov4_fast.files import replacing
from yolov4_fast.model import Model, open_model
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import Network

MAX_BATCH = 4


class OnnxRuntimeEngine(Engine):
    """An ONNX in ONNX Runtime on the CPU, as an engine: another opinion on what a file means."""

    kind = "openvino"  # what the manifest allows: it decides nothing here
    precisions = ("int8",)
    members = (MODEL,)

    def __init__(
        self, manifest: Manifest, payload: Mapping[str, bytes], device: str | None = None
    ) -> None:
        self.manifest = manifest
        self.device = torch.device("cpu")
        self._session = onnxruntime.InferenceSession(payload[MODEL])

    @staticmethod
    def default_precision() -> str:
        return "int8"

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, self._session.run(None, {"images": images.numpy()})))

    def close(self) -> None:
        pass


class AroundFloat32(OpenVinoEngine):
    """With float32 for what is not in INT8, as ONNX Runtime computes it."""

    @staticmethod
    def default_precision() -> str:
        return "f32"


def manifest(model: Model, precision: str) -> Manifest:
    return Manifest(
        kind="openvino",
        network=fold(model.network, model.state)[0],
        class_names=model.class_names,
        resize="stretch",
        precision=precision,
        max_batch=MAX_BATCH,
    )


def engine(model: Model, precision: str, graph: onnx.ModelProto | None = None) -> OpenVinoEngine:
    """Of the float network, or of a Q/DQ graph of it."""
    graph = graph or export_onnx(model.network, model.state)
    return OpenVinoEngine(manifest(model, precision), {MODEL: graph.SerializeToString()})


def average_precision(made: Engine, dataset: Dataset) -> dict[str, float]:
    with made:
        found = evaluate(Detector(made), dataset, metric="coco", progress=False)
    assert found.AP is not None
    return {"mAP50": found.mAP50, "AP": found.AP}


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    model = open_model(options.model)
    calibration = open_calibration(options.data)
    if calibration.dataset is None:
        raise SystemExit(f"{options.data} has no annotations: AP needs some")
    dataset, network = calibration.dataset, model.network
    images = [
        ops.resize([image], network.height, network.width, "stretch")
        for image in calibration.images()
    ]
    rows: dict[str, dict[str, float]] = {
        name: average_precision(engine(model, name), dataset) for name in ("f32", "bf16")
    }
    print(f"{len(dataset)} images, {len(images)} to calibrate with\n{'':<26} mAP50    AP")

    def add(name: str, graph: onnx.ModelProto) -> None:
        row = average_precision(engine(model, "int8", graph), dataset)
        rows[name] = row
        loss = [rows["f32"][key] - row[key] for key in ("mAP50", "AP")]
        told = f"{row['mAP50']:.4f} {row['AP']:.4f}, a loss of {loss[0]:+.4f} {loss[1]:+.4f}"
        print(f"{name:<26} {told}", flush=True)

    for name in ("f32", "bf16"):
        print(f"{name:<26} {rows[name]['mAP50']:.4f} {rows[name]['AP']:.4f}")
    start = time.perf_counter()
    best = quantize(network, model.state, images)
    seconds = time.perf_counter() - start
    add(f"int8 as built ({best.method})", best.model)
    for method in METHODS:
        add(f"{method}, heads kept", _variant(model, images, method).model)
    add("all in int8", _all_in_int8(model, best))
    for name, path in (each.split("=", 1) for each in options.other):
        add(name, onnx.load(path))
    same = _same_in_onnx_runtime(model, best.model, dataset)
    for name, each in same.items():
        print(f"ONNX Runtime of what OpenVINO, {name}, finds over 0.3: {each}")
    if options.figure:
        draw(best, options.figure)
    result = {
        "model": options.model,
        "data": options.data,
        "images": len(dataset),
        "calibration_images": len(images),
        "seconds": seconds,
        "method": best.method,
        "kept": sorted(best.kept),
        "sensitivity": {str(layer): value for layer, value in best.sensitivity.items()},
        "ap": rows,
        "onnxruntime": {name: asdict(each) for name, each in same.items()},
    }
    print(json.dumps(result))
    return result


def _variant(model: Model, images: Sequence[Tensor], method: str) -> Quantised:
    return quantize(model.network, model.state, images, method=method, keep=())


def _all_in_int8(model: Model, best: Quantised) -> onnx.ModelProto:
    """With the scales of what was built, the heads too."""
    network, state = fold(model.network, model.state)
    every = [index for index, _ in network.convolutions()]
    return quantised_model(network, state, best.scales, every, "f32")


def _same_in_onnx_runtime(
    model: Model, graph: onnx.ModelProto, dataset: Dataset
) -> dict[str, Agreement]:
    """Of the boxes that OpenVINO finds, with either type around INT8, those of ONNX Runtime."""
    paths = [dataset.image_path(index) for index in range(len(dataset))]
    payload = {MODEL: graph.SerializeToString()}
    theirs, single, ours = (
        Detector(kind(manifest(model, "int8"), payload), confidence=0.05).detect(paths)
        for kind in (OnnxRuntimeEngine, AroundFloat32, OpenVinoEngine)
    )
    found = {"f32 around": single, f"{OpenVinoEngine.default_precision()} around": ours}
    return {name: agreement(each, theirs, overlap=0.9) for name, each in found.items()}


def draw(best: Quantised, path: Path) -> None:
    """Sensitivity by convolution."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    layers = list(best.sensitivity)
    colours = ["tab:red" if layer in best.kept else "tab:blue" for layer in layers]
    axes.bar(layers, [best.sensitivity[layer] for layer in layers], color=colours)
    axes.set(xlabel="layer (red: kept in higher precision)", ylabel="distance in INT8 alone")
    figure.savefig(path, dpi=110)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    model = open_model(options.model, size=options.size, random=True)
    torch.manual_seed(0)
    images = [torch.rand(1, 3, model.network.height, model.network.width) for _ in range(2)]
    network, _ = fold(model.network, model.state)
    engines = {name: engine(model, name) for name in ("f32", "bf16")}
    for name, keep in (("int8", ()), ("int8, most kept", _most_kept(network))):
        graph = quantize(model.network, model.state, images, method="minmax", keep=keep).model
        engines[name] = engine(model, "int8", graph)
    kinds = ran_in(engines["int8"])
    calls: dict[str, Callable[[], object]] = {
        name: lambda made=made: made.run(images[0]) for name, made in engines.items()
    }
    timings = compare(calls, seconds=options.seconds)
    results: dict[str, object] = {
        "bf16 / int8, median": timings["bf16"].median / timings["int8"].median,
        "bf16 / int8, minimum": timings["bf16"].minimum / timings["int8"].minimum,
        "bf16 / int8, most kept, median": timings["bf16"].median
        / timings["int8, most kept"].median,
        "f32 / int8, median": timings["f32"].median / timings["int8"].median,
        "FPS of int8": 1 / timings["int8"].median,
        "convolutions in int8": sum(n for name, n in kinds.items() if "8" in name),
        "convolutions": sum(kinds.values()),
        "heads kept": len(head_convolutions(network)),
    }
    title = f"{options.model} {model.network.width}x{model.network.height}, one image, openvino"
    report(title, timings, results)
    times = {name: asdict(timing) for name, timing in timings.items()}
    return {"benchmark": title, "timings": times, "results": results}


def _most_kept(network: Network) -> tuple[int, ...]:
    """The first convolutions, as many as a build ever keeps in higher precision: those of the
    largest maps cost most there.
    """
    shapes = network.input_shapes()
    work = {index: layer.operations(*shapes[index]) for index, layer in network.convolutions()}
    done = accumulate(work.values())
    return tuple(
        index
        for index, sofar in zip(work, done, strict=True)
        if sofar <= SHARE * sum(work.values())
    )


def ran_in(made: OpenVinoEngine) -> Counter[str]:
    """Convolutions by the type of what they read, as the compiled model tells."""
    kinds: Counter[str] = Counter()
    compiled: ov.CompiledModel = made._single.model
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) == "Convolution":
            kinds[facts["runtimePrecision"].astype(str)] += 1
    return kinds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("accuracy")
    first.add_argument("model", help="as `yolov4-fast build` takes it")
    first.add_argument("--data", required=True, help="a data set, as `yolov4-fast val` takes it")
    first.add_argument("--other", action="append", default=[], metavar="NAME=FILE")
    first.add_argument("--figure", type=Path, help="a PNG of the sensitivities")
    first.set_defaults(run=accuracy)
    second = commands.add_parser("speed")
    second.add_argument("model", nargs="?", default="yolov4", help="an architecture's name")
    second.add_argument("--size", type=size, default=(416, 416), metavar="N|WxH")
    second.add_argument("--seconds", type=float, default=8.0, help="for each precision")
    second.set_defaults(run=speed)
    for each in (first, second):
        each.add_argument("--output", type=Path, help="a file for the JSON")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="yolov4_fast.datasets")
    result = options.run(options) | {"environment": environment() | {"openvino": ov.__version__}}
    if options.output:
        with replacing(options.output) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
