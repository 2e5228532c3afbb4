"""Boost.Python's signatures, as they stand in docstrings -> calls checked against them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np


def fits(
    text: str, given: tuple[Any, ...], named: dict[str, Any], classes: dict[str, type]
) -> bool:
    """Whether a signature `name( (int)arg1 [, (object)stream=None]) -> None` takes a call."""
    inside = text[text.index("(") + 1 : text.rindex(")")]
    optional = inside.find("[") if "[" in inside else len(inside)
    parameters = [
        (match[2], match[1], match.start() > optional)
        for match in re.finditer(r"\((\w+)\)(\w+)", inside)
    ]
    if len(given) > len(parameters):
        return False
    values = dict(zip((name for name, _, _ in parameters), given, strict=False))
    if set(values) & set(named) or not set(named) <= {name for name, _, _ in parameters}:
        return False
    values |= named
    for name, kind, may_lack in parameters:
        if name not in values:
            if not may_lack:
                return False
        elif not _is(kind, values[name], classes):
            return False
    return True


def _is(kind: str, value: Any, classes: dict[str, type]) -> bool:
    if kind == "object":
        return True
    if kind == "int":
        return isinstance(value, int | np.integer) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    return isinstance(value, classes[kind])
