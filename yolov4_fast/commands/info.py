"""`yolov4-fast info`: what is in a cfg, a checkpoint, an engine file or an architecture."""

from __future__ import annotations

import argparse
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov4_fast.commands.arguments import add_json, check_output, size, write_json

if TYPE_CHECKING:
    from yolov4_fast.network.layers import Network

ARENA_BATCHES = (1, 32)


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="describe a cfg, checkpoint, engine file or architecture",
        description="Input, layers, shapes, parameters, operations (GFLOPs: a multiplication and "
        "an addition are two), heads with their anchors, classes, and how many steps and how much "
        "memory for activations the cuda engine takes; of an engine file also how it was built.",
    )
    parser.add_argument(
        "model", metavar="X",
        help="a .cfg, a checkpoint (.safetensors), an engine file or the name of an architecture, "
        "such as yolov4",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=size, metavar="N|WxH",
        help="shapes and operations for this input size in pixels (default: X's own)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", action="store_true",
        help="list every layer with its inputs and output shape; of an engine file of TensorRT "
        "also the layers of its plan, as TensorRT's inspector tells them",
    )  # fmt: skip
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.checkpoint import is_checkpoint, read_checkpoint
    from yolov4_fast.engines.bundle import read_bundle
    from yolov4_fast.engines.tensorrt.inspector import LAYERS
    from yolov4_fast.model import open_network
    from yolov4_fast.network.layers import Conv

    check_output(arguments.json, arguments.model)
    facts: dict[str, Any] = {"model": arguments.model}
    plan_layers = None
    if zipfile.is_zipfile(arguments.model) or Path(arguments.model).suffix == ".engine":
        bundle = read_bundle(arguments.model)  # with its checksums, to call it sound
        manifest = bundle.manifest
        network = manifest.network
        plan_layers = bundle.payload.get(LAYERS)
        facts |= {
            "engine": manifest.kind,
            "precision": manifest.precision,
            "resize": manifest.resize,
            "max_batch": manifest.max_batch,
            "versions": dict(manifest.versions),
            "gpu": dict(manifest.gpu) if manifest.gpu else None,
            "classes": list(manifest.class_names),
        }
    elif is_checkpoint(arguments.model):
        checkpoint = read_checkpoint(arguments.model)
        network = checkpoint.network
        facts["classes"] = list(checkpoint.class_names)
        facts |= {k: checkpoint.metadata[k] for k in ("mAP50",) if k in checkpoint.metadata}
    else:
        network = open_network(arguments.model)
    if arguments.size:
        network = network.resized(*arguments.size)
    convolutions = [layer for _, layer in network.convolutions()]
    facts |= {
        "input": f"{network.width}x{network.height}",
        "layers": len(network.layers),
        "convolutions": len(convolutions),
        "activations": _counts(layer.activation for layer in convolutions),
        "parameters": network.parameters(),
        "gflops": round(network.operations() / 1e9, 3),
        "num_classes": network.num_classes,
        "heads": [
            {
                "stride": head.stride,
                "map": f"{network.width // head.stride}x{network.height // head.stride}",
                "anchors": [list(anchor) for anchor in head.anchors],
                "scale_x_y": head.scale_x_y,
                "nms": head.nms_kind,
            }
            for head in network.heads
        ],
        "cuda": _cuda(network),
    }
    _print(facts)
    if arguments.layers:
        rows = []
        for index, (layer, inputs, shape) in enumerate(
            zip(network.layers, network.input_shapes(), network.shapes(), strict=True)
        ):
            detail = (
                f"{layer.size}x{layer.size}/{layer.stride} {layer.activation}"
                + (" bn" if layer.batch_normalize else "")
                if isinstance(layer, Conv)
                else ""
            )
            rows.append(
                {
                    "index": index,
                    "layer": layer.name,
                    "detail": detail,
                    "inputs": list(layer.inputs),
                    "shape": list(shape),
                    "parameters": layer.parameters(*inputs),
                    "gflops": round(layer.operations(*inputs) / 1e9, 4),
                }
            )
        _print_layers(rows)
        facts["layer_list"] = rows
        if plan_layers is not None:
            facts["plan_layer_list"] = _plan_layers(plan_layers)
            _print_plan_layers(facts["plan_layer_list"])
    write_json(arguments.json, facts)
    return 0


def _counts(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _cuda(network: Network) -> dict[str, Any]:
    """Steps of the cuda engine's plan, and MB of its arena in half precision by batch size."""
    from yolov4_fast.engines.cuda.lower import lower
    from yolov4_fast.engines.cuda.place import place
    from yolov4_fast.network.fold import without_normalisation

    plan = lower(without_normalisation(network))
    placement = place(plan)
    arena = {str(batch): round(placement.bytes(batch, 2) / 1e6, 2) for batch in ARENA_BATCHES}
    return {"steps": len(plan.steps), "arena_mb": arena}


def _print(facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        if value is None:
            continue
        if key == "heads":
            for head in value:
                anchors = "  ".join(f"{w:g},{h:g}" for w, h in head["anchors"])
                print(
                    f"{'head':14}stride {head['stride']}, map {head['map']}, anchors {anchors}, "
                    f"scale_x_y {head['scale_x_y']:g}, nms {head['nms']}"
                )
            continue
        if key == "cuda":
            arena = ", ".join(
                f"{size:,.1f} MB at batch {batch}" for batch, size in value["arena_mb"].items()
            )
            value = f"{value['steps']} steps, activations in fp16 {arena}"
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {count}" for name, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{key:14}{value}")


def _print_layers(rows: list[dict[str, Any]]) -> None:
    print(f"{'':>4} {'layer':14}{'':22}{'inputs':>12}{'shape':>18}{'parameters':>13}{'gflops':>9}")
    for row in rows:
        inputs = ",".join("image" if i < 0 else str(i) for i in row["inputs"])
        shape = "x".join(map(str, row["shape"]))
        print(
            f"{row['index']:>4} {row['layer']:14}{row['detail']:22}{inputs:>12}{shape:>18}"
            f"{row['parameters']:>13,}{row['gflops']:>9.3f}"
        )


def _plan_layers(text: bytes) -> list[dict[str, Any]]:
    from yolov4_fast.engines.tensorrt.inspector import read_layers

    return [asdict(layer) for layer in read_layers(text)]


def _print_plan_layers(rows: list[dict[str, Any]]) -> None:
    print(f"{'':>4} {'in the plan':18}{'first output':34}of the network, and the kernel")
    for index, row in enumerate(rows):
        what = ", ".join(row["layers"]) or row["name"]
        kernel = f" | {row['tactic']}" if row["tactic"] else ""
        print(f"{index:>4} {row['kind']:18}{row['output']:34}{what}{kernel}")
