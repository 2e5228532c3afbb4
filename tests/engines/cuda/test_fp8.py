"""FP8 on the CPU: which buffers, which scales, what each step makes of them, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fp8_accuracy import Emulation, compare
from training.shapes import main as make_shapes
from yolov4_fast import ops
from yolov4_fast.datasets import open_dataset
from yolov4_fast.engines.cuda.cudnn_problem import (
    FP8,
    OUT_SCALE,
    RESCALE,
    RESIDUAL_SCALE,
    Problem,
)
from yolov4_fast.engines.cuda.fp8 import (
    HALF,
    LARGEST,
    QuantisedWeights,
    Scales,
    calibrate,
    in_half,
    quantise_weights,
    quantised_kernel,
    quantised_kernels,
    run_quantised,
    sharing,
    step_scales,
    to_fp8,
)
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.memory import Memory
from yolov4_fast.engines.cuda.place import place
from yolov4_fast.engines.cuda.plan import (
    Combine,
    Convolution,
    Plan,
    PyramidPool,
    Upsample,
    View,
)
from yolov4_fast.engines.cuda.reference import run_reference
from yolov4_fast.engines.engine import EngineError, Manifest
from yolov4_fast.model import open_model
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.fold import fold, without_normalisation
from yolov4_fast.network.layers import Conv, Head, Network, Sam, Shortcut
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.sources import read_image

SAMPLE = Path(__file__).resolve().parents[3] / "samples" / "shapes-nano.safetensors"


def random_state(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep the activations at a usual size."""
    torch.manual_seed(seed)
    state = NetworkModule(network).state_dict()
    for name, values in state.items():
        if name.endswith("conv.weight"):
            values.normal_(0, (1.5 / values[0].numel()) ** 0.5)
        elif name.endswith("conv.bias"):
            values.normal_(0, 0.1)
    return state


SMALL = without_normalisation(
    by_name("yolov4", num_classes=3, width=64, height=96, width_multiple=0.5)
)


@pytest.fixture(scope="module")
def small() -> tuple[Plan, dict[str, Tensor], Scales]:
    """YOLOv4 of half the width, calibrated with noise."""
    plan, state = lower(SMALL), random_state(SMALL)
    return plan, state, calibrate(plan, state, noise(2))


