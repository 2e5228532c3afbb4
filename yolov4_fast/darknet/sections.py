"""Cfg text as sections of options, each with its line number, so that an error can point at it.

The grammar is that of AlexeyAB/darknet: `[section]` lines, `key=value` lines, comments after `#` or
`;`. A value is taken out of a `Section` by key and type; what nobody took is an unknown key, and
never passes in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import NoReturn, TypeVar

from yolov4_fast.network.layers import NetworkError

_Default = TypeVar("_Default")
_Number = TypeVar("_Number", int, float)
_SHOWN = 60  # characters of a bad line or value that an error quotes


class CfgError(NetworkError):
    """A cfg that cannot be read, or a network that no cfg can express.

    Names file, line, section, key and what would be right.
    """


@dataclass(frozen=True)
class Option:
    value: str
    line: int


@dataclass
class Section:
    """One section: its name without brackets, its first line, its options in order."""

    source: str
    name: str
    line: int
    options: dict[str, Option] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def fail(self, problem: str, key: str | None = None) -> NoReturn:
        line = self.options[key].line if key in self.options else self.line
        place = f"[{self.name}]" if key is None else f"[{self.name}] {key}"
        raise CfgError(f"{self.source}, line {line}, {place}: {problem}")

    def text(self, key: str, default: _Default) -> str | _Default:
        self.taken.add(key)
        return self.options[key].value if key in self.options else default

    def choice(self, key: str, default: str, choices: Collection[str]) -> str:
        value = self.text(key, default)
        if value not in choices:
            self.fail(f"{value!r} is not supported; use one of {', '.join(choices)}", key)
        return value

    def integer(self, key: str, default: int, minimum: int | None = None) -> int:
        value = self._parse(key, _whole, "a whole number", self.text(key, str(default)))
        if minimum is not None and value < minimum:
            self.fail(f"{value} is too small; it must be at least {minimum}", key)
        return value

    def number(self, key: str, default: float) -> float:
        return self._parse(key, _finite, "a number", self.text(key, repr(default)))

    def flag(self, key: str) -> bool:
        return self.integer(key, 0) != 0

    def integers(self, key: str) -> tuple[int, ...]:
        """Comma-separated whole numbers; empty where the key is absent."""
        value = self.text(key, None)
        if value is None:
            return ()
        return tuple(self._parse(key, _whole, "a whole number", part) for part in value.split(","))

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.text(key, None)
        if value is None:
            return ()
        return tuple(self._parse(key, _finite, "a number", part) for part in value.split(","))

    def _parse(self, key: str, convert: Callable[[str], _Number], kind: str, text: str) -> _Number:
        try:
            return convert(text)
        except ValueError:
            self.fail(f"{text.strip()[:_SHOWN]!r} is not {kind}", key)

    def off(self, keys: Iterable[str]) -> None:
        """Refuse each of these keys unless it is absent or 0."""
        for key in keys:
            if self.number(key, 0):
                self.fail(
                    f"{self.text(key, '')} is not supported; only 0, or no such line, is", key
                )

    def rest(self, known: Collection[str]) -> tuple[tuple[str, str], ...]:
        """Options that nobody has taken, verbatim.

        Raises CfgError for one that is not in `known` either.
        """
        left = tuple((k, option.value) for k, option in self.options.items() if k not in self.taken)
        for key, _ in left:
            if key not in known:
                close = get_close_matches(key, [*self.taken, *known], 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                self.fail(f"unknown key{hint or f' in a [{self.name}] section'}", key)
        return left


def _whole(text: str) -> int:
    if "_" in text:  # which Python would take for a separator of digits
        raise ValueError(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if "_" in text or not math.isfinite(value):
        raise ValueError(text)
    return value


def read_sections(text: str, source: str) -> list[Section]:
    """The sections of a cfg text in order.

    Raises CfgError for a line that is none of the grammar's.
    """
    sections: list[Section] = []
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, raw in enumerate(lines, 1):
        line = raw.replace(";", "#").split("#", 1)[0].strip()
        if not line:
            continue
        where = f"{source}, line {number}"
        if line.startswith("["):
            if not line.endswith("]") or not line[1:-1].strip():
                raise CfgError(
                    f"{where}: {line[:_SHOWN]!r} is not a section such as [convolutional]"
                )
            sections.append(Section(source, line[1:-1].strip(), number))
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not key or not value:
            raise CfgError(f"{where}: {line[:_SHOWN]!r} is neither [section] nor key=value")
        if not sections:
            raise CfgError(
                f"{where}: {line[:_SHOWN]!r} stands before any section; [net] comes first"
            )
        known = sections[-1].options.get(key)
        if known is not None and known.value != value:
            sections[-1].fail(
                f"it is {known.value!r} here and {value[:_SHOWN]!r} in line {number}; keep one",
                key,
            )
        sections[-1].options[key] = known or Option(value, number)
    return sections
