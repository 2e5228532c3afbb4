"""pybind11's signatures as texts -> calls checked against them, as the bindings check them.

Stricter than the bindings in two places, where what they accept is most likely a mistake: an enum
or a bool is no whole number, and None no object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MISSING = object()
ALIASES = {"IBuilder": "Builder", "IParserError": "ParserError"}  # how C++ calls them
ANY = (
    "object", "collections.abc.Callable", "collections.abc.Iterable", "numpy.ndarray",
    "typing_extensions.CapsuleType", "detail::accessor<detail::accessor_policies::str_attr>",
)  # fmt: skip

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    default: Any = MISSING


@dataclass(frozen=True)
class Signature:
    """One overload. parameters: without self."""

    text: str
    parameters: tuple[Parameter, ...]
    returns: str

    def bind(
        self, given: Sequence[Any], named: Mapping[str, Any], check: Callable[[str, Any], bool]
    ) -> dict[str, Any] | None:
        """The arguments by name; None where they do not fit."""
        names = [parameter.name for parameter in self.parameters]
        if len(given) > len(names) or not set(named) <= set(names[len(given) :]):
            return None
        values = {**dict(zip(names, given, strict=False)), **named}
        for parameter in self.parameters:
            if parameter.name not in values:
                if parameter.default is MISSING:
                    return None
                values[parameter.name] = parameter.default
            elif not check(parameter.type, values[parameter.name]):
                return None
        return values


def parse_signature(text: str, default: Callable[[str], Any]) -> Signature:
    """default: the value that a written default such as "<Severity.WARNING: 2>" stands for."""
    head, returns = text.rsplit(") -> ", 1)
    parameters = []
    for part in _split(head.partition("(")[2]):
        name, _, rest = part.partition(": ")
        written, equals, value = rest.partition(" = ")
        if name != "self":
            parameters.append(Parameter(name, written, default(value) if equals else MISSING))
    return Signature(text, tuple(parameters), returns)


def checker(text: str, classes: Mapping[str, type]) -> Check:
    """Whether a value is of the type that a signature writes. Raises ValueError for a type that is
    not known here, as it could not be checked.
    """
    text = text.removeprefix("v_1_0::")
    text = ALIASES.get(text, text)
    if text in classes:
        return _object(text, classes[text])
    if text in PLAIN:
        return PLAIN[text]
    if text in ANY:
        return lambda value: True
    words = re.fullmatch(r"(?:collections\.abc\.Sequence|list)\[(.*)\]", text)
    if words:
        inner = checker(words[1], classes)
        return lambda value: isinstance(value, list | tuple) and all(inner(item) for item in value)
    words = re.fullmatch(r"tuple\[(.*)\]", text)
    if words:
        inners = [checker(part, classes) for part in _split(words[1])]
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(inners)
            and all(inner(item) for inner, item in zip(inners, value, strict=True))
        )
    raise ValueError(f"a type that the double does not know: {text}")


def _object(name: str, cls: type) -> Check:
    if name == "Dims":  # the bindings make one of any sequence of whole numbers
        return lambda value: (
            isinstance(value, cls)
            or (isinstance(value, list | tuple) and all(map(_whole, value)) and len(value) <= 8)
        )
    return lambda value: isinstance(value, cls) and getattr(value, "made", True)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


PLAIN: dict[str, Check] = {
    "None": lambda value: value is None,
    "typing.SupportsInt": _whole,
    "int": _whole,
    "typing.SupportsFloat": lambda value: _whole(value) or isinstance(value, float | np.floating),
    "float": lambda value: _whole(value) or isinstance(value, float | np.floating),
    "bool": lambda value: isinstance(value, bool | np.bool_),
    "str": lambda value: isinstance(value, str),
    "bytes": lambda value: isinstance(value, bytes),
    "tuple": lambda value: isinstance(value, tuple),
    "list": lambda value: isinstance(value, list),
    "memoryview": lambda value: isinstance(value, memoryview),
    "typing_extensions.Buffer": _buffer,
}


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([<") - (letter in ")]>" and text[place - 1] != "-")
        if letter == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
