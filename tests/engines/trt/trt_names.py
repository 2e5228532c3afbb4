"""The names of TensorRT that a source file uses, read off its syntax tree.

A name that hangs on the module is known with its class: `trt.BuilderFlag.TF32`, where the module is
called `trt`, in a variable or an attribute; `tensorrt.plugin` is called `trtp`. Of what hangs on
objects only the last part is known.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

MODULE = {"trt": (), "_trt": (), "trtp": ("plugin",)}


def module_names(source: str) -> set[tuple[str, ...]]:
    """Each ("BuilderFlag", "TF32") that hangs on the module, as long as it is written."""
    tree = ast.parse(source)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            chain = _chain(node)
            for place, part in enumerate(chain[:-1]):
                if part in MODULE:
                    names.add((*MODULE[part], *chain[place + 1 :]))
                    break
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tensorrt":
            path = (node.module or "").split(".")[1:]
            names |= {(*path, alias.name) for alias in node.names}
    return names


def attributes(source: str) -> Iterator[tuple[str, str, int]]:
    """(what it hangs on, attribute, line) of each: ("manifest", "precision", 12) of both
    `manifest.precision` and `engine.manifest.precision`; "" where that is no name.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            holder = _chain(node.value)
            yield (holder[-1] if holder else "", node.attr, node.lineno)


def resolves(api: dict[str, Any], name: tuple[str, ...]) -> bool:
    """Whether the API has it, what a class inherits included."""
    classes, first = api["classes"], name[0]
    if first == "plugin":
        return len(name) == 1 or name[1] in api["plugin"]
    if first not in classes:
        known = (*api["functions"], *api["others"], "__version__")
        return len(name) == 1 and first in known
    if len(name) == 1:
        return True
    nested = f"{first}.{name[1]}"
    nested = classes[first].get("aliases", {}).get(name[1], nested)
    if nested in classes:
        return resolves({**api, "classes": {nested: classes[nested]}}, (nested, *name[2:]))
    return name[1] in members(api, first)


def members(api: dict[str, Any], name: str) -> set[str]:
    entry = api["classes"][name]
    own = {
        member
        for kind in ("enum", "methods", "properties", "constants")
        for member in entry.get(kind, ())
    }
    return own.union(*(members(api, base) for base in entry.get("bases", ())))


def removed(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Members and classes of the one that nothing in the other is called by."""

    def all_names(api: dict[str, Any]) -> set[str]:
        return set(api["classes"]).union(*(members(api, name) for name in api["classes"]))

    return all_names(old) - all_names(new)


def _chain(node: ast.expr) -> list[str]:
    """["trt", "BuilderFlag", "TF32"]; empty where it begins with something else than a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        holder = _chain(node.value)
        return [*holder, node.attr] if holder else [node.attr]
    return []