def noise(count: int, batch: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(batch, 3, SMALL.height, SMALL.width, generator=generator)


def test_what_shares_a_scale(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    plan, _, scales = small
    groups = sharing(plan)
    assert sorted(number for group in groups for number in group) == [*range(len(plan.buffers))]
    of = {number: group for group in groups for number in group}
    copies = [step for step in plan.steps if isinstance(step, (PyramidPool, Upsample))]
    assert len(copies) == 3
    for step in copies:
        buffers = {view.buffer for view in (*step.reads, *step.writes)}
        assert len({of[number] for number in buffers}) == 1
        assert len({scales.values[number] for number in buffers}) == 1
    # The upsampled ones: SPP's are one buffer already, and convolutions join none.
    assert sum(len(group) > 1 for group in groups) == 2


def test_what_stays_in_half_precision(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    plan, _, scales = small
    half = in_half(plan)
    heads = [s for s in plan.steps if {v.buffer for v in s.writes} & {v.buffer for v in plan.maps}]
    assert len(heads) == 3
    assert half == {
        plan.image.buffer,
        *(view.buffer for view in plan.maps),
        *(view.buffer for step in heads for view in step.reads),
    }
    dtypes = scales.dtypes()
    assert [n for n, dtype in enumerate(dtypes) if dtype == HALF] == sorted(half)
    assert set(dtypes) == {HALF, FP8}


def conv(source: int, filters: int, size: int = 1, groups: int = 1) -> Conv:
    return Conv(
        inputs=(source,), filters=filters, size=size, groups=groups, activation="leaky",
        batch_normalize=False,
    )  # fmt: skip


def head(source: int) -> Head:
    return Head(inputs=(source,), all_anchors=((4, 4),), mask=(0,), num_classes=1, stride=1)


def test_products_stay_in_half_precision() -> None:
    layers = (
        conv(-1, 32, 3), conv(0, 32), Sam(inputs=(1, 0)), conv(2, 32), conv(3, 16), conv(4, 6),
        head(5),
    )  # fmt: skip
    plan = lower(Network(layers, width=16, height=16))
    (product,) = (step for step in plan.steps if isinstance(step, Combine))
    assert {view.buffer for view in (*product.reads, *product.writes)} <= in_half(plan)
    third = next(s for s in plan.steps if isinstance(s, Convolution) and s.weights == (3,))
    assert third.out.buffer not in in_half(plan)


@pytest.mark.parametrize(
    ("layer", "half"), [(conv(0, 32, 3, groups=2), True), (conv(0, 32, 3), False)]
)
def test_grouped_convolutions_stay_in_half_precision(layer: Conv, half: bool) -> None:
    layers = (conv(-1, 32), layer, conv(1, 48), conv(2, 16), conv(3, 6), head(4))
    plan = lower(Network(layers, width=16, height=16))
    step = next(s for s in plan.steps if isinstance(s, Convolution) and s.weights == (1,))
    found = in_half(plan)
    assert (step.source.buffer in found) == half and (step.out.buffer in found) == half


def test_narrow_buffers_stay_in_half_precision() -> None:
    layers = (conv(-1, 32), conv(0, 24), conv(1, 32), conv(2, 16), conv(3, 6), head(4))
    plan = lower(Network(layers, width=16, height=16))
    convolutions = [step for step in plan.steps if isinstance(step, Convolution)]
    assert [step.out.buffer in in_half(plan) for step in convolutions] == [
        False, True, False, True, True,
    ]  # fmt: skip


def test_the_largest_value_becomes_the_largest(
    small: tuple[Plan, dict[str, Tensor], Scales],
) -> None:
    """In each group, by another run in float32 that looks at whole buffers."""
    plan, state, scales = small
    network = NetworkModule(SMALL)
    network.load_state_dict(state)
    found: dict[int, float] = {}

    def look(number: int) -> None:
        def hook(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
            found[number] = max(found.get(number, 0.0), float(output.abs().max()))

        network.layers[str(number)].register_forward_hook(hook)

    for number in map(int, network.layers):
        look(number)
    with torch.inference_mode():
        for images in noise(2):
            network(images)
    checked = 0
    groups = sharing(plan)
    for group in groups:
        writers = [s for s in plan.steps if {v.buffer for v in s.writes} & group]
        scale = scales.values[min(group)]
        if scale is None or any(len(step.layers) > 1 for step in writers):
            continue  # a residual is added, or convolutions are merged
        writers = [step for step in writers if isinstance(step, Convolution)]
        expected = max(found[step.layers[0]] for step in writers) / LARGEST
        assert scale == pytest.approx(expected, rel=1e-4)
        checked += 1
    assert checked > 20


def test_dead_channels_and_buffers() -> None:
    """All zero: any scale will do, none may divide by it."""
    layers = (conv(-1, 32), conv(0, 32), conv(1, 16), conv(2, 6), head(3))
    network = Network(layers, width=16, height=16)
    plan = lower(network)
    state = {name: torch.zeros_like(v) for name, v in NetworkModule(network).state_dict().items()}
    scales = calibrate(plan, state, [torch.rand(1, 3, 16, 16)])
    weights = quantise_weights(plan, state, scales)
    (raw,) = run_quantised(plan, weights, scales, torch.rand(1, 3, 16, 16))
    assert bool((raw == 0).all())


def test_filters(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    plan, state, scales = small
    weights = quantise_weights(plan, state, scales)
    seen = set()
    for step in plan.steps:
        if not isinstance(step, Convolution):
            continue
        own = weights[step.weights[0]]
        exact = torch.cat([state[f"layers.{n}.conv.weight"] for n in step.weights])
        source = scales.values[step.source.buffer]
        seen.add(own.weight.dtype)
        if source is None:
            assert own.weight.dtype == HALF and own.rescale is None
            continue
        assert own.weight.dtype == FP8 and own.rescale is not None
        assert bool((own.weight.float().abs().amax((1, 2, 3)) == LARGEST).all())
        scale = (own.rescale / source).view(-1, 1, 1, 1)
        off = (own.weight.float() * scale).permute(0, 3, 1, 2) - exact
        # Half a step of three bits, or of the least step, 2^-9.
        assert bool((off.abs() <= exact.abs() * 2**-4 * 1.01 + scale * 2**-10 * 1.01).all())
    assert seen == {HALF, FP8}


def test_scales_are_those_that_cudnn_takes(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    plan, state, scales = small
    weights, dtypes = quantise_weights(plan, state, scales), scales.dtypes()
    kinds = set()
    for step in plan.steps:
        if isinstance(step, Convolution):
            residual = None if step.residual is None else dtypes[step.residual.buffer]
            problem = Problem(
                batch=1, height=8, width=8, channels=16, filters=step.out.channels, size=1,
                stride=1, padding=0, activation=step.activation,
                dtype=dtypes[step.source.buffer], out_dtype=dtypes[step.out.buffer],
                source_row=16, out_row=step.out.channels, residual_dtype=residual,
                residual_row=None if residual is None else step.out.channels,
            )  # fmt: skip
            found = step_scales(step, weights[step.weights[0]], scales)
            assert tuple(found) == problem.scales()
            kinds.add(tuple(found))
            for number, values in found.items():
                assert values.dtype == torch.float32
                assert values.shape == ((step.out.channels,) if number == RESCALE else (1,))
    assert kinds == {
        (), (OUT_SCALE,), (RESCALE,), (RESCALE, OUT_SCALE), (RESCALE, RESIDUAL_SCALE, OUT_SCALE),
    }  # fmt: skip


def test_one_convolution_by_hand() -> None:
    """A residual, stored values beyond the largest, and everything scaled."""
    step = Convolution(
        layers=(0,), weights=(0,), source=View(0, 0, 16), out=View(1, 0, 16),
        residual=View(2, 0, 16), size=3, stride=1, padding=1, groups=1, activation="relu",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    stored = [to_fp8(torch.randn(1, 5, 4, 16, generator=generator) * 50) for _ in range(3)]
    weight = to_fp8(torch.randn(16, 3, 3, 16, generator=generator) * 50)
    bias, per_filter = torch.randn(16, generator=generator), torch.rand(16, generator=generator)
    scales = Scales((0.02, 0.5, 0.1))
    weights = {0: QuantisedWeights(weight, bias, per_filter * 1e-3 * 0.02)}
    quantised_kernel(step, lambda view: stored[view.buffer], weights, scales)()
    source = stored[0].double().permute(0, 3, 1, 2) * 0.02
    filters = weight.double().permute(0, 3, 1, 2) * (per_filter.double() * 1e-3).view(-1, 1, 1, 1)
    exact = F.relu(F.conv2d(source, filters, bias.double(), padding=1)).permute(0, 2, 3, 1)
    exact = (exact + stored[2].double() * 0.1) / 0.5
    expected = exact.clamp(-448, 448).float().to(FP8).float()
    same = stored[1].float() == expected
    assert float(same.float().mean()) > 0.99, "float32 sums may fall on the other side of a half"
    torch.testing.assert_close(stored[1].float(), expected, rtol=2**-3, atol=2**-8)


@pytest.mark.parametrize("value", [448.0, 449.0, 1e9, torch.inf])
def test_too_large_values_become_the_largest(value: float) -> None:
    assert to_fp8(torch.tensor([value, -value])).float().tolist() == [448.0, -448.0]


def test_nan_is_kept() -> None:
    assert bool(to_fp8(torch.tensor([torch.nan])).float().isnan())


def test_all_in_half_precision_is_the_reference() -> None:
    plan, state = lower(SMALL), random_state(SMALL)
    scales = Scales((None,) * len(plan.buffers))
    (images,) = noise(1)
    ours = run_quantised(plan, quantise_weights(plan, state, scales), scales, images)
    for raw, expected in zip(ours, run_reference(plan, state, images, HALF), strict=True):
        assert torch.equal(raw, expected)


def test_weighted_sums_and_prelu_stay_in_half_precision() -> None:
    """What they read and write, and their weights; the convolutions around them are FP8."""
    layers = (
        conv(-1, 32, 3), conv(0, 32, 3), conv(1, 32),
        Shortcut(inputs=(2, 1), weights="per_channel"), conv(3, 32),
        replace(conv(4, 16), activation="prelu"), conv(5, 32), conv(6, 16), conv(7, 6), head(8),
    )  # fmt: skip
    network = Network(layers, 12, 8)
    plan, state = lower(network), random_state(network)
    state["layers.3.weights"].uniform_(0.3, 0.9)
    state["layers.5.slope"].uniform_(-0.5, 0.5)
    images = [torch.rand(2, 3, 8, 12) for _ in range(2)]
    scales = calibrate(plan, state, images)
    sums = [step for step in plan.steps if isinstance(step, Combine)]
    assert len(sums) == 2
    for step in sums:
        assert {scales.values[view.buffer] for view in (*step.reads, *step.writes)} == {None}
    assert FP8 in scales.dtypes()
    weights = quantise_weights(plan, state, scales)
    assert all(weights[step.key].weight.dtype == torch.float32 for step in sums)
    (raw,) = run_quantised(plan, weights, scales, images[0])
    (exact,) = run_reference(plan, state, images[0])
    assert 1e-3 < float((raw - exact).norm() / exact.norm()) < 0.15
    none = Scales((None,) * len(plan.buffers))
    (raw,) = run_quantised(plan, quantise_weights(plan, state, none), none, images[0])
    assert torch.equal(raw, run_reference(plan, state, images[0], HALF)[0])


def test_poison_and_batches(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    """Nothing reads what was not written, and no image sees another."""
    plan, state, scales = small
    weights = quantise_weights(plan, state, scales)
    (images,) = noise(1, batch=3)
    together = run_quantised(plan, weights, scales, images)
    assert all(bool(raw.isfinite().all()) for raw in together)
    others = images.clone()
    others[::2] = 1 - others[::2]
    for one, other in zip(together, run_quantised(plan, weights, scales, others), strict=True):
        assert torch.equal(one[1], other[1]) and not torch.equal(one[0], other[0])


def test_maps_are_near_to_float32(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    plan, state, scales = small
    weights = quantise_weights(plan, state, scales)
    (images,) = noise(1)
    for raw, exact in zip(
        run_quantised(plan, weights, scales, images),
        run_reference(plan, state, images),
        strict=True,
    ):
        off = (raw - exact).std() / exact.std()
        assert 0.001 < float(off) < 0.2, "rounding to three bits shows, and no more than that"


def test_kernels_run_in_memory_of_their_types(
    small: tuple[Plan, dict[str, Tensor], Scales],
) -> None:
    plan, state, scales = small
    memory = Memory(plan, place(plan), 1, HALF, dtypes=dict(enumerate(scales.dtypes())))
    kernels = quantised_kernels(plan, memory, quantise_weights(plan, state, scales), scales)
    assert len(kernels) == len(plan.steps)
    assert memory.image.dtype == HALF and {raw.dtype for raw in memory.maps} == {HALF}
    assert any(memory.tensor(step.writes[0]).dtype == FP8 for step in plan.steps)


def test_scales_in_json(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    plan, _, scales = small
    assert Scales.from_json(scales.to_json(), plan) == scales


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b'{"format": "other", "scales": []}', "damaged"),
        (b'{"format": "yolov4_fast.fp8", "scales": [0.0]}', "positive"),
        (b'{"format": "yolov4_fast.fp8", "scales": [NaN]}', "positive"),
        (b'{"format": "yolov4_fast.fp8", "scales": [1.0, null]}', "2 scales for a plan of"),
    ],
)
def test_damaged_scales(text: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Scales.from_json(text, lower(SMALL))


def test_calibrating_without_images(small: tuple[Plan, dict[str, Tensor], Scales]) -> None:
    plan, state, _ = small
    with pytest.raises(EngineError, match="no calibration images"):
        calibrate(plan, state, [])


def test_calibrating_a_network_that_overflows(
    small: tuple[Plan, dict[str, Tensor], Scales],
) -> None:
    plan, state, _ = small
    with pytest.raises(EngineError, match="not finite"):
        calibrate(plan, state | {"layers.0.conv.bias": torch.full((16,), torch.inf)}, noise(1))


@pytest.mark.slow
def test_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """AP of the sample model on scenes that it was not trained on."""
    folder = tmp_path / "scenes"
    make_shapes(
        ["--output", str(folder), "--train", "8", "--val", "20", "--size", "416x416", "--seed", "1"]
    )
    model = open_model(str(SAMPLE))
    network, state = fold(model.network, model.state)
    plan = lower(network)
    seen = [
        ops.resize([torch.from_numpy(read_image(path))], network.height, network.width, "stretch")
        for path in open_dataset(folder, "train").image_paths
    ]
    scales = calibrate(plan, state, seen)
    weights = quantise_weights(plan, state, scales)
    module = NetworkModule(network)
    module.load_state_dict(state)
    module.eval()
    manifest = Manifest(
        kind="torch", network=network, class_names=model.class_names, resize="stretch",
        precision="f32", max_batch=1,
    )  # fmt: skip
    result = compare(
        Emulation(manifest, lambda images: tuple(module(images))),
        Emulation(manifest, lambda images: run_quantised(plan, weights, scales, images)),
        open_dataset(folder, "val"),
    )
    with capsys.disabled():
        print(f"\nFP8 by emulation: {result}")
    assert result["AP50_f32"] > 0.8
    assert result["loss"] < 0.03
    assert result["lost"] == 0
    assert result["iou_median"] > 0.95
    assert result["score_median"] < 0.03
