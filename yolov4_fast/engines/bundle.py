"""The engine file: one uncompressed zip of `manifest.json` and the payload of the engine.

The manifest holds the format's version, the kind of engine, the network as cfg text, class names,
input size, resize mode, precision, largest batch, thresholds, the versions that built it, the GPU
it is bound to (if any), and the sha256 of each other member. Nothing in it is unpickled, and
nothing is executed on the host but what a TensorRT plan brings that was built version-compatible, a
runtime of its own: load only such files as you trust. The same engine makes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from yolov4_fast.darknet.cfg import parse_cfg, write_cfg
from yolov4_fast.engines.engine import Manifest
from yolov4_fast.files import replacing

FORMAT = "yolov4_fast.engine"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REBUILD = "build it again with: yolov4-fast build MODEL -o FILE"
MAKE = "make one of a model with: yolov4-fast build MODEL -o FILE"

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of its name and extra field


class EngineFileError(ValueError):
    """An engine file that cannot be used: the message names the file, what is wrong and what to
    rebuild.
    """

    def __init__(self, path: Path, problem: str, remedy: str = REBUILD) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")


@dataclass(frozen=True)
class Bundle:
    """An engine file in memory: its manifest, and its payload with the checksums checked."""

    path: Path
    manifest: Manifest
    payload: Mapping[str, bytes]


def write_bundle(path: str | Path, manifest: Manifest, payload: Mapping[str, bytes]) -> None:
    """Write an engine file, whole or not at all."""
    text = json.dumps(_to_json(manifest, payload), indent=1)
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {MANIFEST: text.encode(), **payload}.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def read_bundle(path: str | Path) -> Bundle:
    """Read and check a whole engine file. Raises FileNotFoundError or EngineFileError."""
    path = Path(path)
    with _open(path) as file, _archive(path, file) as archive:
        raw = _manifest(path, file, archive)
        manifest = _from_json(path, raw)
        payload = {}
        for name, digest in raw["sha256"].items():
            payload[name] = _member(path, file, archive, name)
            if hashlib.sha256(payload[name]).hexdigest() != digest:
                raise EngineFileError(path, f"{name} is damaged: its sha256 is not the recorded")
    return Bundle(path, manifest, payload)


def read_manifest(path: str | Path) -> Manifest:
    """Read what an engine file says about itself, without its weights.

    Raises as `read_bundle` does.
    """
    path = Path(path)
    with _open(path) as file, _archive(path, file) as archive:
        return _from_json(path, _manifest(path, file, archive))


def _open(path: Path) -> BinaryIO:
    if not path.exists():
        raise FileNotFoundError(f"no such engine file: {path}")
    if not path.is_file():
        raise EngineFileError(path, "is not a file", "name an engine file")
    return path.open("rb")


def _archive(path: Path, file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, EOFError, OverflowError):
        file.seek(0)
        if file.read(4) == _ZIP_MAGIC:
            problem = "is cut short or damaged: the table at the end of the file is missing"
            raise EngineFileError(path, problem) from None
        raise EngineFileError(path, "is not an engine file", MAKE) from None


def _member(path: Path, file: BinaryIO, archive: zipfile.ZipFile, name: str) -> bytes:
    """One stored member in a single read: `ZipFile.read` copies it several times and adds a CRC to
    our sha256.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise EngineFileError(path, f"its member {name} is missing") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise EngineFileError(path, f"its member {name} is compressed, so it was not written by us")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
        raise EngineFileError(path, f"its member {name} is damaged")
    file.seek(sum(_LOCAL_HEADER.unpack(header)), 1)
    content = file.read(info.file_size)
    if len(content) < info.file_size:
        raise EngineFileError(path, f"is cut short: {name} lacks its end")
    return content


def _manifest(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, Any]:
    if MANIFEST not in archive.namelist():
        raise EngineFileError(path, f"is a zip but not an engine file: it has no {MANIFEST}")
    try:
        raw = json.loads(_member(path, file, archive, MANIFEST))
    except ValueError as error:
        if isinstance(error, EngineFileError):
            raise
        raise EngineFileError(path, f"its {MANIFEST} is damaged ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise EngineFileError(path, f"its {MANIFEST} is not that of an engine file")
    version = raw.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise EngineFileError(
            path,
            f"is of engine format {version}, and this version reads up to {FORMAT_VERSION}",
            f"update yolov4_fast, or {REBUILD}",
        )
    return raw


def _to_json(manifest: Manifest, payload: Mapping[str, bytes]) -> dict[str, Any]:
    network = manifest.network
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "engine": manifest.kind,
        "precision": manifest.precision,
        "width": network.width,
        "height": network.height,
        "resize": manifest.resize,
        "max_batch": manifest.max_batch,
        "thresholds": {"confidence": manifest.confidence, "iou": manifest.iou},
        "class_names": list(manifest.class_names),
        "versions": dict(manifest.versions),
        "gpu": None if manifest.gpu is None else dict(manifest.gpu),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in payload.items()},
        "network": write_cfg(network),
    }


def _from_json(path: Path, raw: dict[str, Any]) -> Manifest:
    try:
        if not isinstance(raw["sha256"], dict):
            raise TypeError("sha256 is not a table")
        return Manifest(
            kind=raw["engine"],
            network=parse_cfg(raw["network"], source="network").resized(
                raw["width"], raw["height"]
            ),
            class_names=tuple(raw["class_names"]),
            resize=raw["resize"],
            precision=raw["precision"],
            max_batch=raw["max_batch"],
            confidence=raw["thresholds"]["confidence"],
            iou=raw["thresholds"]["iou"],
            versions=raw["versions"],
            gpu=raw["gpu"],
        )
    except KeyError as error:
        raise EngineFileError(path, f"its {MANIFEST} lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise EngineFileError(path, f"its {MANIFEST} is wrong: {error}") from None
