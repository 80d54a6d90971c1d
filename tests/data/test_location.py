import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ray_retrieval.data import location
from ray_retrieval.errors import DataError


def test_expand_fills_in_home_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMAGES", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/someone")
    assert location.expand("$IMAGES/a") == f"{tmp_path}/a"
    assert location.expand("~/a") == "/home/someone/a"
    assert location.expand("s3://bucket/a/") == "s3://bucket/a"


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("/data", "a/b.png", "/data/a/b.png"),
        ("/data", "./a/../b.png", "/data/b.png"),
        ("/data", "/other/b.png", "/other/b.png"),
        ("/data", "s3://bucket/b.png", "s3://bucket/b.png"),
        ("s3://bucket/a", "./b.png", "s3://bucket/a/b.png"),
        ("s3://bucket/a?region=eu", "b.png", "s3://bucket/a/b.png?region=eu"),
    ],
)
def test_join_keeps_what_is_absolute(folder: str, name: str, expected: str) -> None:
    assert location.join(folder, name) == expected


def test_the_folder_and_the_name_of_a_file_leave_the_query_where_it_belongs() -> None:
    assert location.parent("/data/a/b.txt") == "/data/a"
    assert location.parent("s3://bucket/a/b.txt?scheme=http") == "s3://bucket/a?scheme=http"
    assert location.name_of("/data/a/b.txt") == "b.txt"
    assert location.name_of("s3://bucket/a/b.txt?endpoint_override=http://host") == "b.txt"


def test_a_uri_reads_as_the_local_path_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"hello")
    uri = f"file://{tmp_path}"
    assert location.read_bytes(f"{uri}/a/x.bin", 100) == b"hello"
    assert location.read_bytes(f"{tmp_path}/a/x.bin", 100) == b"hello"
    assert location.open_file(f"{uri}/a/x.bin").read() == b"hello"
    assert sorted(location.walk(uri)) == sorted(location.walk(str(tmp_path))) == ["a/x.bin"]
    assert location.files_in(f"{uri}/a") == ["x.bin"]


def test_the_limit_stops_the_reading_one_byte_beyond(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert location.read_bytes(str(tmp_path / "x"), 4) == b"01234"
    assert location.read_bytes(f"file://{tmp_path}/x", 4) == b"01234"


def test_walk_leaves_out_hidden_files_and_survives_a_loop_of_links(tmp_path: Path) -> None:
    for name in ("a/1.png", ".hidden/2.png", "a/.3.png", "__MACOSX/4.png", "lost+found/5.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert list(location.walk(str(tmp_path))) == ["a/1.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    listed = os.scandir

    def closed(folder: str) -> Any:
        if folder == str(tmp_path / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"/b: the folder cannot be read: Permission denied"):
        list(location.walk(str(tmp_path)))


def test_missing_file_and_unknown_store_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        location.read_bytes(str(tmp_path / "none"), 10)
    with pytest.raises(DataError, match="missing"):
        location.open_file(f"file://{tmp_path}/none")
    with pytest.raises(DataError, match="cannot be opened"):
        location.find("nosuchscheme://bucket/x")
    with pytest.raises(DataError, match="cannot be read"):
        location.read_bytes(str(tmp_path), 10)
