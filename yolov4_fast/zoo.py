"""Official weights by name, fetched once into the user's cache and checked by size and sha256.

Nothing is fetched unless `fetch` is called. A transfer goes to a `.part` file, which a later call
resumes; only a file whose size and checksum are right takes its final name. Processes that want the
same file wait for one another (a lock on a file beside it; POSIX). The files are release assets of
AlexeyAB/darknet; a mirror is named by `base_url` or by YOLOV4_FAST_WEIGHTS_URL.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

BASE_URL = "https://github.com/AlexeyAB/darknet/releases/download"
BASE_URL_VARIABLE = "YOLOV4_FAST_WEIGHTS_URL"
CHUNK = 1 << 18  # bytes
TIMEOUT = 30.0  # seconds without a byte
MAX_TRANSFERS = 100
RETRY_DELAYS = (1.0, 2.0, 4.0)  # seconds before each retry that follows a transfer of nothing

COCO_NAMES: tuple[str, ...] = tuple(
    """person,bicycle,car,motorbike,aeroplane,bus,train,truck,boat,traffic light,fire hydrant,
    stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,
    umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
    baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
    banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,sofa,pottedplant,
    bed,diningtable,toilet,tvmonitor,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,
    sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace(
        "\n    ", ""
    ).split(",")
)  # in the order, and with the spellings, of Darknet's coco.names


class FetchError(OSError):
    """Weights that could not be fetched; says what was asked of whom, and what went wrong."""


@dataclass(frozen=True)
class Official:
    """A published weights file; the architecture that it fills has the same name."""

    path: str  # below the base URL
    size: int  # bytes
    sha256: tuple[str, ...]  # of every version in circulation

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]


OFFICIAL: dict[str, Official] = {
    "yolov4": Official(
        "yolov4/yolov4.weights",
        257_717_640,
        (
            "e8a4f6c62188738d86dc6898d82724ec0964d0eb9d2ae0f0a9d53d65d108d562",
            "8463fde6ee7130a947a73104ce73c6fa88618a9d9ecd4a65d0b38f07e17ec4e4",
        ),
    ),
    "yolov4-tiny": Official(
        "yolov4/yolov4-tiny.weights",
        24_251_276,
        ("cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87",),
    ),
}


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/yolov4_fast, or ~/.cache/yolov4_fast."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "yolov4_fast"


def fetch(
    name: str,
    cache: str | Path | None = None,
    *,
    base_url: str | None = None,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> Path:
    """The weights file of an official model, from the cache or else from the network.

    Raises ValueError for an unknown name, and FetchError where the file cannot be had: no
    connection, an HTTP error, a transfer that keeps breaking off, or a wrong size or checksum.
    """
    if name not in OFFICIAL:
        raise ValueError(f"no official weights are called {name!r}, but {', '.join(OFFICIAL)}")
    official = OFFICIAL[name]
    folder = Path(cache) if cache is not None else cache_folder()
    path, part = folder / official.file, folder / f"{official.file}.part"
    if _is_right(path, official):
        return path
    base = base_url or os.environ.get(BASE_URL_VARIABLE) or BASE_URL
    url = f"{base.rstrip('/')}/{official.path}"
    if not url.startswith(("https://", "http://", "file://")):
        raise ValueError(f"{base}: a base URL begins with https://, http:// or file://")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{official.file}.lock"):
        if _is_right(path, official):  # another process has fetched it meanwhile
            return path
        _obtain(_Download(url, part, official, timeout, progress))
        os.replace(part, path)
    return path


def _obtain(download: _Download) -> None:
    """Download and check. Raises FetchError; content that is wrong is not kept."""
    part, official = download.part, download.official
    resumed = part.exists()
    download.run()
    if not _is_right(part, official) and resumed:
        part.unlink()  # its beginning may be of another version of the file
        download.run()
    if not _is_right(part, official):
        found = _sha256(part)
        part.unlink()
        raise FetchError(
            f"{download.url}: what came is not the official file: its sha256 is {found}, not "
            f"{' or '.join(official.sha256)}"
        )


def _is_right(path: Path, official: Official) -> bool:
    if not path.is_file() or path.stat().st_size != official.size:
        return False
    return _sha256(path) in official.sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # here, so that the module can be imported where there is none

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it when the process ends
        yield


@dataclass
class _Download:
    """Brings `part` to its full size, resuming what is there; knows nothing of its content."""

    url: str
    part: Path
    official: Official
    timeout: float
    progress: bool
    validator: str | None = None  # of the version that the server sent first

    def run(self) -> None:
        """Raises FetchError."""
        idle = 0  # transfers in a row that brought nothing
        problem = ""
        for _ in range(MAX_TRANSFERS):
            before = self._have()
            if before == self.official.size:
                return
            if before > self.official.size:
                self.part.unlink()
            problem = self._transfer()
            if self._have() > before:
                idle = 0
                continue
            idle += 1
            if idle > len(RETRY_DELAYS):
                break
            time.sleep(RETRY_DELAYS[idle - 1])
        raise FetchError(
            f"{self.url}: {problem}; {self._have():,} of {self.official.size:,} bytes are here, "
            "and a later call resumes them"
        )

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _transfer(self) -> str:
        """One request, appended to the part file. Returns how it ended."""
        have = self._have()
        request = urllib.request.Request(self.url, headers={"User-Agent": "yolov4_fast"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            if self.validator:
                request.add_header("If-Range", self.validator)
        try:
            response = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # what is here is no beginning of what is there
                self.part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise FetchError(f"{self.url}: {error.code} {error.reason}") from None
            return f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            return f"cannot be reached ({getattr(error, 'reason', None) or error})"
        with response:
            # A server that does not know ranges sends everything, from the start, as 200.
            start = have if response.status == 206 else 0
            self._check(response, start)
            self.validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
            with open(self.part, "ab" if start else "wb") as file:
                problem = self._copy(response, file, start)
                os.fsync(file.fileno())
        return problem

    def _check(self, response: http.client.HTTPResponse, start: int) -> None:
        """Refuse what cannot be the file before it is written over anything."""
        length = response.headers.get("Content-Length") or ""
        offered = start + int(length) if length.isdigit() else self.official.size
        place = response.headers.get("Content-Range") or ""
        if start and not place.startswith(f"bytes {start}-"):
            raise FetchError(f"{self.url}: asked for byte {start} on, the server sent {place!r}")
        if offered != self.official.size:
            self.part.unlink(missing_ok=True)
            raise FetchError(
                f"{self.url}: the server offers {offered:,} bytes, but the official file has "
                f"{self.official.size:,}"
            )

    def _copy(self, response: http.client.HTTPResponse, file: BinaryIO, start: int) -> str:
        left = self.official.size - start
        with tqdm(
            desc=self.official.file,
            total=self.official.size,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None if self.progress else True,  # None: shown only on a terminal
        ) as bar:
            while left:
                try:
                    chunk = response.read(min(CHUNK, left))
                except (OSError, http.client.HTTPException) as error:
                    return f"the transfer broke off ({error or type(error).__name__})"
                if not chunk:
                    return "the transfer broke off"
                file.write(chunk)
                left -= len(chunk)
                bar.update(len(chunk))
        return "complete"
