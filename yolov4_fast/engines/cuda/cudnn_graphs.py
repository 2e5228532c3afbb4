"""Fused convolutions of cuDNN: convolution, bias, activation and residual as one kernel, which
cuDNN generates and compiles for the shapes, strides and types at hand.

A graph of operations describes it (nvidia-cudnn-frontend), and cuDNN offers several *plans* for the
graph: its engines in several tilings. A plan goes by cuDNN's own name, such as "eng4_k24=3", or
"eng4_k17=2_k24=8" with k17 parts of a sum, so that a choice may be kept.

Graphs can be built with no GPU, from a description of one (`DescribedGpu`).

Limits: no groups; no float32, of which the fused engines make TF32; tensors start at multiples of
16 bytes.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.cudnn_plans import PlanName, PlanStore, tilings
from yolov4_fast.engines.cuda.cudnn_problem import (
    BIAS,
    CONSTANTS,
    OUT,
    RESIDUAL,
    SOURCE,
    WEIGHT,
    Problem,
    cudnn_type,
    describe,
)

logger = logging.getLogger(__name__)

PACKAGE = "nvidia-cudnn-frontend"
ALIGNMENT = 16  # bytes, of every tensor: what a graph promises unless told otherwise
CANDIDATES = 6  # plans for a problem that are tried


def available() -> str | None:
    """None where graphs can be built, else why not and what to do."""
    if find_spec("cudnn") is None:
        return f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==1.18.0"
    try:
        import cudnn

        version = int(cudnn.backend_version())
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{PACKAGE} does not work here: {error}"
    if version < 91100:
        return f"{PACKAGE} found cuDNN {version}: 9.11 or newer is needed"
    return None


class DescribedGpu:
    """cuDNN building for a GPU that need not be here. Raises RuntimeError with what `available`
    says.

    properties: cuDNN's description of the GPU, in JSON. sm: compute capability x 10. processors:
    their number. versions: all that a compiled plan depends on.
    """

    def __init__(self, properties: str, *, name: str, sm: int, processors: int) -> None:
        reason = available()
        if reason is not None:
            raise RuntimeError(reason)
        import cudnn

        self._properties = properties
        self.name, self.sm, self.processors = name, sm, processors
        self.versions = f"{name} sm {sm}, cudnn {cudnn.backend_version()}"

    @property
    def properties(self) -> str:
        return self._properties

    def _target(self) -> dict[str, Any]:
        import cudnn

        return {"device_property": cudnn.create_device_properties(self.properties)}

    def graph(self, problem: Problem) -> Any:
        """The operations of a problem and cuDNN's suggestions for them, nothing compiled.

        Raises RuntimeError where it has none, ValueError for float32.
        """
        import cudnn

        if problem.dtype == torch.float32:
            raise ValueError("cuDNN's fused convolutions would make TF32 of float32")
        graph = cudnn.pygraph(
            name="fused_convolution",
            io_data_type=cudnn_type(problem.dtype),
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            **self._target(),
        )
        with _one_error(problem):
            describe(graph, problem)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A])
        graph.deselect_numeric_notes([cudnn.numerical_note.NONDETERMINISTIC])
        return graph

    def plan_names(self, problem: Problem) -> list[str]:
        """Plans worth a try, at most CANDIDATES, likely ones first: what cuDNN suggests, and other
        tilings that suit the size of the problem. Empty where cuDNN has none.

        Not all need compile, and none is known to be right: that is for the caller to find out.
        """
        try:
            graph = self.graph(problem)
        except (RuntimeError, ValueError) as error:
            logger.info("%s", error)
            return []
        suggested = _suggested(graph)
        parsed = [plan for plan in map(PlanName.parse, suggested) if plan is not None]
        others: list[PlanName] = []
        if parsed and str(parsed[0]) == suggested[0]:
            others = tilings(parsed, problem, sm=self.sm, processors=self.processors)
        names = [*suggested[:1], *map(str, others), *suggested[1:]]
        return list(dict.fromkeys(names))[:CANDIDATES]

    def execute(
        self, graph: Any, pointers: dict[int, int], constants: Iterable[int], workspace: int
    ) -> None:
        raise RuntimeError("a graph for a described GPU cannot be run")

    def load(self, data: bytes) -> Any:
        """A graph of `FusedConvolution.serialize`, ready to run; None where it cannot be taken."""
        return None


class Cudnn(DescribedGpu):
    """cuDNN on a GPU, where graphs run too."""

    def __init__(self, device: torch.device) -> None:
        found = torch.cuda.get_device_properties(device)
        super().__init__(
            "",
            name=found.name,
            sm=found.major * 10 + found.minor,
            processors=found.multi_processor_count,
        )
        import cudnn

        with torch.cuda.device(device):
            self._handle = int(cudnn.create_handle())
        weakref.finalize(self, cudnn.destroy_handle, self._handle).atexit = False
        self._device = device
        self._lock = threading.Lock()  # of the handle, which knows one stream at a time
        rows = torch.tensor(
            [[value] * (ALIGNMENT // 4) for value in CONSTANTS.values()], device=device
        )
        self._constants = dict(zip(CONSTANTS, rows, strict=True))

    @property
    def properties(self) -> str:
        import cudnn

        with torch.cuda.device(self._device):
            number = torch.cuda.current_device()
            return str(cudnn.create_device_properties(number).serialize())

    def _target(self) -> dict[str, Any]:
        return {"handle": self._handle}

    def execute(
        self, graph: Any, pointers: dict[int, int], constants: Iterable[int], workspace: int
    ) -> None:
        """Enqueue the graph's plan on the current stream of the device, which must be current.

        pointers: by the tensors' numbers. constants: numbers of those that the graph has.
        """
        import cudnn

        pointers |= {number: self._constants[number].data_ptr() for number in constants}
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with self._lock:
            cudnn.set_stream(handle=self._handle, stream=stream)
            graph.execute(pointers, workspace, handle=self._handle)

    def load(self, data: bytes) -> Any:
        import cudnn

        graph = cudnn.pygraph(handle=self._handle)
        try:
            with _one_error("a stored plan"):
                graph.deserialize(self._handle, list(data))
        except RuntimeError as error:
            logger.info("%s", error)
            return None
        return graph


class FusedConvolution:
    """One compiled plan. name: of `plan_names`. store: compiled plans are taken from it and
    added to it. Raises RuntimeError where it cannot be built, ValueError for an unknown name.

    workspace_bytes: of scratch memory that `run` needs.
    """

    def __init__(
        self, cudnn: DescribedGpu, problem: Problem, name: str, store: PlanStore | None = None
    ) -> None:
        self.problem = problem
        self.name = name
        self._cudnn = cudnn
        self._graph: Any = None
        data = None if store is None else store.read(cudnn.versions, problem, name)
        if data is not None:
            self._graph = cudnn.load(data)
        if self._graph is None:
            graph = cudnn.graph(problem)
            with _one_error(f"{problem}, {name}"):
                _build(graph, name)
            self._graph = graph
            if store is not None:
                store.write(cudnn.versions, problem, name, self.serialize())
        self.workspace_bytes = int(self._graph.get_workspace_size())

    def serialize(self) -> bytes:
        """The compiled plan, for this GPU and this cuDNN."""
        return bytes(self._graph.serialize())

    def run(
        self,
        source: Tensor,
        weight: Tensor,
        bias: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        workspace: Tensor | None = None,
        scales: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Enqueue on the current stream; the tensors are those that the problem describes.

        bias: [filters] float32. workspace: [workspace_bytes] uint8 or more. scales: float32
        tensors for the numbers of `problem.scales()`. Nothing is allocated and nothing waits, so
        it can be captured. Raises ValueError for a tensor that is missing or not aligned.
        """
        tensors = {SOURCE: source, WEIGHT: weight, BIAS: bias, OUT: out, **(scales or {})}
        if residual is not None:
            tensors[RESIDUAL] = residual
        expected = {SOURCE, WEIGHT, BIAS, OUT, *self.problem.scales()}
        if self.problem.residual_row is not None:
            expected.add(RESIDUAL)
        if set(tensors) != expected:
            raise ValueError(
                f"this convolution takes the tensors {sorted(expected)}, not {sorted(tensors)}"
            )
        pointers = {number: tensor.data_ptr() for number, tensor in tensors.items()}
        for number, pointer in pointers.items():
            if pointer % ALIGNMENT:
                raise ValueError(
                    f"tensor {number} of the convolution must start at a multiple of {ALIGNMENT} "
                    f"bytes, not {pointer % ALIGNMENT} past one"
                )
        if self.workspace_bytes and (workspace is None or workspace.nbytes < self.workspace_bytes):
            raise ValueError(
                f"{self.name} needs {self.workspace_bytes} bytes of workspace, not "
                f"{0 if workspace is None else workspace.nbytes}"
            )
        address = 0 if workspace is None else workspace.data_ptr()
        self._cudnn.execute(self._graph, pointers, self.problem.constants(), address)


def _build(graph: Any, name: str) -> None:
    """Compile the plan of a name: one that cuDNN suggests, or another setting of an engine."""
    import cudnn

    suggested = _suggested(graph)
    if name in suggested:
        index = suggested.index(name)
    else:
        plan = PlanName.parse(name)
        if plan is None:
            raise ValueError(f"{name!r} is not a plan of cuDNN: {', '.join(suggested)}")
        knobs = {cudnn.knob_type.KERNEL_CFG: plan.config}
        if plan.parts > 1:
            knobs[cudnn.knob_type.SPLIT_K_SLC] = plan.parts
        index = graph.get_execution_plan_count()
        graph.create_execution_plan(plan.engine, knobs)
    graph.build_plan_at_index(index)


@contextmanager
def _one_error(what: object) -> Iterator[None]:
    """cuDNN's errors, which have no ancestor but Exception and many lines, as a RuntimeError."""
    import cudnn

    try:
        yield
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(f"cuDNN cannot build {what}: {reason}") from None


def _suggested(graph: Any) -> list[str]:
    return [graph.get_plan_name_at_index(i) for i in range(graph.get_execution_plan_count())]
