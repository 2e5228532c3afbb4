"""A stand-in for the module `tensorrt`, made from the API of the real bindings (api-*.json).

What is not in the bindings of that version is not here: an attribute, a member of an enum or a
method raises AttributeError. Every call is held against the signatures of its overloads (count,
names and types of the arguments, type of the result) and recorded in order. What the objects do is
in `trt_behaviour`, and what a test puts in `script` comes first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from trt_behaviour import BEHAVIOUR, initial
from trt_signatures import Signature, checker, parse_signature

VERSIONS = {"10": "10.16.1.11", "11": "11.4.0.106"}
HERE = Path(__file__).parent


@cache
def read_api(major: str) -> dict[str, Any]:
    """As `read_tensorrt_api` wrote it of the bindings of a major version, "10" or "11"."""
    return json.loads((HERE / f"api-{VERSIONS[major]}.json").read_text())


@dataclass(frozen=True)
class Call:
    """name: such as "Builder.create_network", with "=" at the end where a property was set (its
    value is the argument "value").
    """

    name: str
    on: Any
    arguments: dict[str, Any]


@dataclass
class Double:
    """major: "10" or "11". script: what a method does in this test, by "Class.method" (a function
    of the double, the object and the bound arguments by name), or what it returns. on_execute: is
    given the context and the stream's handle whenever a context runs.
    """

    major: str
    script: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    on_execute: Callable[[Any, int], None] | None = None

    def __post_init__(self) -> None:
        self.api = read_api(self.major)
        self.classes: dict[str, type] = {}
        self.module = ModuleType("tensorrt")
        for name in self.api["classes"]:
            self._define(name)
        for name, signatures in self.api["functions"].items():
            setattr(self.module, name, self._method(name, signatures).__func__)
        vars(self.module)["__version__"] = self.api["version"]
        self.module.__spec__ = ModuleSpec("tensorrt", None)  # as whoever asks `find_spec` wants it

    def make(self, kind: str, /, **state: Any) -> Any:
        """An object as TensorRT would hand it out. state: its properties, and what its behaviour
        remembers.
        """
        made = self.classes[kind].__new__(self.classes[kind])
        made.start(state)
        return made

    def names(self) -> list[str]:
        """Of the calls, in order."""
        return [call.name for call in self.calls]

    def arguments(self, name: str) -> list[dict[str, Any]]:
        """Of every call of this name, in order."""
        return [call.arguments for call in self.calls if call.name == name]

    def log(self, logger: Any, severity: str, message: str) -> None:
        """As TensorRT tells something, by way of the program's own logger."""
        logger.log(getattr(self.module.ILogger.Severity, severity), message)

    def fits(self, written: str, value: Any) -> bool:
        """Whether a value is of the type that a signature writes."""
        return checker(written, self.classes)(value)

    def _define(self, name: str) -> None:
        if name in self.classes:
            return
        entry = self.api["classes"][name]
        for base in entry.get("bases", ()):
            self._define(base)
        if "enum" in entry:
            cls = _enum(name, entry["enum"])
        else:
            own: dict[str, Any] = {"double": self, "trt_name": name}
            own |= {
                key: self._method(f"{name}.{key}", signatures)
                for key, signatures in entry.get("methods", {}).items()
                if name not in SPECIAL
            }
            for key, (gives, takes) in entry.get("properties", {}).items():
                own[key] = self._property(f"{name}.{key}", gives, takes)
            bases = tuple(self.classes[base] for base in entry.get("bases", ())) or (
                SPECIAL.get(name, Object),
            )
            cls = type(name, bases, own)
        self.classes[name] = cls
        for key, other in entry.get("aliases", {}).items():  # as Logger.Severity
            self._define(other)
            setattr(cls, key, self.classes[other])
        outer, _, inner = name.rpartition(".")
        if outer:
            self._define(outer)
            setattr(self.classes[outer], inner, cls)
        else:
            setattr(self.module, name, cls)
        for key, kind in entry.get("constants", {}).items():  # as ILogger.WARNING
            self._define(kind)
            setattr(cls, key, self.classes[kind].__members__[key])

    def _method(self, name: str, texts: list[str]) -> Any:
        short = name.rpartition(".")[2]
        signatures: list[Signature] = []

        bound = texts[0].startswith(f"{short}(self")  # neither a function nor a static method

        def call(*given: Any, **named: Any) -> Any:
            on, given = (given[0], given[1:]) if bound else (None, given)
            signatures.extend([] if signatures else self._parsed(texts))
            for signature in signatures:
                arguments = signature.bind(given, named, self.fits)
                if arguments is not None:
                    return self._run(name, on, arguments, signature)
            raise TypeError(
                f"{short}(): incompatible function arguments. The following argument types are "
                f"supported: {'; '.join(texts)}. Invoked with: {given}, {named}"
            )

        call.__name__ = short
        return call if bound else staticmethod(call)

    def _parsed(self, texts: list[str]) -> list[Signature]:
        return [parse_signature(text, self._default) for text in texts]

    def _run(self, name: str, on: Any, arguments: dict[str, Any], signature: Signature) -> Any:
        if name.endswith(".__init__"):
            on.start({})
        self.calls.append(Call(name, on, arguments))
        what = self.script.get(name, BEHAVIOUR.get(name, initial(signature.returns, self)))
        result = what(self, on, **arguments) if callable(what) else what
        nullable = signature.returns in self.classes  # a pointer in C++
        assert (result is None and nullable) or self.fits(signature.returns, result), (
            f"{name} cannot return {result!r}: {signature.text}"
        )
        return self._handed_out(signature.returns, result)

    def _handed_out(self, written: str, value: Any) -> Any:
        """Shapes are `Dims`, not tuples."""
        if written == "Dims" and value is not None:
            return self.module.Dims(tuple(value))
        if written == "list[Dims]":
            return [self.module.Dims(tuple(shape)) for shape in value]
        return value

    def _property(self, name: str, gives: str | None, takes: str | None) -> property:
        def get(on: Any) -> Any:
            key = name.rpartition(".")[2]
            if name in self.script:
                what = self.script[name]
                value = what(self, on) if callable(what) else what
            elif key not in on.state and name in BEHAVIOUR:
                value = BEHAVIOUR[name](self, on)
            else:
                value = on.state.setdefault(key, initial(gives or "None", self))
            return self._handed_out(gives or "None", value)

        def put(on: Any, value: Any) -> None:
            written = takes or gives or "object"
            if value is not None and not self.fits(written, value):
                raise TypeError(f"{name} takes {written}, not {value!r}")
            self.calls.append(Call(f"{name}=", on, {"value": value}))
            on.state[name.rpartition(".")[2]] = value

        return property(get, put if takes else None)

    def _default(self, text: str) -> Any:
        """Of a parameter: "0", "None", "''", "True", "<Severity.WARNING: 2>"."""
        if not text.startswith("<"):
            return json.loads(text.replace("'", '"').replace("None", "null").lower())
        kind, _, member = text[1:].partition(":")[0].rpartition(".")
        enum = next(cls for name, cls in self.classes.items() if name.split(".")[-1] == kind)
        return getattr(enum, member)


