"""The command line: every flag reaches the configuration, and what cannot be is one error."""

import json
from dataclasses import field, fields, make_dataclass

import pytest

from training.config import TrainConfig
from training.options import FLAGS, NESTED, configuration, parse, settings
from training.settings import check
from training.train import main

REQUIRED = ["--data", "nowhere", "--output", "nowhere", "--device", "cpu"]
TOGETHER = {  # settings that one flag sets
    "width": {"width", "height"},
    "height": {"width", "height"},
    "optimizer": {"optimizer", "learning_rate", "weight_decay"},
}
NUMBERS = (0.25, 1.5, 3.0, 0.75)  # one of them is allowed by any setting, and not its default


def given(owner, item, kind) -> tuple[list[str], object]:
    """Arguments that set a field to another value than its default, and that value."""
    flag = FLAGS.get(item.name, "--" + item.name.replace("_", "-"))
    special = {
        "model": ("yolov4", "yolov4"),
        "anchors": ("1,2 3,4", "1,2 3,4"),
        "multi_scale": ("320-608", (320, 608)),
        "steps": ("0.25,0.5", (0.25, 0.5)),
        "scales": ("0.5,0.25", (0.5, 0.25)),
        "subdivisions": ("4", 4),
    }
    if item.name in ("width", "height"):
        return ["--size", "96x64"], {"width": 96, "height": 64}[item.name]
    if item.name in special:
        text, value = special[item.name]
        return [flag, text], value
    if kind is bool:
        return [flag.replace("--", "--no-") if item.default else flag], not item.default
    if choices := item.metadata["choices"]:
        value = next(choice for choice in reversed(choices) if choice != item.default)
        return [flag, value], value
    if kind is int:
        return [flag, str(item.default + 1)], item.default + 1
    value = next(number for number in NUMBERS if number != item.default and allowed(item, number))
    return [flag, str(value)], (value,) if kind == tuple[float, ...] else value


def allowed(item, value: float) -> bool:
    one = make_dataclass("One", [(item.name, float, field(metadata=item.metadata))])(value)
    try:
        check(one)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("owner", "item", "kind"), settings(), ids=[item.name for _, item, _ in settings()]
)
def test_every_setting_has_a_flag_that_reaches_it_alone(owner, item, kind):
    arguments, value = given(owner, item, kind)
    config, notes = configuration(parse([*REQUIRED, *arguments]))
    holder = getattr(config, owner) if owner else config
    assert getattr(holder, item.name) == value != item.default
    assert not notes
    changed = {sentence.split()[0] for sentence in config.differences(TrainConfig().to_json())}
    assert changed == TOGETHER.get(item.name, {item.name})


def test_no_name_occurs_twice():
    names = [item.name for _, item, _ in settings()]
    assert len(names) == len(set(names))
    assert {f.name for f in fields(TrainConfig)} == set(NESTED) | {
        item.name for owner, item, _ in settings() if not owner
    }


def test_the_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for _, item, _ in settings():
        if item.name not in ("width", "height"):
            assert FLAGS.get(item.name, "--" + item.name.replace("_", "-")) in text
    assert "(default: 0.001 for adamw, 0.0001 for adam, 0.01 for sgd)" in text
    assert "(default: 0.8,0.9)" in text and "loader processes; 0: none (default: 1)" in text


