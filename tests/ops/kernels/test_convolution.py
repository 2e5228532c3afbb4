"""The fused convolution against torch in float64; its kernel in the interpreter without a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference
from yolov4_fast.ops.convolution import ConvConfig, configs_for, convolution, workspace_bytes
from yolov4_fast.ops.convolution_config import MOST_CONFIGS, SCALAR, WARP, WARPGROUP
from yolov4_fast.ops.kernels.convolution_variants import VARIANTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One unit in the last place of the rounded result, and float32's sums (of some 600 products near
# 0.04) in another order.
TOLERANCES = {torch.float32: (4e-6, 4e-6), torch.float16: (1e-3, 4e-6)}
SMALL = ConvConfig(16, 16, 16, 4, 2)
MEDIUM = ConvConfig(64, 32, 32, 4, 2)
DTYPES = list(TOLERANCES)


class Layer:
    """Random operands in the middle of poisoned buffers; `channels` beside each view."""

    def __init__(
        self,
        source: tuple[int, int, int, int],
        filters: int,
        size: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int = 0,
        dtype: torch.dtype = torch.float32,
        activation: str = "linear",
        residual: bool = False,
        before: int = 8,
        after: int = 8,
    ) -> None:
        self.before, self.after, self.dtype = before, after, dtype
        size_y, size_x = (size, size) if isinstance(size, int) else size
        batch, height, width, channels = source
        cells = (
            (height + 2 * padding - size_y) // stride + 1,
            (width + 2 * padding - size_x) // stride + 1,
        )
        self.source = self.view(source).copy_(torch.randn(source))
        self.out = self.view((batch, *cells, filters))
        self.residual = (
            self.view(self.out.shape).copy_(torch.randn(self.out.shape)) if residual else None
        )
        scale = (size_y * size_x * channels) ** -0.5
        self.weight = (scale * torch.randn(filters, size_y, size_x, channels)).to(DEVICE, dtype)
        self.bias = torch.randn(filters, device=DEVICE)
        self.options = {"stride": stride, "padding": padding, "activation": activation}

    def view(self, shape: tuple[int, ...]) -> Tensor:
        channels = self.before + shape[3] + self.after
        buffer = torch.full((*shape[:3], channels), math.nan, dtype=self.dtype, device=DEVICE)
        return buffer[..., self.before : self.before + shape[3]]

    def run(self, config: ConvConfig | None = None, **options) -> Tensor:
        found = convolution(
            *(self.source, self.weight, self.bias, self.out),
            **self.options,
            residual=self.residual,
            config=config,
            **options,
        )
        assert found is self.out
        return found

    def expected(self) -> Tensor:
        """In float64, rounded once."""
        source, weight = (x.double().permute(0, 3, 1, 2) for x in (self.source, self.weight))
        exact = F.conv2d(
            source, weight, self.bias.double(), self.options["stride"], self.options["padding"]
        )
        exact = activate_reference(exact.permute(0, 2, 3, 1), self.options["activation"])
        exact = exact if self.residual is None else exact + self.residual.double()
        return exact.to(self.dtype)

    def check(self, config: ConvConfig | None = None, **options) -> None:
        expected = self.expected()
        rtol, atol = TOLERANCES[self.dtype]
        torch.testing.assert_close(self.run(config, **options), expected, rtol=rtol, atol=atol)
        buffer = self.out._base
        assert buffer is not None
        around = torch.cat(
            (buffer[..., : self.before], buffer[..., buffer.shape[3] - self.after :]), 3
        )
        assert around.isnan().all()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 32, 48])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(1, 1, 0), (1, 2, 0), (1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 0), (5, 3, 2), (7, 2, 3)],
)
def test_windows_and_channels(size, stride, padding, channels, dtype):
    Layer((2, 9, 7, channels), 24, size, stride, padding, dtype, "leaky").check(MEDIUM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (3, 2, 1), (7, 1, 0)])
def test_the_reference_itself(size, stride, padding, dtype):
    layer = Layer((2, 9, 7, 19), 24, size, stride, padding, dtype, "mish", residual=True)
    layer.check(implementation="reference")


def test_without_a_configuration_the_most_promising_is_taken():
    Layer((2, 9, 7, 40), 24, 3, 1, 1, torch.float16, "leaky").check()


@pytest.mark.parametrize("channels", [4, 40])
@pytest.mark.parametrize(("size", "padding"), [((9, 9), 4), ((1, 7), 3), ((8, 2), 2), ((3, 1), 1)])
def test_windows_that_are_large_or_not_square(size, padding, channels):
    Layer((1, 5, 4, channels), 8, size, 1, padding, torch.float16).check(MEDIUM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("source", "filters"),
    [
        ((1, 1, 1, 1), 1),
        ((1, 1, 1, 64), 32),
        ((5, 1, 3, 32), 255),
        ((1, 13, 13, 48), 18),
        ((3, 2, 2, 24), 130),
        ((1, 33, 4, 8), 7),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_odd_maps_and_filters(source, filters, size, dtype):
    Layer(source, filters, size, 1, size // 2, dtype, "mish", residual=True).check(MEDIUM)


@pytest.mark.parametrize("tiling", WARPGROUP + WARP + SCALAR, ids=str)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("split", [1, 3])
def test_every_tiling(tiling, size, split):
    config = ConvConfig(
        tiling.block_m, tiling.block_n, tiling.block_k, tiling.num_warps, tiling.num_stages, split
    )
    dtype = torch.float32 if tiling in SCALAR else torch.float16
    Layer((1, 5, 27, 40), 72, size, 1, size // 2, dtype, "mish", residual=True).check(config)


@pytest.mark.parametrize("before", [0, 3, 8])
@pytest.mark.parametrize("after", [0, 1, 8])
@pytest.mark.parametrize("channels", [32, 6])
def test_slices_at_any_offset(before, after, channels):
    """From wholly aligned to elements that only begin at multiples of their own size."""
    Layer((1, 6, 5, channels), 16, 3, 1, 1, torch.float16, before=before, after=after).check()


@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(activation, residual, split, dtype):
    layer = Layer((1, 6, 6, 32), 24, 1, dtype=dtype, activation=activation, residual=residual)
    layer.check(ConvConfig(32, 32, 16, 4, 2, split))


@pytest.mark.parametrize("split", [1, 2])
def test_the_residual_may_be_overwritten(split):
    layer = Layer((1, 6, 6, 32), 24, 3, 1, 1, torch.float16, "mish", residual=True)
    expected = layer.expected()
    layer.out = layer.residual
    rtol, atol = TOLERANCES[torch.float16]
    found = layer.run(ConvConfig(16, 16, 16, 4, 2, split))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
@pytest.mark.parametrize(("cells", "filters"), [(100, 48), (17, 16), (16, 40), (80, 1)])
def test_every_tile_is_written_whatever_the_order(cells, filters, group_m):
    Layer((1, cells, 1, 16), filters).check(ConvConfig(16, 16, 16, 4, 2, 1, group_m))


@pytest.mark.parametrize("split", [2, 3, 5, 7, 16])
@pytest.mark.parametrize(("size", "channels"), [(3, 16), (3, 40), (1, 64), (3, 3)])
def test_splits_of_k(size, channels, split):
    """Even, uneven, and more parts than steps: some programs then add nothing."""
    layer = Layer((1, 5, 5, channels), 20, size, 1, size // 2, torch.float32, "mish")
    layer.check(ConvConfig(16, 16, 16, 4, 2, split))


def test_a_split_gives_the_same_bits_in_every_run_and_any_workspace():
    layer = Layer((1, 5, 5, 48), 20, 3, 1, 1, torch.float16, "mish")
    config = ConvConfig(16, 16, 16, 4, 2, 4)
    first = layer.run(config).clone()
    size = workspace_bytes(config, 25, 20)
    workspace = torch.full((size + 64,), 255, dtype=torch.uint8, device=DEVICE)
    assert torch.equal(layer.run(config, workspace=workspace), first)
    assert (workspace[size:] == 255).all(), "wrote beyond what workspace_bytes tells"


@pytest.mark.parametrize("channels", [3, 20, 32, 40])
def test_nan_reaches_the_cells_that_read_it_and_no_others(channels):
    layer = Layer((1, 7, 7, channels), 16, 3, 1, 1, torch.float16, "mish")
    layer.source[0, 3, 3] = math.nan
    bad = layer.run(SMALL).isnan().all(3)[0]
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[2:5, 2:5] = True
    assert torch.equal(bad.cpu(), expected)
    assert torch.equal(layer.out.isnan().any(3)[0].cpu(), expected)


@pytest.mark.parametrize("scale", [6e4, -6e4, 1e-7])
@pytest.mark.parametrize("activation", ["mish", "swish", "leaky", "logistic"])
def test_extreme_sums_stay_finite(scale, activation):
    layer = Layer((1, 3, 3, 1), 4, dtype=torch.float16, activation=activation)
    layer.source.fill_(scale)
    layer.weight.fill_(1)
    layer.bias.zero_()
    assert layer.run(SMALL).isfinite().all()
    layer.check(SMALL)


def test_a_sum_beyond_half_precision_is_infinite():
    layer = Layer((1, 2, 2, 32), 16, dtype=torch.float16)
    layer.source.fill_(6e4)
    layer.weight.fill_(1)
    assert layer.run(SMALL).isposinf().all()


def test_rows_that_lie_beyond_2_to_the_31():
    """33 x 33 cells, 2^21 values apart: 4.6 GB of address space, of which little is touched."""
    step = 2**21
    try:
        buffer = torch.empty(1, 33, 33, step, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:  # no room for it on this machine
        pytest.skip(str(error))
    layer = Layer((1, 33, 33, 32), 16, 3, 1, 1, torch.float16, "leaky")
    expected = layer.expected()
    source, out = buffer[..., :32], buffer[..., 32:48]
    source.copy_(layer.source)
    found = convolution(
        source, layer.weight, layer.bias, out, **layer.options, config=WARP[0]
    ).contiguous()
    rtol, atol = TOLERANCES[torch.float16]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def shape_error(**changes) -> str:
    layer = Layer((1, 4, 4, 16), 8, 3, 1, 1, torch.float16)
    arguments = {
        "source": layer.source,
        "weight": layer.weight,
        "bias": layer.bias,
        "out": layer.out,
        **layer.options,
    }
    with pytest.raises(ValueError) as caught:
        convolution(**(arguments | changes))
    return str(caught.value)


def test_arguments_that_do_not_fit_are_named():
    def half(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float16, device=DEVICE)

    assert "groups are not taken" in shape_error(weight=half(8, 3, 3, 4))
    assert "contiguous" in shape_error(weight=half(8, 16, 3, 3).permute(0, 2, 3, 1))
    assert "out must be [1, 4, 4, 8]" in shape_error(out=half(1, 2, 2, 8))
    assert "out must be [1, 2, 2, 8]" in shape_error(stride=2)
    assert "the bias must be [8]" in shape_error(bias=torch.zeros(9, device=DEVICE))
    assert "the bias must be torch.float32" in shape_error(bias=half(8))
    assert "the weight must be torch.float16" in shape_error(weight=half(8, 3, 3, 16).float())
    assert "out must be torch.float16" in shape_error(out=half(1, 4, 4, 8).float())
    assert "the residual" in shape_error(residual=half(1, 4, 4, 16))
    assert "channel slice" in shape_error(source=half(1, 16, 4, 4).permute(0, 2, 3, 1))
    assert "stride must be at least 1" in shape_error(stride=0)
    assert "activation must be one of" in shape_error(activation="gelu")
    assert "implementation must be one of" in shape_error(implementation="fast")


@pytest.mark.parametrize(
    "workspace",
    [
        torch.empty(100, dtype=torch.uint8),
        torch.empty(2, 10_000, dtype=torch.uint8)[:, ::2],
        torch.empty(10_001, dtype=torch.uint8)[1:],
    ],
    ids=["small", "strided", "not aligned"],
)
def test_workspaces_that_do_not_fit(workspace):
    split = ConvConfig(16, 16, 16, 4, 2, 2)
    with pytest.raises(ValueError, match="contiguous workspace of 1024 bytes at a multiple of 16"):
        Layer((1, 4, 4, 32), 8).run(split, workspace=workspace.to(DEVICE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 48}, "powers of two"),
        ({"block_k": 8}, "at least 16"),
        ({"num_warps": 3}, "num_warps"),
        ({"split_k": 0}, "split_k"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    values = {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 2}
    with pytest.raises(ValueError, match=message):
        ConvConfig(**(values | change))


LAYERS = [  # of YOLOv4: cells of one image at 416, filters, K
    (173056, 32, 27),
    (43264, 64, 288),
    (43264, 64, 64),
    (2704, 128, 1152),
    (676, 255, 512),
    (169, 1024, 4608),
    (169, 512, 2048),
    (1, 1, 1),
]


@pytest.mark.parametrize(("m", "n", "k"), LAYERS)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
def test_few_configurations_that_fit_the_gpu(m, n, k, batch, dtype, sm):
    configs = configs_for(m * batch, n, k, 132, dtype, sm)
    assert 1 <= len(configs) <= MOST_CONFIGS and len(set(configs)) == len(configs)
    assert any(config.split_k == 1 for config in configs)
    assert any(config.num_warps == 4 for config in configs)
    shared = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[sm]
    for config in configs:
        item = dtype.itemsize
        stage = (config.block_m + config.block_n) * config.block_k * item
        assert stage * config.num_stages <= shared * 1024
        assert config.split_k == 1 or config.split_k * config.block_k <= k
        assert workspace_bytes(config, m, n) == (config.split_k > 1) * 4 * config.split_k * m * n


def test_small_maps_of_one_image_split_k_and_large_ones_do_not():
    for m, n, k in ((169, 1024, 4608), (676, 256, 2304), (169, 512, 4608)):
        assert configs_for(m, n, k, 132, torch.float16, 90)[0].split_k > 1
        assert configs_for(32 * m, n, k, 132, torch.float16, 90)[0].split_k == 1
    assert configs_for(43264, 64, 288, 132, torch.float16, 90)[0].split_k == 1


def test_variants_have_names_of_their_own_and_cover_every_path():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    signatures = {tuple(variant.signature["source"] for variant in VARIANTS)}
    assert {"*fp16", "*bf16", "*fp32"} <= {name for names in signatures for name in names}
    constants = [variant.constexprs for variant in VARIANTS]
    assert {values["KH"] for values in constants} >= {1, 3}
    assert {values["SPLIT"] for values in constants} == {True, False}
    assert any(values["FLAT"] for values in constants)
