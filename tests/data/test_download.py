"""Downloads against a local server that drops connections, changes files and refuses."""

import hashlib
import http.server
import io
import tarfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pytest

from ray_retrieval.data import download as module
from ray_retrieval.data.download import SOURCES, Source, download, fetch, unpack
from ray_retrieval.errors import DataError, StoreError
from ray_retrieval.lock import writing_alone
from ray_retrieval.storage import Folder

BODY = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class Shelf:
    """What the server has, and how it behaves.

    Attributes:
        files: path → bytes.
        drops: how many bytes each of the next answers brings before the connection breaks; then all.
        statuses: of the next answers; then what is right.
        ranges: whether parts are given.
        misread: how many of the next parts begin at the first byte, whatever was asked for.
        headers: of every answer.
        asked: (path, Range) of each request.
    """

    url: str = ""
    files: dict = field(default_factory=dict)
    drops: list = field(default_factory=list)
    statuses: list = field(default_factory=list)
    ranges: bool = True
    misread: int = 0
    headers: dict = field(default_factory=lambda: {"ETag": '"one"'})
    asked: list = field(default_factory=list)


@pytest.fixture
def shelf():
    shelf = Shelf(files={"/file": BODY})

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked = self.headers.get("Range")
            shelf.asked.append((self.path, asked))
            status = shelf.statuses.pop(0) if shelf.statuses else None
            if status or self.path not in shelf.files:
                self.send_error(status or 404)
                return
            body, start = shelf.files[self.path], 0
            same = self.headers.get("If-Range") in shelf.headers.values()
            if asked and shelf.ranges and same:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if shelf.misread:
                    start, shelf.misread = 0, shelf.misread - 1
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            for name, value in shelf.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            sent = body[start:]
            self.wfile.write(sent[: shelf.drops.pop(0)] if shelf.drops else sent)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    shelf.url = f"http://127.0.0.1:{server.server_port}"
    yield shelf
    server.shutdown()
    server.server_close()
    thread.join()


def get(shelf, tmp_path, path="/file", **settings):
    return download(shelf.url + path, tmp_path / "deep" / "file", pause_s=0, **settings)


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "deep").iterdir())


def test_a_file_is_fetched_whole_and_then_not_again(shelf, tmp_path):
    seen = []
    target = get(shelf, tmp_path, sha256=SHA256, progress=lambda have, total: seen.append((have, total)))
    assert target.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert [have for have, _ in seen] == sorted({have for have, _ in seen})
    get(shelf, tmp_path, sha256=SHA256)
    assert len(shelf.asked) == 1
    assert left(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "headers", [{"ETag": '"one"'}, {"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"}], ids=["tag", "date"]
)
def test_a_broken_connection_is_taken_up_where_it_broke(shelf, tmp_path, headers):
    shelf.headers, shelf.drops = headers, [1_000_000, 0, 500_000]
    assert get(shelf, tmp_path, sha256=SHA256).read_bytes() == BODY
    starts = [asked for _, asked in shelf.asked]
    assert starts == [None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]


def test_another_call_goes_on_where_the_last_one_gave_up(shelf, tmp_path):
    shelf.drops = [1_000_000] + [0] * 10
    with pytest.raises(StoreError, match="nothing came in 5 attempts"):
        get(shelf, tmp_path)
    assert left(tmp_path) == ["file.part", "file.part.tag"]
    shelf.drops.clear()
    assert get(shelf, tmp_path, md5=hashlib.md5(BODY).hexdigest()).read_bytes() == BODY
    assert shelf.asked[-1][1] == "bytes=1000000-"
    assert left(tmp_path) == ["file"]


def test_a_file_that_has_changed_meanwhile_is_begun_anew(shelf, tmp_path):
    shelf.drops = [1_000_000] + [0] * 10
    with pytest.raises(StoreError):
        get(shelf, tmp_path)
    shelf.drops.clear()
    shelf.files["/file"], shelf.headers = BODY[::-1], {"ETag": '"two"'}
    assert get(shelf, tmp_path).read_bytes() == BODY[::-1]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}], ids=["none", "weak"])
def test_nothing_is_joined_that_may_not_belong_together(shelf, tmp_path, headers):
    shelf.headers, shelf.drops = headers, [1_000_000]
    assert get(shelf, tmp_path).read_bytes() == BODY
    assert [asked for _, asked in shelf.asked] == [None, None]


