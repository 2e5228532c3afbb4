"""One training in a folder at a time.

The lock is POSIX's: it is its process's alone, not of the loader's workers that are forked from it,
and ends with it, however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".running"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is not there. Raises ValueError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            file.seek(0)
            raise ValueError(
                f"{folder}: another process is training there ({file.read().strip()}); wait for "
                "its end, or give another --output"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
