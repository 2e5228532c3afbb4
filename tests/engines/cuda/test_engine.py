"""The engine whole, on the CPU in place of a GPU: the same maps as the module's, one arena for all
batch sizes, kernels chosen once, and a file that brings them along.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from yolov4_fast.engines import EngineError, EngineFileError, build_engine, load_engine
from yolov4_fast.engines.bundle import read_bundle, write_bundle
from yolov4_fast.engines.cuda.choices import Choices
from yolov4_fast.engines.cuda.device import Run
from yolov4_fast.engines.cuda.engine import CudaEngine
from yolov4_fast.engines.cuda.fp8 import FP8, Scales, quantise_weights, run_quantised
from yolov4_fast.engines.cuda.members import TUNING
from yolov4_fast.engines.cuda.memory import NAN_BYTE
from yolov4_fast.engines.cuda.reference import reference_kernel
from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import (
    ACTIVATIONS,
    IMAGE,
    Conv,
    Head,
    Layer,
    MaxPool,
    Network,
    Route,
    Sam,
    Shortcut,
    Upsample,
)
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops.resize import resize
from yolov4_fast.sources import read_image

Build = Callable[..., CudaEngine]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 128, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(mini, images: Tensor) -> tuple[Tensor, ...]:
    module = NetworkModule(mini.network).eval()
    module.load_state_dict(mini.state, strict=False)
    with torch.inference_mode():
        return module(images)


@pytest.fixture
def build(mini, cpu_device, tuning_folder: Path) -> Build:
    """build(precision="f32", max_batch=4, on CpuDevice(...), ...)"""

    def engine(device: object = None, **settings: object) -> CudaEngine:
        values = {"precision": "f32", "max_batch": 4} | settings
        built = build_engine(*mini, engine="cuda", device=device or cpu_device(), **values)
        assert isinstance(built, CudaEngine)
        return built

    return engine


def worst(maps: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference relative to the largest value of each map; NaN counts."""
    assert all(bool(torch.isfinite(raw).all()) for raw in maps)
    return max(
        ((ours - theirs).abs().max() / theirs.abs().max()).item()
        for ours, theirs in zip(maps, expected, strict=True)
    )


def first(maps: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    return tuple(raw[:batch] for raw in maps)


def refuse(run: Run) -> float:
    pytest.fail("nothing should be measured")


def test_agrees_with_the_module(build: Build, images: Tensor, expected: tuple[Tensor, ...]) -> None:
    engine = build()
    for batch in (4, 1, 3, 2, 1):
        engine._storage.fill_(NAN_BYTE)
        maps = engine.run(images[:batch])
        assert [raw.shape for raw in maps] == [raw.shape for raw in first(expected, batch)]
        assert all(raw.dtype == torch.float32 and raw.is_contiguous() for raw in maps)
        assert worst(maps, first(expected, batch)) < 1e-5


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp16", 1e-5, 5e-3), ("bf16", 1e-4, 5e-2)]
)
def test_half_precision_is_near(
    build: Build, images: Tensor, expected: tuple[Tensor, ...],
    precision: str, least: float, most: float,
) -> None:  # fmt: skip
    engine = build(precision=precision)
    assert (
        engine.executor(1).image.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    )
    # 11 and 8 bits of mantissa through 20 layers; and not less off than rounding makes it.
    assert least < worst(engine.run(images[:2]), first(expected, 2)) < most


def test_fp32_is_f32_and_fp16_the_default(build: Build) -> None:
    assert build(precision="fp32").precision == "f32"
    assert build(precision=None).precision == "fp16"


def test_one_graph_a_batch_size(build: Build, cpu_device, images: Tensor) -> None:
    device = cpu_device()
    engine = build(device)
    for batch in (1, 1, 2, 2, 1):
        engine.run(images[:batch])
    assert device.captured == 2


def test_maps_survive_later_runs(build: Build, images: Tensor) -> None:
    engine = build()
    maps = engine.run(images[:1])
    before = [raw.clone() for raw in maps]
    engine.run(images[1:2])
    engine.run(images[:4])
    assert all(torch.equal(raw, old) for raw, old in zip(maps, before, strict=True))


def test_input_may_have_any_strides(build: Build, images: Tensor) -> None:
    engine = build()
    plain = engine.run(images[:2])
    for given in (
        images[:2].to(memory_format=torch.channels_last),
        torch.stack((images[:2], images[:2]), -1)[..., 0],
    ):
        assert worst(engine.run(given), plain) == 0


