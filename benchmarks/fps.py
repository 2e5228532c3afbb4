"""FPS of `detect` end to end beside its peers, one picture at a time, in one run on this machine.

    python -m benchmarks.fps --model yolov4 --size 416

Every program runs the same network with the same (random) weights on the same 1280x720 picture.
`bare OpenVINO` runs our ONNX at the engine's precision on a picture that is resized already and
reads nothing of the result: what is left between it and `detect` is all our own. OpenCV and PyTorch
are timed on the network alone too, which flatters them. Before anything is timed, the raw maps of
all are held against PyTorch's in float32: those in float32 to 1e-3 of the range, those in bfloat16
to twice what PyTorch itself loses to bfloat16, which on random weights is much.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import openvino as ov
import torch
from torch import Tensor

from benchmarks.harness import compare, environment, report
from yolov4_fast import Detector, build_engine
from yolov4_fast.commands.arguments import size
from yolov4_fast.commands.benchmark import drawn_image
from yolov4_fast.darknet.cfg import write_cfg
from yolov4_fast.darknet.weights import write_weights
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.files import replacing
from yolov4_fast.model import Model, open_model
from yolov4_fast.network.fold import fold

Runner = Callable[[], Sequence[np.ndarray]]


def bare_openvino(model: Model, images: Tensor, precision: str) -> Runner:
    """The ONNX in OpenVINO with its latency hint, compiled for exactly this batch."""
    core = ov.Core()
    network = core.read_model(export_onnx(model.network, model.state).SerializeToString())
    network.reshape(list(images.shape))
    compiled = core.compile_model(
        network, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    )
    request, blob = compiled.create_infer_request(), images.numpy()

    def run() -> list[np.ndarray]:
        request.infer([blob], share_inputs=True, share_outputs=True)
        return [request.get_output_tensor(i).data for i in range(len(compiled.outputs))]

    return run


def opencv_dnn(model: Model, images: Tensor) -> Runner:
    """OpenCV's Darknet importer on the cfg and weights that we write.

    Normalisation is folded first: OpenCV would add 1e-6 to the variances where Darknet adds 1e-5.
    """
    folded, state = fold(model.network, model.state)
    with tempfile.TemporaryDirectory() as folder:
        cfg, weights = Path(folder, "model.cfg"), Path(folder, "model.weights")
        cfg.write_text(write_cfg(folded))
        write_weights(weights, folded, state)
        network = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    blob = images.numpy()
    names = [f"conv_{head.inputs[0]}" for head in model.network.heads]

    def run() -> Sequence[np.ndarray]:
        network.setInput(blob)
        return network.forward(names)

    return run


def pytorch(model: Model, images: Tensor, precision: str) -> Runner:
    """Our folded torch module, channels-last, in inference mode."""
    engine = build_engine(
        model.network, model.state, model.class_names, engine="torch", precision=precision
    )
    return lambda: [raw.numpy() for raw in engine.run(images)]


def disagreement(maps: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Largest difference, as a share of the largest value of the reference map."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(maps, reference, strict=True)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="yolov4", help="an architecture's name")
    parser.add_argument("--size", type=size, default=(416, 416), metavar="N|WxH")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each program")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)

    model = open_model(arguments.model, size=arguments.size, random=True)
    engine = build_engine(model.network, model.state, model.class_names, max_batch=1)
    detector = Detector(engine)
    picture = drawn_image(720, 1280)
    images = detector.preprocess([torch.from_numpy(picture)]).images

    peers: dict[str, Runner] = {
        f"bare OpenVINO {engine.precision}": bare_openvino(model, images, engine.precision),
        "OpenCV DNN f32": opencv_dnn(model, images),
        "PyTorch f32": pytorch(model, images, "f32"),
        "PyTorch bf16": pytorch(model, images, "bf16"),
    }
    reference = [raw.copy() for raw in peers["PyTorch f32"]()]
    rounding = disagreement(peers["PyTorch bf16"](), reference)
    for name, run in peers.items():
        difference, limit = disagreement(run(), reference), 1e-3 if "f32" in name else 2 * rounding
        print(f"{name}: maps differ from PyTorch f32 by {difference:.1e} of their range")
        if not difference <= limit:
            raise SystemExit(f"{name} does not compute the same network: no time is shown")

    ours = f"detect, {engine.kind} {engine.precision}"
    timings = compare({ours: lambda: detector.detect(picture), **peers}, seconds=arguments.seconds)
    results: dict[str, object] = {
        f"{name} / ours": timing.median / timings[ours].median
        for name, timing in timings.items()
        if name != ours
    }
    results["FPS of ours"] = 1 / timings[ours].median
    title = f"{arguments.model} {arguments.size[0]}x{arguments.size[1]}, one 1280x720 picture"
    report(title, timings, results)
    if arguments.output:
        record = {
            "benchmark": title,
            "environment": environment(),
            "timings": {name: asdict(timing) for name, timing in timings.items()},
            "results": results,
        }
        with replacing(arguments.output) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
