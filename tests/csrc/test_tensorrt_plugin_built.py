"""The plugin's library with its real kernels: how nvcc builds it, and what it finds on a GPU."""

import re
import subprocess

import pytest
import torch
from plugin_library import (
    GOOD,
    SHAPES,
    SOURCES,
    Library,
    attributes_of,
    compile_driver,
    compile_for_gpu,
    expected_of,
    maps_for,
    nvcc,
    small,
)

from yolov4_fast.engines.tensorrt.plugins import OUTPUTS, DetectionOutputs, detect_node
from yolov4_fast.network.architectures import yolov4, yolov4_csp


@pytest.mark.parametrize("architecture", [75, 90, 120])
def test_nothing_spills(tmp_path, architecture):
    options = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
    command = [nvcc(), *options, "-cubin", "-o", tmp_path / "out.cubin", SOURCES / "launch.cu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", run.stderr)
    assert len(spills) >= 8, run.stderr
    assert all(numbers == ("0", "0", "0") for numbers in spills), run.stderr


def test_the_library_needs_neither_torch_nor_tensorrt(tmp_path):
    path = compile_for_gpu(tmp_path, "sm_90")
    dynamic = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic.stdout)
    assert needed and not [name for name in needed if re.search("torch|nvinfer|cuda", name)]
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    )
    exported = re.findall(r" T (\w+)$", symbols.stdout, re.MULTILINE)
    assert {"getCreators", "setLoggerFinder"} == {name for name in exported if name[0] != "_"}
    library = Library(compile_driver(tmp_path), path)
    plugin = library.create(GOOD)
    assert plugin.configure(SHAPES) and plugin.workspace(SHAPES) > 0
    if torch.cuda.is_available():
        return
    outputs = [torch.zeros(1)] * 4
    maps = [torch.zeros(shape) for shape in SHAPES]
    assert not plugin.enqueue(maps, torch.zeros(1), outputs, 0)
    assert "YoloV4Detect: the kernels did not start: " in library.messages()


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    folder = tmp_path_factory.mktemp("plugin")
    return Library(compile_driver(folder), compile_for_gpu(folder, "native"))


def assert_close(actual, expected):
    """Boxes may differ in the last bit: the exponential of a GPU is not that of the CPU."""
    for name, a, b in zip(OUTPUTS, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if a.dtype == torch.float32:
            torch.testing.assert_close(a.cpu(), b, rtol=3e-7, atol=1e-7, msg=name)
        else:
            assert torch.equal(a.cpu(), b), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_finds_on_the_gpu_what_decode_and_nms_find(on_gpu, batch, dtype):
    for network, outputs in (
        (small(yolov4(80), 416, 416), DetectionOutputs(beta=0.6)),
        (small(yolov4_csp(3), 320, 192), DetectionOutputs(beta=1.0, max_detections=9)),
    ):
        maps = maps_for(network, batch, dtype)
        names = [f"map_{i}" for i in range(len(maps))]
        plugin = on_gpu.create(attributes_of(detect_node(network, outputs, names)))
        stream = torch.cuda.Stream()
        on_device = [raw.cuda() for raw in maps]
        torch.cuda.synchronize()
        found = [
            plugin.detect(on_device, outputs.max_detections, stream.cuda_stream) for _ in range(3)
        ]
        torch.cuda.synchronize()
        assert_close(found[0], expected_of(network, maps, outputs))
        for again in found[1:]:  # whatever the order of its threads
            assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@pytest.mark.gpu
def test_can_be_captured_in_a_graph(on_gpu):
    """So nothing waits for the host; replays see what the maps hold then."""
    network, outputs = small(yolov4(80), 416, 416), DetectionOutputs(beta=0.6)
    plugin = on_gpu.create(attributes_of(detect_node(network, outputs, "abc")))
    first, second = (maps_for(network, 2, seed=seed) for seed in (0, 1))
    maps = [raw.cuda() for raw in first]
    workspace = torch.empty(
        plugin.workspace([tuple(raw.shape) for raw in maps]), dtype=torch.uint8, device="cuda"
    )
    found = [part.cuda() for part in expected_of(network, first, outputs)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        assert plugin.enqueue(maps, workspace, found, stream), on_gpu.messages()
    for raw, new in zip(maps, second, strict=True):
        raw.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(found, expected_of(network, second, outputs))
