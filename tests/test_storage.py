import os
import tempfile
import time

import pytest

from ray_retrieval.data import location
from ray_retrieval.errors import ArtefactError
from ray_retrieval.storage import (
    Folder,
    check_file,
    file_entry,
    fingerprint,
    meant_by,
    read_description,
    split_query,
    write_description,
)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    folder = Folder(tmp_path)
    folder.write_text("a", "old")

    def fail():
        with folder.writing("a") as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert folder.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, own=own: [done.append(name), own(*given)])
    Folder(tmp_path).write_text("a", "b")
    assert done == ["fsync", "replace"]


def test_files_of_killed_writers_are_unseen_and_swept(tmp_path):
    (tmp_path / "a.tmp-0123456789ab").write_text("half")
    folder = Folder(tmp_path)
    assert folder.names() == []
    folder.sweep()
    assert os.listdir(tmp_path) == []


def test_of_a_store_what_may_still_be_written_is_not_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(Folder, "is_local", False)
    for name, hours in (("new.tmp-0123456789ab", 23), ("old.tmp-0123456789ab", 25)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    Folder(tmp_path).sweep()
    assert os.listdir(tmp_path) == ["new.tmp-0123456789ab"]


def test_sweeping_deletes_nothing_that_no_writer_of_ours_has_left(tmp_path):
    """`--out` may be a folder in which somebody keeps files of their own."""
    own = ["thesis.tmp-draft.txt", "notes.tmp-0123", "a.tmp-0123456789ab.txt", "a.tmp-0123456789AB", "b.tmp-"]
    for name in own:
        (tmp_path / name).write_text("mine")
    for kept in ("old.tmp-backup", "old.tmp-0123456789ab"):
        (tmp_path / kept).mkdir()
        (tmp_path / kept / "letter").write_text("mine")
    folder = Folder(tmp_path)
    assert set(own) <= set(folder.names())
    folder.sweep()
    assert sorted(os.listdir(tmp_path)) == sorted([*own, "old.tmp-backup", "old.tmp-0123456789ab"])
    assert (tmp_path / "old.tmp-0123456789ab" / "letter").exists()


def test_what_a_killed_writer_leaves_has_the_name_that_is_swept(tmp_path):
    folder = Folder(tmp_path)
    with folder.writing("a") as stream:
        stream.write(b"half")
        (left,) = os.listdir(tmp_path)
    assert left != "a"
    assert meant_by(left) == "a"
    assert meant_by("a") is None


def test_remote_folders_behave_like_local_ones(tmp_path):
    remote = Folder(f"file://{tmp_path}/x") / "y"
    remote.write_json("a.json", {"k": [1, "ü"]})
    assert remote.read_json("a.json") == {"k": [1, "ü"]}
    assert remote.names() == ["a.json"]
    assert remote.local_path("a.json").read_bytes() == remote.read_bytes("a.json")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder that is taken for one of a store, and an empty folder for what is fetched."""
    (tmp_path / "fetched").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "fetched"))
    monkeypatch.setattr(Folder, "is_local", False)
    return Folder(tmp_path / "store")


def test_a_file_of_a_store_is_fetched_once_and_again_when_it_has_changed(store, monkeypatch):
    store.write_text("a", "one")
    fetched = store.local_path("a")
    assert fetched.read_text() == "one"
    assert fetched.parent.stat().st_mode & 0o077 == 0
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "chunks", None)
        assert store.local_path("a") == fetched
    store.write_text("a", "two")
    os.utime(store._at("a"), (time.time() + 5,) * 2)
    assert store.local_path("a").read_text() == "two"
    assert fetched.read_text() == "one"


def test_a_file_may_be_named_by_its_own_place(store):
    store.write_text("a", "one")
    file = Folder(store.uri_of("a"))
    assert file.local_path() == store.local_path("a")
    assert file.checksum() == store.checksum("a")


def test_lines_of_json(store):
    assert store.read_json_lines("a.jsonl") == {}
    store.write_text("a.jsonl", '{"text": "two\u2028lines"}\n\n{"k": 1}\n')
    assert store.read_json_lines("a.jsonl") == {1: {"text": "two\u2028lines"}, 3: {"k": 1}}
    for damaged in ('{"k": ', "3"):
        store.write_text("a.jsonl", f'{{"k": 1}}\n{damaged}\n')
        with pytest.raises(ArtefactError, match=r"a\.jsonl: line 2 is not valid JSON.*remove the line"):
            store.read_json_lines("a.jsonl")


def test_what_somebody_else_may_have_fetched_is_not_taken(store, monkeypatch):
    store.write_text("a", "one")
    somebody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody)
    with pytest.raises(ArtefactError, match="belongs to somebody else"):
        store.local_path("a")


def test_names_in_uris_may_hold_spaces(tmp_path):
    folder = Folder(f"file://{tmp_path}/a folder/50%25")
    folder.write_text("x y", "z")
    assert (tmp_path / "a folder" / "50%" / "x y").read_text() == "z"
    assert Folder(folder.uri_of("x y")).parent.names() == ["x y"]
    assert Folder(folder.uri_of("x%20y")).local_path() == tmp_path / "a folder" / "50%" / "x y"
    assert Folder("/a").parent.uri == "/"


def test_unknown_scheme_names_the_address():
    with pytest.raises(ArtefactError, match="nosuch://x"):
        Folder("nosuch://x")


def test_environment_variables_and_home_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    assert Folder("$SOMEWHERE/a").uri == f"{tmp_path}/a"
    assert Folder("~/a").uri == f"{tmp_path}/home/a"


def test_an_empty_path_is_not_this_folder(monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    for path in ("", "$EMPTY"):
        with pytest.raises(ArtefactError, match="names no folder"):
            Folder(path)
    assert Folder(".").uri == os.getcwd()


@pytest.mark.parametrize("path", ["$NOWHERE/a", "a/${NOWHERE}/b", "/data/$NOWHERE", "s3://$NOWHERE/a"])
def test_a_variable_that_is_not_set_is_no_folder(path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ArtefactError, match="the environment variable NOWHERE is not set") as caught:
        Folder(path)
    assert caught.value.where == path


def test_a_folder_may_be_called_like_a_variable(tmp_path):
    (tmp_path / "$recycled").mkdir()
    assert (Folder(tmp_path / "$recycled") / "a").uri == f"{tmp_path}/$recycled/a"
    for name in ("us$er", "$5 a day"):
        assert Folder(tmp_path / name).uri == f"{tmp_path}/{name}"


QUERY = "?endpoint_override=localhost:1&scheme=http"


@pytest.mark.parametrize("path", ["s3://b/x/", "s3://b/x", "s3://b//x//"])
def test_slashes_that_say_nothing_make_no_other_place(path):
    folder = Folder(path + QUERY)
    assert folder.uri == f"s3://b/x{QUERY}"
    assert folder.path == "b/x"
    assert (folder / "model").path == "b/x/model"
    assert (folder / "model").parent.uri == folder.uri
    assert location.join(location.expand(path + QUERY), "a.jpg") == f"s3://b/x/a.jpg{QUERY}"


def test_the_root_of_the_disk_has_a_uri(tmp_path):
    assert Folder("file:///").exists(str(tmp_path).lstrip("/"))


def test_a_name_that_no_store_takes_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="the store refuses: Embedded NUL"):
        Folder(tmp_path).exists("a\0b")


@pytest.mark.parametrize("content", [True, False])
def test_truncated_files_are_damage(tmp_path, content):
    folder = Folder(tmp_path)
    folder.write_bytes("a", b"12345")
    entry = file_entry(folder, "a")
    check_file(folder, entry, content=content)
    folder.write_bytes("a", b"1234")
    with pytest.raises(ArtefactError, match=r"/a: damaged: 4 bytes, 5 were written"):
        check_file(folder, entry, content=content)


def test_changed_bytes_are_damage_when_content_is_read(tmp_path):
    folder = Folder(tmp_path)
    folder.write_bytes("a", b"12345")
    entry = file_entry(folder, "a")
    folder.write_bytes("a", b"12346")
    check_file(folder, entry, content=False)
    with pytest.raises(ArtefactError, match="checksum"):
        check_file(folder, entry, content=True)


def test_descriptions_say_what_they_are(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(ArtefactError, match=r"no model here: model.json is missing \("):
        read_description(folder, "model.json", kind="model", version=1)
    with pytest.raises(ArtefactError, match=r"nowhere: no model here: no such folder \(check the path\)"):
        read_description(folder / "nowhere", "model.json", kind="model", version=1)
    folder.write_text("a-file", "")
    with pytest.raises(ArtefactError, match="a-file: no model here: a folder is expected, this is a file"):
        read_description(folder / "a-file", "model.json", kind="model", version=1)
    write_description(folder, "model.json", kind="index", version=1, body={})
    with pytest.raises(ArtefactError, match="does not describe a model"):
        read_description(folder, "model.json", kind="model", version=1)
    write_description(folder, "model.json", kind="model", version=2, body={})
    with pytest.raises(ArtefactError, match="version 2, this program reads version 1"):
        read_description(folder, "model.json", kind="model", version=1)


def test_broken_json_is_named(tmp_path):
    folder = Folder(tmp_path)
    folder.write_text("model.json", "{")
    with pytest.raises(ArtefactError, match=r"model.json: not valid JSON"):
        folder.read_json("model.json")


def test_fingerprints_ignore_the_order_of_keys_but_not_values():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_only_a_uri_has_a_query():
    assert split_query("s3://b/k?endpoint_override=h:9&scheme=http") == (
        "s3://b/k",
        "?endpoint_override=h:9&scheme=http",
    )
    assert split_query("s3://b/k") == ("s3://b/k", "")
    assert split_query("/photos/what?.npy") == ("/photos/what?.npy", "")


@pytest.mark.parametrize(
    ("folder", "location", "path"),
    [
        ("/a/b", "/a/b/c/d", "c/d"),
        ("/a/b", "/a/b", ""),
        ("/a/b", "/a/bc", None),
        ("/", "/a", "a"),
        ("s3://bucket/a?region=x", "s3://bucket/a/b?region=x", "b"),
        ("s3://bucket/a", "/bucket/a/b", None),
    ],
)
def test_what_lies_inside_a_folder(folder, location, path):
    assert Folder(folder).path_inside(location) == path