def test_another_part_than_was_asked_for_is_not_joined(shelf, tmp_path):
    shelf.drops, shelf.misread = [1_000_000], 1
    assert get(shelf, tmp_path).read_bytes() == BODY
    assert len(shelf.asked) == 3


def test_a_server_without_parts_is_asked_for_all(shelf, tmp_path):
    shelf.ranges, shelf.drops = False, [1_000_000]
    assert get(shelf, tmp_path, sha256=SHA256).read_bytes() == BODY


def test_a_killed_call_may_leave_all_bytes_without_the_name(shelf, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file.part").write_bytes(BODY)
    (tmp_path / "deep/file.part.tag").write_text('"one"')
    assert get(shelf, tmp_path, sha256=SHA256).read_bytes() == BODY
    assert len(shelf.asked) == 1  # It has nothing to add.


def test_too_many_bytes_are_thrown_away(shelf, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file.part").write_bytes(BODY + b"more")
    (tmp_path / "deep/file.part.tag").write_text('"one"')
    assert get(shelf, tmp_path).read_bytes() == BODY


def test_a_wrong_checksum_leaves_nothing(shelf, tmp_path):
    with pytest.raises(DataError, match="another checksum"):
        get(shelf, tmp_path, sha256="0" * 64)
    assert left(tmp_path) == []


def test_a_file_of_another_checksum_is_refused_and_kept(shelf, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"not the published one.*remove it"):
        get(shelf, tmp_path, sha256=SHA256)
    assert (tmp_path / "deep/file").read_bytes() == b"mine"
    assert not shelf.asked


def in_another_process(place, monkeypatch, end):
    """As if another process were at a place, which is done when it has been waited for once."""
    held = ExitStack()
    held.enter_context(writing_alone(Folder(f"{place}.lock"), "download"))

    def wait(_seconds):
        end()
        held.close()

    monkeypatch.setattr(module.time, "sleep", wait)


def test_a_file_that_another_process_fetches_is_waited_for(shelf, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    target, said = tmp_path / "deep" / "file", []
    in_another_process(f"{target}.part", monkeypatch, lambda: target.write_bytes(BODY))
    assert get(shelf, tmp_path, sha256=SHA256, say=said.append) == target
    assert shelf.asked == []
    assert said == ["file.part: another process is at it, which is waited for"]
    assert left(tmp_path) == ["file"]
    target.unlink()
    in_another_process(f"{target}.part", monkeypatch, lambda: None)  # it was killed
    (tmp_path / "deep" / "file.part").write_bytes(BODY[:10])
    (tmp_path / "deep" / "file.part.tag").write_text('"one"')
    assert get(shelf, tmp_path, sha256=SHA256).read_bytes() == BODY
    assert [asked for _, asked in shelf.asked] == ["bytes=10-"]
    assert left(tmp_path) == ["file"]


def test_archives_that_another_process_unpacks_are_waited_for(shelf, tmp_path, monkeypatch):
    shelf.files["/1.tgz"] = archive(["a/1.jpg"])
    unfinished = tmp_path / "jpg.part"
    unfinished.mkdir()
    (unfinished / "2.jpg").write_bytes(b"abc")
    in_another_process(unfinished, monkeypatch, lambda: unfinished.rename(tmp_path / "jpg"))
    fetch([Source(f"{shelf.url}/1.tgz", "1.tgz", unpack="jpg", flat=True)], tmp_path)
    assert [path.name for path in (tmp_path / "jpg").iterdir()] == ["2.jpg"]
    assert shelf.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["jpg"]


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(shelf, tmp_path):
    shelf.statuses = [503, 429]
    assert get(shelf, tmp_path).read_bytes() == BODY
    with pytest.raises(DataError, match="404") as caught:
        download(f"{shelf.url}/none", tmp_path / "none", pause_s=0)
    assert not isinstance(caught.value, StoreError)
    assert len(shelf.asked) == 4


def test_no_server_is_an_error_of_one_line(shelf, tmp_path):
    url = f"http://127.0.0.1:{free_port()}/file"
    with pytest.raises(StoreError, match="nothing came") as caught:
        download(url, tmp_path / "file", pause_s=0)
    assert "\n" not in str(caught.value)


def free_port():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.server_close()
    return server.server_port


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a", "photos/a.jpg"])
def test_only_http_is_fetched(url, tmp_path):
    with pytest.raises(DataError, match="only http"):
        download(url, tmp_path / "file")


def test_a_place_that_cannot_be_written_is_named(shelf, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written"):
        download(f"{shelf.url}/file", tmp_path / "taken" / "file")


def archive(names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            opened.addfile(member, io.BytesIO(b"abc"))
    return buffer.getvalue()


def test_archives_of_one_folder_are_unpacked_together_and_removed(shelf, tmp_path):
    shelf.files |= {"/1.tgz": archive(["paris/eiffel/1.jpg"]), "/2.tgz": archive(["paris/louvre/2.jpg"])}
    sources = [
        Source(f"{shelf.url}/{n}.tgz", f"test/set/{n}.tgz", unpack="test/set/jpg", flat=True) for n in (1, 2)
    ]
    sources.append(Source(f"{shelf.url}/file", "test/set/gnd.pkl"))
    for _ in range(2):
        fetch(sources, tmp_path)
        found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        assert found == ["test/set/gnd.pkl", "test/set/jpg/1.jpg", "test/set/jpg/2.jpg"]
    assert len(shelf.asked) == 3


def test_what_comes_is_told_at_its_start_now_and_then_and_at_its_end(shelf, tmp_path, monkeypatch):
    shelf.files["/1.tgz"] = archive(["a/1.jpg"])
    said = []
    sources = [
        Source(f"{shelf.url}/1.tgz", "1.tgz", unpack="jpg", flat=True),
        Source(f"{shelf.url}/file", "gnd.pkl"),
    ]
    fetch(sources, tmp_path, said.append)
    told = [line.split(":")[0] for line in said]
    assert list(dict.fromkeys(told)) == ["gnd.pkl", "1.tgz"]
    assert said[-1] == f"1.tgz: unpacking into {tmp_path / 'jpg'}"
    fetch(sources, tmp_path, said.append)
    assert len(said) == len(told)

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    said.clear()
    progress = module.telling("big.tgz", said.append)
    for second in range(26):
        now[0] = float(second)
        progress((second + 1) * 10_000_000, 260_000_000)
    assert said == [
        "big.tgz: 10 of 260 MB",
        "big.tgz: 110 of 260 MB · 10.0 MB/s · 15 s left",
        "big.tgz: 210 of 260 MB · 10.0 MB/s · 5 s left",
        "big.tgz: 260 of 260 MB · 10.0 MB/s",
    ]


def test_folders_of_an_archive_are_kept_where_they_matter(tmp_path):
    (tmp_path / "a.tgz").write_bytes(archive(["ef/cd/ab/abcdef"]))
    unpack(tmp_path / "a.tgz", tmp_path / "ims")
    assert (tmp_path / "ims/ef/cd/ab/abcdef").read_bytes() == b"abc"


@pytest.mark.parametrize("names", [["../outside"], ["a", "../../outside"]])
def test_an_archive_cannot_write_outside_of_its_folder(tmp_path, names):
    (tmp_path / "a.tgz").write_bytes(archive(names))
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "a.tgz", tmp_path / "in" / "side")
    assert not list(tmp_path.rglob("outside"))


def test_a_damaged_archive_is_an_error_and_leaves_no_folder(shelf, tmp_path):
    shelf.files["/1.tgz"] = archive(["a"])[:-20]
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch([Source(f"{shelf.url}/1.tgz", "1.tgz", unpack="jpg")], tmp_path)
    assert not (tmp_path / "jpg").exists()


def test_addresses_are_those_of_the_projects():
    assert set(SOURCES) == {*("retrieval-SfM-120k", "oxford5k", "paris6k", "roxford5k", "rparis6k")}
    for sources in SOURCES.values():
        for source in sources:
            assert source.url.split("/")[2] in {"cmp.felk.cvut.cz", "www.robots.ox.ac.uk"}
            assert source.url.endswith(source.file.rsplit("/", 1)[-1])
    assert SOURCES["roxford5k"][1] is SOURCES["oxford5k"][1]


def test_no_connection_waits_for_ever():
    assert 0 < module._TIMEOUT_S <= 120
