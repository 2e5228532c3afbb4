"""Settings declared once: a field of a frozen dataclass with its default, help and bounds.

The command line, the presets, the checks and what a checkpoint keeps all read the same field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from math import isfinite
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field. low, high: bounds that are allowed themselves; above, below: that are
    not. They hold for each number of a tuple.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "choices": tuple(choices), **bounds})


def check(config: Any) -> None:
    """Raises ValueError naming the first setting of a dataclass that its field does not allow."""
    for item in fields(config):
        value, rules = getattr(config, item.name), item.metadata
        if not rules:
            continue
        if rules["choices"] and value not in rules["choices"]:
            raise ValueError(f"{item.name} {value!r} is not one of {', '.join(rules['choices'])}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                _check_number(item.name, number, rules)


def _check_number(name: str, number: float, rules: Any) -> None:
    low, high, above, below = (rules[key] for key in ("low", "high", "above", "below"))
    told = [
        text
        for bound, text in (
            (low, f"at least {low}"),
            (above, f"above {above}"),
            (high, f"at most {high}"),
            (below, f"below {below}"),
        )
        if bound is not None
    ]
    fits = (
        isfinite(number)
        and (low is None or number >= low)
        and (above is None or number > above)
        and (high is None or number <= high)
        and (below is None or number < below)
    )
    if not fits:
        raise ValueError(f"{name} must be {' and '.join(told) or 'finite'}, not {number}")
