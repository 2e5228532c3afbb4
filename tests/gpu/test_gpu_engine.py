"""The CUDA engine on a GPU: every kernel that may be chosen and every step of a network against
float32, maps like the module's, graphs, streams, files. Kernels that were chosen are kept in the
user's cache, for what runs after these tests.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from yolov4_fast.engines import build_engine, load_engine
from yolov4_fast.engines.build import default_engine
from yolov4_fast.engines.cuda.autotune import KernelWarning
from yolov4_fast.engines.cuda.compilation import compile_ahead
from yolov4_fast.engines.cuda.cudnn_graphs import available
from yolov4_fast.engines.cuda.device import Gpu
from yolov4_fast.engines.cuda.engine import ASIDE, CudaEngine
from yolov4_fast.engines.cuda.fp8 import quantise_weights, run_quantised
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.memory import NAN_BYTE
from yolov4_fast.engines.cuda.reference import reference_kernel, run_reference
from yolov4_fast.engines.cuda.trial import ROUNDING, StepTrial
from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.model import Model, open_model
from yolov4_fast.network.fold import fold
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops.full_precision import full_precision
from yolov4_fast.sources import read_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = {"f32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def no_kernel_disagrees() -> Iterator[None]:
    """A kernel that computes something else is excluded with a warning: here it is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        yield


