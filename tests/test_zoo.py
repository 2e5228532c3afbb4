"""Fetching official weights, against a server on loopback that can misbehave."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from yolov4_fast import zoo
from yolov4_fast.network.architectures import by_name

CONTENT = bytes(i * 7919 % 251 for i in range(100_000)) * 6  # more than two chunks
OTHER = CONTENT[::-1]
OFFICIAL = zoo.Official(
    "yolov4/test.weights",
    len(CONTENT),
    ("0" * 64, hashlib.sha256(CONTENT).hexdigest()),
)


@dataclass
class Behaviour:
    """What the server does next, and what it was asked."""

    content: bytes = CONTENT
    status: int = 200
    ranges: bool = True
    etag: str = '"one"'
    drops: list[int] = field(default_factory=list)  # bytes sent before each broken connection
    requests: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        b = self.behaviour
        b.requests.append({"path": self.path, **dict(self.headers)})
        if b.status != 200:
            self.send_error(b.status)
            return
        start = 0
        if b.ranges and "Range" in self.headers and self.headers.get("If-Range", b.etag) == b.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(b.content):
                self.send_error(416)
                return
            self.send_response(206)
            end = len(b.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        else:
            self.send_response(200)
        self.send_header("ETag", b.etag)
        self.send_header("Content-Length", str(len(b.content) - start))
        self.end_headers()
        body = b.content[start:]
        self.wfile.write(body[: b.drops.pop(0)] if b.drops else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Behaviour]:
    behaviour = Behaviour()
    handler = type("TestHandler", (Handler,), {"behaviour": behaviour})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv(zoo.BASE_URL_VARIABLE, f"http://127.0.0.1:{http.server_address[1]}/mirror/")
    monkeypatch.setitem(zoo.OFFICIAL, "test", OFFICIAL)
    monkeypatch.setattr(zoo, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    yield behaviour
    http.shutdown()
    thread.join()
    http.server_close()


def part_of(cache: Path) -> Path:
    return cache / "test.weights.part"


def test_a_file_is_fetched_once_and_cached(server: Behaviour, tmp_path: Path) -> None:
    path = zoo.fetch("test", tmp_path / "new")
    assert path == tmp_path / "new" / "test.weights"
    assert path.read_bytes() == CONTENT
    assert zoo.fetch("test", tmp_path / "new") == path
    assert [r["path"] for r in server.requests] == ["/mirror/yolov4/test.weights"]
    assert not part_of(path.parent).exists()


def test_a_truncated_part_is_resumed(server: Behaviour, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT[:123_456])
    assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT
    assert [r["Range"] for r in server.requests] == ["bytes=123456-"]


def test_a_dropped_transfer_goes_on_where_it_broke_off(server: Behaviour, tmp_path: Path) -> None:
    server.drops = [300_000, 100_000, 0]
    assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT
    assert [r.get("Range") for r in server.requests] == [
        None,
        "bytes=300000-",
        "bytes=400000-",
        "bytes=400000-",
    ]
    assert [r.get("If-Range") for r in server.requests] == [None, *['"one"'] * 3]


def test_a_server_without_ranges_sends_everything_again(server: Behaviour, tmp_path: Path) -> None:
    server.ranges = False
    server.drops = [300_000]
    part_of(tmp_path).write_bytes(OTHER[:123_456])
    assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_file_that_changes_between_two_transfers(server: Behaviour, tmp_path: Path) -> None:
    server.content, server.drops = OTHER, [200_000]
    original = Handler.do_GET

    def change(handler: Handler) -> None:
        original(handler)
        server.content, server.etag = CONTENT, '"two"'

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_GET", change)
        assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT


def test_a_part_of_another_version_is_started_over(server: Behaviour, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(OTHER[:1000])
    assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT
    assert [r.get("Range") for r in server.requests] == ["bytes=1000-", None]


def test_a_part_that_is_too_long_is_started_over(server: Behaviour, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT + b"x")
    assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT


def test_wrong_content_is_refused_and_removed(server: Behaviour, tmp_path: Path) -> None:
    server.content = OTHER
    with pytest.raises(zoo.FetchError, match="not the official file"):
        zoo.fetch("test", tmp_path)
    assert not part_of(tmp_path).exists() and not (tmp_path / "test.weights").exists()


def test_a_server_that_offers_another_size(server: Behaviour, tmp_path: Path) -> None:
    server.content = b"<html>log in first</html>"
    with pytest.raises(zoo.FetchError, match=r"offers 25 bytes, .* 600,000"):
        zoo.fetch("test", tmp_path)
    assert not part_of(tmp_path).exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Behaviour, tmp_path: Path) -> None:
    (tmp_path / "test.weights").write_bytes(OTHER)
    assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT


def test_404_is_not_tried_again(server: Behaviour, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(zoo.FetchError, match=r"/mirror/yolov4/test.weights: 404 Not Found"):
        zoo.fetch("test", tmp_path)
    assert len(server.requests) == 1


def test_a_failing_server_is_tried_a_few_times(server: Behaviour, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(zoo.FetchError, match="503"):
        zoo.fetch("test", tmp_path)
    assert len(server.requests) == 4


def test_a_transfer_that_keeps_breaking_off_keeps_its_part(
    server: Behaviour, tmp_path: Path
) -> None:
    server.drops = [50_000, *[0] * 10]
    with pytest.raises(zoo.FetchError, match=r"broke off.*; 50,000 of 600,000 bytes are here"):
        zoo.fetch("test", tmp_path)
    server.drops = []
    assert zoo.fetch("test", tmp_path).read_bytes() == CONTENT


def test_offline(server: Behaviour, tmp_path: Path) -> None:
    with pytest.raises(zoo.FetchError, match="cannot be reached"):
        zoo.fetch("test", tmp_path, base_url="http://127.0.0.1:9")
    assert not server.requests


def _fetch(cache: Path, base_url: str) -> None:
    zoo.OFFICIAL["test"] = OFFICIAL
    zoo.fetch("test", cache, base_url=base_url)


def test_two_processes_fetch_one_file(
    server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path, os.environ[zoo.BASE_URL_VARIABLE])
    workers = [context.Process(target=_fetch, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "test.weights").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_unknown_names_and_addresses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'yolov9', but yolov4, yolov4-tiny"):
        zoo.fetch("yolov9", tmp_path)
    with pytest.raises(ValueError, match="base URL"):
        zoo.fetch("yolov4", tmp_path, base_url="mirror.example")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert zoo.cache_folder() == Path("/somewhere/yolov4_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert zoo.cache_folder() == Path("/home/somebody/.cache/yolov4_fast")


@pytest.mark.parametrize("name", zoo.OFFICIAL)
def test_official_sizes_are_those_of_the_architectures(name: str) -> None:
    network = by_name(name)
    statistics = 2 * sum(conv.filters for _, conv in network.convolutions() if conv.batch_normalize)
    assert zoo.OFFICIAL[name].size == 20 + 4 * (network.parameters() + statistics)


def test_coco_names_are_in_darknets_order() -> None:
    assert len(set(zoo.COCO_NAMES)) == 80
    chosen = {0: "person", 4: "aeroplane", 9: "traffic light", 38: "tennis racket", 57: "sofa"}
    assert {i: zoo.COCO_NAMES[i] for i in chosen} == chosen
    assert zoo.COCO_NAMES[79] == "toothbrush"
