"""The double of TensorRT refuses what the bindings refuse; else its tests would prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
from trt_behaviour import host_memory
from trt_double import Double
from trt_models import small_onnx
from trt_signatures import checker


@pytest.fixture
def trt(trt_double: Double) -> Any:
    return trt_double.module


@pytest.fixture
def builder(trt: Any) -> Any:
    return trt.Builder(trt.Logger(trt.Logger.ERROR))


def test_every_signature_is_understood(trt_double: Double) -> None:
    """No type is left unchecked."""
    count = 0
    for name, entry in trt_double.api["classes"].items():
        for texts in entry.get("methods", {}).values():
            for signature in trt_double._parsed(texts):
                for parameter in signature.parameters:
                    checker(parameter.type, trt_double.classes)
                checker(signature.returns, trt_double.classes)
                count += 1
        for types in entry.get("properties", {}).values():
            for written in filter(None, types):
                checker(written, trt_double.classes)
        assert name in trt_double.classes
    assert count > 400
    with pytest.raises(ValueError, match="a type that the double does not know"):
        checker("NoSuchThing", trt_double.classes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda trt, builder: builder.create_network(trt.NetworkDefinitionCreationFlag(0)),
        lambda trt, builder: builder.create_network(True),
        lambda trt, builder: builder.create_network(1.0),
        lambda trt, builder: builder.create_network(1, 2),
        lambda trt, builder: builder.create_network(flag=1),
        lambda trt, builder: builder.build_serialized_network(builder.create_network(0)),
        lambda trt, builder: builder.build_serialized_network(
            builder.create_network(0), None
        ),
        lambda trt, builder: builder.create_builder_config().set_flag(6),
        lambda trt, builder: builder.create_builder_config().set_flag(trt.DataType.HALF),
        lambda trt, builder: builder.create_builder_config().create_timing_cache("text"),
        lambda trt, builder: builder.create_optimization_profile().set_shape(
            "x", (1, 2), (1, 2), (1.5, 2)
        ),
        lambda trt, builder: trt.Builder(object()),
        lambda trt, builder: trt.Builder(),
        lambda trt, builder: trt.INetworkDefinition(),
        lambda trt, builder: setattr(
            builder.create_builder_config(), "profiling_verbosity", 2
        ),
        lambda trt, builder: len(host_memory(builder.double, b"abc")),
    ],
)  # fmt: skip
def test_wrong_arguments(trt: Any, builder: Any, wrong: Any) -> None:
    with pytest.raises(TypeError):
        wrong(trt, builder)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda trt, builder: builder.create_config(),
        lambda trt, builder: trt.BuilderFlag.SPEED,
        lambda trt, builder: trt.EXPLICIT_BATCH,
        lambda trt, builder: setattr(builder.create_builder_config(), "verbosity", 1),
        lambda trt, builder: setattr(builder, "num_DLA_cores", 2),  # it cannot be set
    ],
)
def test_names_that_are_not_there(trt: Any, builder: Any, wrong: Any) -> None:
    with pytest.raises(AttributeError):
        wrong(trt, builder)


@pytest.mark.parametrize(
    "use",
    [
        lambda trt, builder: trt.BuilderFlag.FP16,
        lambda trt, builder: trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH,
        lambda trt, builder: trt.IInt8EntropyCalibrator2,
        lambda trt, builder: builder.platform_has_fast_fp16,
        lambda trt, builder: builder.create_builder_config().int8_calibrator,
    ],
)
def test_what_11_removed(trt_double: Double, trt: Any, builder: Any, use: Any) -> None:
    if trt_double.major == "10":
        use(trt, builder)
        return
    with pytest.raises(AttributeError):
        use(trt, builder)


def test_calls_are_recorded_with_their_names(trt_double: Double, builder: Any) -> None:
    builder.create_network(1)
    builder.create_network()
    config = builder.create_builder_config()
    config.DLA_core = 1
    assert trt_double.names()[-4:] == [
        "Builder.create_network",
        "Builder.create_network",
        "Builder.create_builder_config",
        "IBuilderConfig.DLA_core=",
    ]
    assert trt_double.arguments("Builder.create_network") == [{"flags": 1}, {"flags": 0}]
    assert config.DLA_core == 1


def test_a_script_cannot_return_what_the_method_does_not(trt_double: Double, builder: Any) -> None:
    trt_double.script["Builder.create_builder_config"] = "a config"
    with pytest.raises(AssertionError, match="cannot return 'a config'"):
        builder.create_builder_config()
    trt_double.script["Builder.create_builder_config"] = None  # a null pointer
    assert builder.create_builder_config() is None


def test_derived_classes_must_be_constructed(trt: Any) -> None:
    class Forgetful(trt.ILogger):
        def __init__(self) -> None:
            self.lines: list[str] = []

    with pytest.raises(TypeError, match="incompatible function arguments"):
        trt.Builder(Forgetful())


def test_shapes_and_memory_are_like_the_bindings(trt_double: Double, trt: Any) -> None:
    shape = trt.Dims([1, 3, 8])
    assert (tuple(shape), len(shape), shape[1], shape == (1, 3, 8)) == ((1, 3, 8), 3, 3, True)
    assert not isinstance(shape, tuple)
    memory = host_memory(trt_double, b"abc")
    assert bytes(memory) == b"abc" and memory.nbytes == 3 and bytes(memoryview(memory)) == b"abc"


def test_a_plan_runs(trt_double: Double, trt: Any, builder: Any) -> None:
    """From the ONNX to a context: what is refused on the way is what TensorRT refuses."""
    told: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            told.append(f"{severity} {msg}")

    network, config = builder.create_network(0), builder.create_builder_config()
    assert trt.OnnxParser(network, Log()).parse(small_onnx())
    builder = trt.Builder(Log())
    assert builder.build_serialized_network(network, config) is None
    assert "Severity.ERROR" in told[-1] and "no optimization profile" in told[-1]
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)

    engine = trt.Runtime(Log()).deserialize_cuda_engine(bytes(plan))
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == ["images", "map_1"]
    assert engine.get_tensor_mode("map_1") == trt.TensorIOMode.OUTPUT
    assert engine.get_tensor_shape("images") == (-1, 3, 8, 8)
    context = engine.create_execution_context()
    assert context.infer_shapes() == ["images"]
    assert not context.set_input_shape("images", (5, 3, 8, 8)) and "not in the profile" in told[-1]
    assert context.set_input_shape("images", (3, 3, 8, 8))
    assert context.get_tensor_shape("map_1") == (3, 2, 8, 8)
    assert not context.execute_async_v3(7) and "no address" in told[-1]
    for address, name in enumerate(("images", "map_1"), 1):
        assert context.set_tensor_address(name, address)
    ran: list[Any] = []
    trt_double.on_execute = lambda context, stream: ran.append((context, stream))
    assert context.execute_async_v3(7) and ran == [(context, 7)]
    assert not context.set_tensor_address("other", 3)


def test_a_plan_of_another_version(trt_double: Double, trt: Any) -> None:
    other = Double({"10": "11", "11": "10"}[trt_double.major]).module.__version__
    plan = b"double of a plan:" + b'{"version": "%s"}' % other.encode()
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan) is None
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"noise") is None