def build(model: object, precision: str, max_batch: int, **settings: object) -> CudaEngine:
    network, state, names = (
        (model.network, model.state, model.class_names) if isinstance(model, Model) else model
    )
    engine = build_engine(
        network, state, names, engine="cuda", precision=precision, max_batch=max_batch, **settings
    )
    assert isinstance(engine, CudaEngine)
    return engine


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Smooth coloured blocks with some noise, as random weights were made for."""
    generator = torch.Generator().manual_seed(batch)
    blocks = torch.rand(batch, 3, 8, 8, generator=generator)
    noise = 0.1 * torch.rand(batch, 3, height, width, generator=generator)
    return 0.9 * torch.nn.functional.interpolate(blocks, size=(height, width)) + noise


def truth(model: object, images: Tensor) -> tuple[Tensor, ...]:
    """Of the module in float32 on the GPU."""
    network, state = (model.network, model.state) if isinstance(model, Model) else model[:2]
    folded, weights = fold(network, state)
    module = NetworkModule(folded).eval()
    module.load_state_dict(weights)
    with torch.inference_mode(), full_precision():
        return tuple(raw.cpu() for raw in module.cuda()(images.cuda()))


def assert_near(maps: tuple[Tensor, ...], model: object, images: Tensor, precision: str) -> None:
    """Through random weights rounding grows from layer to layer, in yolov4 to 6 % of the largest
    value in fp16; so the measure is what one rounding a step makes, in the reference executor.
    """
    network, state = (model.network, model.state) if isinstance(model, Model) else model[:2]
    folded, weights = fold(network, state)
    expected = truth(model, images)
    rounded = run_reference(lower(folded), weights, images.cuda(), DTYPES[precision])
    for ours, theirs, exact in zip(maps, rounded, expected, strict=True):
        assert worst((ours,), (exact,)) < max(1e-4, 3 * worst((theirs,), (exact,)))


def worst(maps: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    assert all(bool(torch.isfinite(raw).all()) for raw in maps)
    return max(
        ((ours.cpu() - theirs).abs().max() / theirs.abs().max()).item()
        for ours, theirs in zip(maps, expected, strict=True)
    )


def test_it_is_the_default(mini) -> None:
    assert default_engine() == "cuda"
    with build_engine(*mini, max_batch=4) as engine:
        assert (engine.kind, engine.precision) == ("cuda", "fp16")
        assert engine.device == torch.device("cuda", torch.cuda.current_device())


def test_the_device() -> None:
    gpu = Gpu()
    found = gpu.properties
    assert found.name == torch.cuda.get_device_name() and found.sm >= 75
    assert found.processors > 0 and found.driver != "unknown"
    assert 0 < gpu.free_memory() <= found.memory
    x = torch.rand(4096, 4096, device="cuda")
    out = torch.empty_like(x)
    small, large = (gpu.seconds(lambda n=n: torch.mm(x[:n], x, out=out[:n])) for n in (64, 4096))
    assert 0 < small < large < 1.0
    out.zero_()
    replay = gpu.capture(lambda: out.add_(1))
    replay()
    replay()
    gpu.synchronize()
    assert float(out[0, 0]) == 3.0  # the first was outside of the graph
    with pytest.raises(DeviceError, match="there is no cuda:99 here, but cuda:0"):
        Gpu("cuda:99")


@pytest.mark.parametrize("precision", list(DTYPES))
def test_a_small_network(mini, precision: str) -> None:
    """At batches that kernels were chosen for, 1 and 4, and one that takes the nearest choice."""
    with build(mini, precision, 4) as engine:
        for batch in (1, 3, 4):
            images = pictures(batch, 128, 160)
            engine.executor(batch)
            engine._storage.fill_(NAN_BYTE)
            maps = engine.run(images.cuda())
            assert all(raw.dtype == torch.float32 and raw.is_cuda for raw in maps)
            assert_near(maps, mini, images, precision)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov4", "yolov4-tiny"])
def test_official_architectures(name: str) -> None:
    model = open_model(name, size=(416, 416), random=True)
    images = pictures(1, 416, 416)
    with build(model, "fp16", 1) as engine:
        assert_near(engine.run(images.cuda()), model, images, "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_kernel_of_every_step(mini, precision: str) -> None:
    """All candidates, the losers too, at a batch that is no power of two."""
    with build(mini, precision, 4) as engine:
        kernels = engine._kernels
        steps = engine._keys(3)
        compile_ahead(kernels, [(step, 3) for step in steps.values()], 8)
        for key, step in steps.items():
            trial = StepTrial(kernels, step, key.batch)
            for name in trial.names:
                try:
                    run = trial.make(name)
                except torch.AcceleratorError:
                    raise
                except Exception:  # one that cannot run here, as tuning would find
                    continue
                assert trial.problem(run) is None, f"{name} on {key.shape}"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_step_in_its_place(mini, precision: str) -> None:
    """Step by step in the arena, each against its definition on what the steps before it left."""
    with build(mini, precision, 4) as engine, engine.exclusive():
        executor = engine.executor(2)
        engine._storage.fill_(NAN_BYTE)
        executor.image.copy_(pictures(2, 128, 160).permute(0, 2, 3, 1))
        for step, kernel, run in executor.steps:
            exact = {view: executor.tensor(view).clone() for view in step.reads}
            exact |= {view: executor.tensor(view).float() for view in step.writes}
            run()
            reference_kernel(step, exact.__getitem__, engine.weights)()
            for view in step.writes:
                off = (executor.tensor(view).float() - exact[view]).abs().max()
                allowed = 4 * ROUNDING[DTYPES[precision]] * exact[view].abs().max()
                assert bool(off <= allowed), f"{step.layers} by {kernel}: off by {off}"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="FP8 needs sm_90",
)
def test_fp8(mini, darknet_reference: Path) -> None:
    if reason := available():
        pytest.skip(reason)
    seen = [torch.from_numpy(read_image(darknet_reference / f"{n}.png")) for n in ("tall", "wide")]
    with build(mini, "fp8", 4, calibration=seen) as engine:
        scales, (_, state) = engine._types.scales, fold(mini.network, mini.state)
        weights = quantise_weights(engine.plan, state, scales, "cuda")
        for batch in (1, 3, 4):
            images = pictures(batch, 128, 160).cuda()
            expected = run_quantised(engine.plan, weights, scales, images)
            for ours, theirs in zip(engine.run(images), expected, strict=True):
                off = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt()
                # Sums in another order tip a value to the next e4m3 now and then.
                assert off < 0.1
        kernels = {bound.kernel.split()[0] for bound in engine.executor(4).steps}
        assert "cudnn" in kernels


def test_a_graph_is_what_it_was_captured_from(mini) -> None:
    images = pictures(3, 128, 160).permute(0, 2, 3, 1).cuda()
    with build(mini, "fp16", 4) as engine, engine.exclusive():
        executor = engine.executor(3)
        results = []
        for run in (executor.run, executor.captured(), executor.captured()):
            executor.image.copy_(images)
            run()
            results.append([raw.clone() for raw in executor.maps])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_results_do_not_change_from_run_to_run(mini) -> None:
    images = pictures(4, 128, 160).cuda()
    with build(mini, "fp16", 4) as engine:
        expected = engine.run(images)
        for _ in range(20):
            assert all(map(torch.equal, engine.run(images), expected))


def test_threads_on_streams_of_their_own(mini) -> None:
    """They share the arena: each waits on the device for the one before."""
    images = [pictures(4, 128, 160)[i : i + 1].cuda() for i in range(4)]
    failures: list[BaseException] = []
    with build(mini, "fp16", 4) as engine:
        expected = [engine.run(image) for image in images]
        torch.cuda.synchronize()

        def work(number: int) -> None:
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    for turn in range(50):
                        index = (number + turn) % 4
                        maps = engine.run(images[index])
                        assert all(map(torch.equal, maps, expected[index]))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures


def test_a_file_starts_without_measuring(
    mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    path = tmp_path / "mini.engine"
    images = pictures(3, 128, 160).cuda()
    with build(mini, "fp16", 4, path=path) as engine:
        expected = engine.run(images)

    def refuse(self: Gpu, run: object) -> float:
        pytest.fail("nothing should be measured")

    monkeypatch.setattr(Gpu, "seconds", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    started = time.perf_counter()
    with load_engine(path) as loaded:
        assert all(map(torch.equal, loaded.run(images), expected))
    assert time.perf_counter() - started < 60


def test_memory_is_what_was_said(mini) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with build(mini, "fp16", 4) as engine:
        engine.run(pictures(4, 128, 160).cuda())
        arena = engine._storage.numel()
        assert arena == engine._types.bytes(4)
        assert arena <= torch.cuda.memory_allocated() - before < arena + ASIDE + 10**7
    with pytest.raises(DeviceError, match=r"needs [\d,]+ MB at batch 1000000.*would fit"):
        build(mini, "fp16", 10**6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu(mini) -> None:
    images = pictures(2, 128, 160)
    with build(mini, "fp16", 2, device="cuda:1") as engine:
        assert engine.device == torch.device("cuda:1")
        maps = engine.run(images.to("cuda:1"))
        assert all(raw.device == torch.device("cuda:1") for raw in maps)
        assert_near(maps, mini, images, "fp16")