def test_threads_share_an_engine(build: Build, images: Tensor) -> None:
    engine = build()
    expected = [engine.run(images[index : index + 1]) for index in range(4)]
    pair = engine.run(images[:2])

    def run(number: int) -> float:
        if number % 5 == 4:
            return worst(engine.run(images[:2]), pair)
        index = number % 4
        return worst(engine.run(images[index : index + 1]), expected[index])

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(20))) == 0


def test_executors_share_one_storage(build: Build) -> None:
    engine = build()
    storage = engine._storage
    for batch in (1, 3, 4):
        executor = engine.executor(batch)
        assert executor.batch == batch and executor is engine.executor(batch)
        assert executor.image.shape == (batch, 128, 160, 3)
        heads = engine.network.heads
        assert [raw.shape for raw in executor.maps] == [
            (batch, 128 // head.stride, 160 // head.stride, head.channels) for head in heads
        ]
        for tensor in (executor.image, *executor.maps):
            assert tensor.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()


def test_an_executor_tells_its_steps(build: Build, images: Tensor) -> None:
    engine = build()
    executor = engine.executor(2)
    assert [bound.step for bound in executor.steps] == list(engine.plan.steps)
    assert {bound.kernel for bound in executor.steps} == {"torch"}
    executor.image.copy_(images[:2].permute(0, 2, 3, 1))
    for step, _, run in executor.steps:
        exact = {view: executor.tensor(view).clone() for view in step.reads}
        exact |= {view: torch.empty_like(executor.tensor(view)) for view in step.writes}
        reference_kernel(step, exact.__getitem__, engine.weights)()
        run()
        for view in step.writes:
            assert torch.allclose(executor.tensor(view), exact[view], rtol=1e-4, atol=1e-5)
        assert engine.seconds(run) > 0


def test_an_executor_is_the_network(
    build: Build, images: Tensor, expected: tuple[Tensor, ...]
) -> None:
    engine = build()
    with engine.exclusive():
        executor = engine.executor(2)
        engine._storage.fill_(NAN_BYTE)
        executor.image.copy_(images[:2].permute(0, 2, 3, 1))
        executor.run()
        maps = tuple(raw.permute(0, 3, 1, 2) for raw in executor.maps)
        assert worst(maps, first(expected, 2)) < 1e-5


@pytest.mark.parametrize("built_in", [True, False])
@pytest.mark.parametrize("made_in", [True, False])
@pytest.mark.parametrize("used_in", [True, False])
def test_inference_mode_does_not_matter(
    build: Build, images: Tensor, expected: tuple[Tensor, ...],
    built_in: bool, made_in: bool, used_in: bool,
) -> None:  # fmt: skip
    with torch.inference_mode(built_in):
        engine = build()
    with torch.inference_mode(made_in):
        engine.run(images[:1])
    with torch.inference_mode(used_in):
        executor = engine.executor(1)
        executor.image.copy_(images[:1].permute(0, 2, 3, 1))
        executor.run()
        maps = tuple(raw.permute(0, 3, 1, 2).clone() for raw in executor.maps)
    assert worst(maps, first(expected, 1)) < 1e-5
    assert not any(raw.requires_grad for raw in maps)


@pytest.mark.parametrize("batch", [0, 5])
def test_an_executor_of_no_such_batch(build: Build, batch: int) -> None:
    with pytest.raises(EngineError, match=f"a batch of {batch} images: this engine runs 1 to 4"):
        build().executor(batch)


def test_who_holds_the_arena_waits_for_who_held_it(build: Build, cpu_device) -> None:
    """On the device, not on the host: each holder leaves a mark, the next waits for it."""

    class Recorder(cpu_device):
        calls: list[tuple[str, object]]

        def mark(self) -> object:
            self.calls.append(("mark", len(self.calls)))
            return self.calls[-1][1]

        def wait(self, mark: object) -> None:
            self.calls.append(("wait", mark))

    device = Recorder()
    device.calls = []
    engine = build(device)
    device.calls.clear()
    with engine.exclusive():
        pass
    with engine.exclusive(), engine.exclusive():  # an executor is made while one is held
        pass
    kinds = [kind for kind, _ in device.calls if kind]
    assert kinds[-5:] == ["mark", "wait", "wait", "mark", "mark"]
    assert device.calls[-4][1] == device.calls[-5][1]


def test_closed(build: Build, images: Tensor) -> None:
    with build() as engine:
        engine.run(images[:1])
    with pytest.raises(EngineError, match="closed"):
        engine.run(images[:1])
    with pytest.raises(EngineError, match="closed"):
        engine.executor(1)
    engine.close()


def test_steps_of_one_shape_are_measured_once(build: Build, cpu_device) -> None:
    timed: list[float] = []

    def clock(run: Run) -> float:
        timed.append(1.0)
        return 1.0

    engine = build(cpu_device(clock=clock))
    steps = len(engine.plan.steps)
    assert 2 * steps > len(timed) > steps  # at batches of 1 and of 4


def test_other_batches_are_not_measured(build: Build, cpu_device, images: Tensor) -> None:
    device = cpu_device(clock=lambda run: 1.0)
    engine = build(device)
    device._clock = refuse
    engine.run(images[:2])
    engine.run(images[:3])


def test_what_was_learnt_is_kept_for_the_next(
    build: Build, cpu_device, tuning_folder: Path, images: Tensor
) -> None:
    build()
    (path,) = tuning_folder.iterdir()
    assert Choices.from_json(path.read_bytes()).environment["gpu"] == "NVIDIA H200"
    engine = build(cpu_device(clock=refuse))
    engine.run(images[:1])
    with pytest.raises(pytest.fail.Exception, match="nothing should be measured"):
        build(cpu_device(clock=refuse, name="NVIDIA L4", sm=89))
    with pytest.raises(pytest.fail.Exception, match="nothing should be measured"):
        build(cpu_device(clock=refuse), size=64)


def test_a_file_brings_its_choices(
    build: Build, cpu_device, tuning_folder: Path, tmp_path: Path, images: Tensor
) -> None:
    path = tmp_path / "mini.engine"
    built = build(path=path, resize="letterbox", confidence=0.4)
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == {"manifest.json", "weights.safetensors", "tuning.json"}
        manifest = json.loads(archive.read("manifest.json"))
        assert len(json.loads(archive.read("tuning.json"))["choices"]) > 10
    assert manifest["gpu"] == {"name": "NVIDIA H200", "sm": "90"}
    assert set(manifest["versions"]) == {"yolov4_fast", "torch", "triton", "nvidia-cudnn-frontend"}
    for kept in tuning_folder.iterdir():
        kept.unlink()
    loaded = load_engine(path, device=cpu_device(clock=refuse))
    assert loaded.manifest == built.manifest
    assert worst(loaded.run(images), built.run(images)) == 0


def test_a_file_of_older_libraries_measures_anew(
    build: Build, cpu_device, tuning_folder: Path, tmp_path: Path, images: Tensor
) -> None:
    path = tmp_path / "mini.engine"
    build(path=path)
    for kept in tuning_folder.iterdir():
        kept.unlink()
    bundle = read_bundle(path)
    table = json.loads(bundle.payload[TUNING])
    table["environment"]["triton"] = "0.1"
    write_bundle(path, bundle.manifest, bundle.payload | {TUNING: json.dumps(table).encode()})
    with pytest.raises(pytest.fail.Exception, match="nothing should be measured"):
        load_engine(path, device=cpu_device(clock=refuse))
    load_engine(path, device=cpu_device()).run(images[:1])


def test_a_choice_that_is_no_kernel_any_more_is_made_anew(
    build: Build, tuning_folder: Path, images: Tensor
) -> None:
    build()
    (path,) = tuning_folder.iterdir()
    table = json.loads(path.read_bytes())
    for row in table["choices"]:
        row[2] = "triton 7x7x7"
    path.write_text(json.dumps(table))
    build().run(images[:1])
    kernels = {row[2] for row in json.loads(path.read_bytes())["choices"]}
    assert kernels == {"torch"}


@pytest.mark.parametrize(
    ("member", "content", "says"),
    [
        ("weights.safetensors", b"\x01\x02", "weights.safetensors is damaged"),
        ("tuning.json", b"{}", "tuning.json is not a table of choices"),
    ],
)
def test_a_damaged_member(
    build: Build, cpu_device, tmp_path: Path, member: str, content: bytes, says: str
) -> None:
    path = tmp_path / "mini.engine"
    build(path=path)
    bundle = read_bundle(path)
    write_bundle(path, bundle.manifest, bundle.payload | {member: content})
    with pytest.raises(EngineFileError, match=says):
        load_engine(path, device=cpu_device())


def test_a_file_loads_for_another_size(build: Build, mini, cpu_device, tmp_path: Path) -> None:
    path = tmp_path / "mini.engine"
    build(path=path)
    loaded = load_engine(path, size=(96, 160), device=cpu_device())
    images = torch.rand(2, 3, 160, 96)
    built = build_engine(*mini, engine="torch", precision="f32", size=(96, 160))
    assert worst(loaded.run(images), built.run(images)) < 1e-5


@pytest.fixture
def pictures(darknet_reference: Path) -> list[Tensor]:
    return [
        torch.from_numpy(read_image(darknet_reference / f"{name}.png")) for name in ("tall", "wide")
    ]


def test_fp8(
    build: Build, pictures: list[Tensor], cpu_device, tmp_path: Path, mini, images: Tensor
) -> None:
    path = tmp_path / "mini.engine"
    engine = build(precision="fp8", calibration=iter(pictures), path=path)
    with zipfile.ZipFile(path) as archive:
        assert "fp8.json" in archive.namelist()
        scales = Scales.from_json(archive.read("fp8.json"), engine.plan)
    assert FP8 in scales.dtypes()
    _, state = fold(mini.network, mini.state)
    weights = quantise_weights(engine.plan, state, scales)
    for batch in (2, 1):
        engine._storage.fill_(NAN_BYTE)
        maps = engine.run(images[:batch])
        # Its steps in half precision round twice, which may tip a later value to the next e4m3.
        assert worst(maps, run_quantised(engine.plan, weights, scales, images[:batch])) < 5e-2
    exact = build(precision="f32")
    for picture in pictures:
        image = resize([picture], engine.height, engine.width, "stretch")
        for ours, theirs in zip(engine.run(image), exact.run(image), strict=True):
            off = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt()
            assert 1e-2 < off < 0.4  # 4 bits through 20 layers that were never trained
    assert engine._storage.numel() < build(precision="fp16")._storage.numel()
    loaded = load_engine(path, device=cpu_device(clock=refuse))
    assert worst(loaded.run(images[:2]), engine.run(images[:2])) == 0


def test_fp8_without_its_scales(
    build: Build, pictures: list[Tensor], cpu_device, tmp_path: Path
) -> None:
    path = tmp_path / "mini.engine"
    build(precision="fp8", calibration=pictures, path=path)
    bundle = read_bundle(path)
    payload = {name: data for name, data in bundle.payload.items() if name != "fp8.json"}
    write_bundle(path, bundle.manifest, payload)
    with pytest.raises(EngineFileError, match=r"its member fp8\.json is missing; build it again"):
        load_engine(path, device=cpu_device())
    write_bundle(path, bundle.manifest, payload | {"fp8.json": b"{}"})
    with pytest.raises(EngineFileError, match="the scales are damaged"):
        load_engine(path, device=cpu_device())


def test_fp8_needs_cudnn_frontend_and_a_picture(
    build: Build, cpu_device, monkeypatch: pytest.MonkeyPatch, pictures: list[Tensor]
) -> None:
    with pytest.raises(EngineError, match="no calibration images"):
        build(precision="fp8", calibration=[])
    monkeypatch.setattr("yolov4_fast.engines.cuda.engine.available", lambda: "it is not there")
    with pytest.raises(EngineError, match="fp8 runs on cuDNN's fused kernels only: it is not the"):
        build(cpu_device(("cudnn", "torch")), precision="fp8", calibration=pictures)
    with pytest.raises(DeviceError, match="fp8 needs a GPU from sm_90"):
        build(cpu_device(sm=89), precision="fp8", calibration=pictures)


def test_without_cudnn_frontend_a_note_says_so(
    build: Build, cpu_device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "yolov4_fast.engines.cuda.engine.available", lambda: "nvidia-cudnn-frontend is not there"
    )
    build(cpu_device(("cudnn", "torch")), precision="fp16")
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("nvidia-cudnn-frontend is not there; the engine does without")
    caplog.clear()
    build(cpu_device(("cudnn", "torch")), precision="fp16")  # nothing was chosen anew
    build(cpu_device(("cudnn", "torch")), precision="f32")  # where cuDNN's kernels are TF32
    assert not caplog.records


@pytest.fixture(scope="module")
def tiny() -> Network:
    """A stage, a pyramid, an upsampled branch and two heads at 16x16 px."""
    conv = dict(batch_normalize=False, activation="mish", size=3)
    head = dict(
        all_anchors=((4.0, 6.0), (9.0, 7.0)), num_classes=1, scale_x_y=1.1, nms_kind="greedynms"
    )
    return Network(
        (
            Conv(inputs=(IMAGE,), filters=8, **conv),
            Conv(inputs=(0,), filters=8, stride=2, **conv),
            Conv(inputs=(1,), filters=8, size=1, batch_normalize=False, activation="leaky"),
            Shortcut(inputs=(2, 1)),
            Conv(inputs=(3,), filters=16, stride=2, **conv),
            MaxPool(inputs=(4,), size=5, stride=1),
            MaxPool(inputs=(4,), size=3, stride=1),
            Route(inputs=(5, 6, 4)),
            Conv(inputs=(7,), filters=6, size=1, batch_normalize=False),
            Head(inputs=(8,), mask=(1,), stride=4, **head),
            Upsample(inputs=(4,), stride=2),
            Route(inputs=(10, 3)),
            Conv(inputs=(11,), filters=6, size=1, batch_normalize=False),
            Head(inputs=(12,), mask=(0,), stride=2, **head),
        ),
        width=16,
        height=16,
    )


@pytest.mark.parametrize(("precision", "most"), [("f32", 1e-5), ("fp16", 5e-3)])
def test_our_kernels_run_a_network(
    tiny: Network, cpu_device, tuning_folder: Path, precision: str, most: float
) -> None:
    """Every step by Triton, in its interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs only where there is no GPU")
    torch.manual_seed(0)
    module = NetworkModule(tiny).eval()
    engine = build_engine(
        tiny, module.state_dict(), ("thing",), engine="cuda", precision=precision, max_batch=2,
        device=cpu_device(("triton",)),
    )  # fmt: skip
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        expected = module(images)
    engine._storage.fill_(NAN_BYTE)
    assert worst(engine.run(images), expected) < most
    kernels = {row[2] for row in json.loads(engine.learnt()[TUNING])["choices"]}
    assert all(kernel.startswith("triton") for kernel in kernels)


@pytest.fixture(scope="module")
def special() -> Network:
    """Every activation that kernels know by number, prelu, a weighted sum, attention."""
    conv = dict(filters=8, size=1)
    known = [name for name in ACTIVATIONS if name != "prelu"]
    layers: list[Layer] = [
        Conv(inputs=(number - 1,), activation=activation, **conv)
        for number, activation in enumerate(known)
    ]
    last = len(layers) - 1
    layers += [
        Conv(inputs=(last,), activation="prelu", **conv),
        Shortcut(
            inputs=(last + 1, last, 0), weights="per_channel", normalization="relu",
            activation="prelu",
        ),
        Conv(inputs=(last + 2,), activation="logistic", **conv),
        Sam(inputs=(last + 3, last + 2)),
        Conv(inputs=(last + 4,), filters=6, batch_normalize=False),
        Head(inputs=(last + 5,), all_anchors=((4.0, 6.0),), mask=(0,), num_classes=1, stride=1),
    ]  # fmt: skip
    return Network(tuple(layers), width=8, height=8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("precision", "most"), [("f32", 1e-5), ("fp16", 5e-3)])
def test_the_bag_of_specials(
    special: Network, cpu_device, tuning_folder: Path, tmp_path: Path,
    precision: str, most: float, backend: str,
) -> None:  # fmt: skip
    """Each step by torch, or by Triton in its interpreter; the file brings weights and slopes."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs only where there is no GPU")
    torch.manual_seed(0)
    module = NetworkModule(special, bn_momentum=1.0)
    for name, parameter in module.named_parameters():
        if name.endswith((".slope", ".weights")):
            torch.nn.init.uniform_(parameter, 0.1, 0.9)
    images = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        module.train()(images)
        expected = module.eval()(images)
    path, device = tmp_path / "x.engine", cpu_device((backend,))
    build_engine(
        special, module.state_dict(), ("thing",), engine="cuda", precision=precision, max_batch=2,
        device=device, path=path,
    )  # fmt: skip
    engine = load_engine(path, device)
    engine._storage.fill_(NAN_BYTE)
    assert worst(engine.run(images), expected) < most


def test_what_was_measured_before_an_interruption_is_kept(
    mini, cpu_device, tuning_folder: Path
) -> None:
    timed = 0

    def clock(run: Run) -> float:
        nonlocal timed
        timed += 1
        if timed == 4:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        build_engine(*mini, engine="cuda", precision="f32", device=cpu_device(clock=clock))
    (file,) = tuning_folder.iterdir()
    assert len(Choices.from_json(file.read_bytes()).table) == 3
