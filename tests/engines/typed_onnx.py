"""What the tests of typed ONNX share: its types, looked at, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto

from yolov4_fast.engines.onnx_export import PRECISIONS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Run = Callable[[np.ndarray], list[np.ndarray]]


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of each tensor, by shape inference, which must agree with what is declared."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {value.name: value.data_type for value in graph.initializer}
    for value in chain(graph.input, graph.output, graph.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return found


def assert_typed(model: onnx.ModelProto, precision: str) -> None:
    """Valid; each operator takes its inputs in that opset; only casts touch another type."""
    onnx.checker.check_model(model, full_check=True)
    wanted, of = PRECISIONS[precision].onnx_type, types(model)
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)
    for node in model.graph.node:
        schema = onnx.defs.get_schema(node.op_type, model.opset_import[0].version, node.domain)
        allowed = {
            constraint.type_param_str: constraint.allowed_type_strs
            for constraint in schema.type_constraints
        }
        for formal, name in zip(schema.inputs, node.input, strict=False):
            if name and formal.type_str in allowed:
                kind = TensorProto.DataType.Name(of[name]).lower()
                assert f"tensor({kind})" in allowed[formal.type_str], (node.name, kind)
        if node.op_type not in ("Cast", "Identity") and node.name != "images.unit":
            assert {of[name] for name in node.output} == {wanted}, node.name
        if node.op_type == "Conv":
            assert {of[name] for name in node.input} == {wanted}, node.name


def runner(model: onnx.ModelProto, precision: str) -> Run:
    if precision == "bf16":
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model=model.SerializeToString()), "CPU")
        return lambda images: list(compiled([images]).to_tuple())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": images})