class Object:
    """What the objects of the bindings have in common: no attributes of one's own but in classes
    derived in Python, and no constructor where the bindings have none.
    """

    double: ClassVar[Double]
    trt_name: ClassVar[str]
    state: dict[str, Any]
    made = False  # __init__ has been called

    def start(self, state: dict[str, Any]) -> None:
        vars(self).update(state=dict(state), made=True)

    def __init__(self, *given: Any, **named: Any) -> None:
        raise TypeError(f"tensorrt.{self.trt_name}: No constructor defined!")

    def __setattr__(self, name: str, value: Any) -> None:
        known = isinstance(getattr(type(self), name, None), property)
        if not known and type(self) in self.double.classes.values():
            raise AttributeError(f"{self.trt_name!r} object has no attribute {name!r}")
        super().__setattr__(name, value)


class Shape(Object):
    """A `Dims`: the sides are in its state; its own calls are not told of."""

    def __init__(self, shape: Any = ()) -> None:
        self.start({"sides": tuple(int(side) for side in shape)})

    def __len__(self) -> int:
        return len(self.state["sides"])

    def __getitem__(self, index: Any) -> Any:
        return self.state["sides"][index]

    def __eq__(self, other: object) -> bool:
        return tuple(other) == self.state["sides"] if isinstance(other, Iterable) else False

    def __hash__(self) -> int:
        return hash(self.state["sides"])

    def __repr__(self) -> str:
        return repr(self.state["sides"])


class Memory(Object, bytearray):
    """An `IHostMemory`: a buffer, and nothing else of what a bytearray can do."""

    def _no(self, *_: Any) -> Any:
        raise TypeError("an IHostMemory is a buffer only: bytes(memory), memory.nbytes")

    __len__ = __iter__ = __getitem__ = __setitem__ = __add__ = decode = _no


SPECIAL = {"Dims": Shape, "IHostMemory": Memory}


def _enum(name: str, members: dict[str, int]) -> type:
    """As pybind11's enums: not iterable, members by name in `__members__`."""

    class Member:
        __members__: ClassVar[dict[str, Any]] = {}

        def __init__(self, value: int) -> None:
            names = [key for key, number in members.items() if number == value]
            if not names:
                raise ValueError(f"{value} is no {name}")
            self.name, self.value = names[0], value

        def __int__(self) -> int:
            return self.value

        __index__ = __int__

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self) and vars(other) == vars(self)

        def __hash__(self) -> int:
            return self.value

        def __repr__(self) -> str:
            return f"<{name}.{self.name}: {self.value}>"

        def __str__(self) -> str:
            return f"{name.rpartition('.')[2]}.{self.name}"

    Member.__name__ = Member.__qualname__ = name.rpartition(".")[2]
    for key, value in members.items():
        Member.__members__[key] = member = Member(value)
        setattr(Member, key, member)
    return Member
