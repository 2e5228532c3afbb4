"""What TensorRT's inspector says of a plan's layers, read from its JSON.

With detailed verbosity a layer is an object of many keys, some of which are of one TensorRT version
only; else it is its name alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from yolov4_fast.engines.engine import EngineError

LAYERS = "layers.json"  # member of the engine file


@dataclass(frozen=True)
class PlanLayer:
    """One layer of a plan, often several of the network in one kernel. What the plan does not tell
    is empty.
    """

    name: str
    kind: str  # "CaskConvolution", "Reformat", "kgen", ...
    output: str  # sides, type and layout of its first output
    tactic: str  # the kernel
    layers: tuple[str, ...]  # of the network that it computes: "layer_12", of nodes of the ONNX


def read_layers(text: bytes | str) -> list[PlanLayer]:
    """The layers in the order in which they run. Raises EngineError."""
    try:
        return [_layer(entry) for entry in json.loads(text)["Layers"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EngineError(f"{LAYERS} is not what TensorRT's inspector writes") from None


def _layer(entry: Any) -> PlanLayer:
    if isinstance(entry, str):
        return PlanLayer(entry, "", "", "", ())
    outputs = entry.get("Outputs") or [{}]
    nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", entry.get("Metadata", ""))
    return PlanLayer(
        name=str(entry["Name"]),
        kind=str(entry.get("LayerType", "")),
        output=_tensor(outputs[0]),
        tactic=str(entry.get("TacticName", "")),
        layers=tuple(dict.fromkeys(node.partition(".")[0] for node in nodes)),
    )


def _tensor(entry: Any) -> str:
    sides = "x".join(map(str, entry.get("Dimensions", ())))
    words = (entry.get(key, "") for key in ("Format/Datatype", "Datatype", "Format"))
    return " ".join(filter(None, (sides, *words)))
