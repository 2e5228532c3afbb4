"""Class names: a text file with one name a line, in the order of the class numbers."""

from __future__ import annotations

from pathlib import Path


def read_names(path: str | Path) -> tuple[str, ...]:
    """The names in a .names file. Blank lines at its end are not names.

    Raises ValueError for an empty file, a blank line between names, or text that is not UTF-8.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text with one class name a line") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: holds no class names; one name a line is expected")
    if "" in lines:
        raise ValueError(
            f"{path}, line {lines.index('') + 1}: is blank, which would shift the class numbers of "
            "the names after it"
        )
    return tuple(lines)