def test_rates_follow_an_optimizer_that_is_asked_for():
    config, _ = configuration(parse([*REQUIRED, "--optimizer", "sgd"]))
    assert (config.learning_rate, config.weight_decay) == (1e-2, 5e-4)
    config, _ = configuration(parse([*REQUIRED, "--optimizer", "sgd", "--learning-rate", "0.5"]))
    assert (config.learning_rate, config.weight_decay) == (0.5, 5e-4)
    config, _ = configuration(parse([*REQUIRED, "--preset", "seed", "--optimizer", "adam"]))
    assert (config.learning_rate, config.weight_decay) == (1e-4, 1e-4)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--val-every", "0"], "argument --val-every: '0' is not a whole number from 1 up"),
        (["--workers", "-1"], "argument --workers: '-1' is not a whole number from 0 up"),
        (["--save-every", "nan"], "'nan' is not a number of minutes from 0 up"),
        (["--device", "foo"], "torch has no 'foo' here"),
        (["--epochs", "many"], "argument --epochs: 'many' is not a whole number"),
        (["--epochs", "2.5"], "argument --epochs: '2.5' is not a whole number"),
        (["--mosaic", "x"], "argument --mosaic: 'x' is not a number"),
        (["--steps", "0.5,x"], "argument --steps: 'x' is not a number"),
        (["--box-loss", "eiou"], "argument --box-loss: invalid choice: 'eiou'"),
        (["--multi-scale", "320"], "'320' is not LEAST-LARGEST in pixels, such as 320-608"),
        (["--size", "0"], "argument --size: '0' is neither N nor WIDTHxHEIGHT"),
        (["--seed", "-1"], "error: seed must be at least 0, not -1"),
        (["--epochs", "0"], "error: epochs must be at least 1, not 0"),
        (["--size", "16"], "error: width must be at least 32, not 16"),
        (["--warmup-epochs", "inf"], "warmup_epochs must be at least 0, not inf"),
        (["--warmup-epochs", "-3"], "warmup_epochs must be at least 0, not -3"),
        (["--weight-decay", "nan"], "weight_decay must be at least 0, not nan"),
        (["--learning-rate", "nan"], "learning_rate must be above 0, not nan"),
        (["--mosaic", "1.5"], "mosaic must be at least 0 and at most 1, not 1.5"),
        (["--ema-decay", "1"], "ema_decay must be at least 0 and below 1, not 1"),
        (["--scale-x-y", "1,0.5"], "scale_x_y must be at least 1 and at most 4, not 0.5"),
        (["--steps", "0.5"], "steps are 1 and scales 2: give one scale a step"),
        (["--steps", "0.9,0.8"], "steps must ascend, not 0.9,0.8"),
        (["--multi-scale", "608-320"], "multi_scale is the least and the largest width"),
        (["--subdivisions", "3"], "a batch of 16 does not split into 3 subdivisions"),
        (["--preset", "cfg"], "--preset cfg takes what the [net] section of a cfg says"),
        (["--preset", "darknet", "--model", "yolov9"], "no architecture is called 'yolov9'"),
    ],
)
def test_settings_that_cannot_be_are_one_error(capsys, tmp_path, option, words):
    output = tmp_path / "run"
    try:
        status = main(["--data", "nowhere", "--output", str(output), "--device", "cpu", *option])
    except SystemExit as exit:  # argparse's own
        status = exit.code
    told = capsys.readouterr().err
    assert status == 2 and not output.exists()
    assert words in told and told.count("error:") == 1 and "Traceback" not in told


def test_data_and_output_are_needed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--device", "cpu"])
    assert exit.value.code == 2
    assert "the following arguments are required: --data, --output" in capsys.readouterr().err


def test_print_config_prints_what_a_checkpoint_would_hold_and_stops(capsys):
    assert main(["--print-config", "--preset", "seed", "--epochs", "7", "--mosaic", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    config, _ = configuration(
        parse([*REQUIRED, "--preset", "seed", "--epochs", "7", "--mosaic", "1"])
    )
    assert printed == config.to_json()
    assert (printed["epochs"], printed["augment"]["mosaic"]) == (7, 1.0)
    assert printed["optimizer"] == "adam"


def test_a_configuration_without_a_newer_setting_had_its_default():
    old = TrainConfig(epochs=7).to_json()
    del old["subdivisions"], old["loss"]["label_smoothing"], old["validation"]
    assert TrainConfig(epochs=7).differences(old) == []
    config, _ = configuration(parse([*REQUIRED, "--epochs", "7", "--label-smoothing", "0.5"]))
    assert config.differences(old) == ["label_smoothing was 0.0 and is now 0.5"]


def test_differences_name_every_setting():
    one = TrainConfig()
    config, _ = configuration(parse([*REQUIRED, "--epochs", "7", "--rotation", "5"]))
    assert config.differences(one.to_json()) == [
        "epochs was 100 and is now 7",
        "rotation was 0.0 and is now 5.0",
    ]
    assert one.differences(one.to_json() | {"swiftness": 3}) == [
        "swiftness was 3, a setting that this version does not have"
    ]


def test_tuples_survive_json():
    config = TrainConfig(steps=(0.5,), scales=(0.1,), multi_scale=(320, 608))
    assert config.differences(json.loads(json.dumps(config.to_json()))) == []
