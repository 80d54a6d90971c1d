import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_retrieval.errors import RecipeError
from ray_retrieval.serve import keys as module
from ray_retrieval.serve.keys import Keys, new_key, read_keys


def test_a_key_is_found_and_nothing_like_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    anna, bob = new_key(path, "anna", "read"), new_key(path, "bob", "write")
    keys = Keys(path)
    found = keys.find(bob)
    assert found is not None
    assert (found.name, found.scope) == ("bob", "write")
    assert keys.find(anna) is not None
    for wrong in ("", anna[:-1], anna + "a", anna.upper(), "rr_", "\udcff"):
        assert keys.find(wrong) is None


def test_each_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    first, *_ = [new_key(path, name, "read") for name in ("anna", "bob", "carl")]
    keys, compared, compare = Keys(path), [], secrets.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(secrets, "compare_digest", counted)
    for secret in (first, "wrong"):
        compared.clear()
        keys.find(secret)
        assert compared == [(32, 32)] * 3


def test_the_file_does_not_tell_the_key_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    secret = new_key(path, "anna", "read")
    assert len(secret) > 40
    assert secret not in path.read_text()
    assert secret.removeprefix("rr_") not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert new_key(tmp_path / "others", "anna", "read") != secret


def test_comments_and_empty_lines_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# our keys\n\n")
    with pytest.raises(RecipeError, match="holds no key"):
        read_keys(path)
    new_key(path, "anna", "read")
    assert path.read_text().startswith("# our keys\n\nanna read sha256:")
    assert [key.name for key in read_keys(path)] == ["anna"]


def test_a_key_stands_on_a_line_of_its_own_whatever_an_editor_left(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    anna = new_key(path, "anna", "read")
    path.write_text(path.read_text().rstrip("\n"))
    bob = new_key(path, "bob", "write")
    keys = Keys(path)
    assert [getattr(keys.find(one), "name", None) for one in (anna, bob)] == ["anna", "bob"]


@pytest.mark.parametrize(
    "line", ["anna read", "anna read plain-secret", "anna admin sha256:%s:%s", "an/na read sha256:%s:%s"]
)
def test_a_line_that_is_none_is_refused_by_its_number_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    new_key(path, "bob", "read")
    with path.open("a") as file:
        file.write(line.replace("%s", "0" * 32, 1).replace("%s", "0" * 64) + "\n")
    with pytest.raises(RecipeError, match=":2") as caught:
        read_keys(path)
    assert "plain-secret" not in str(caught.value)


def test_names_are_taken_once_and_scopes_are_known(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    new_key(path, "anna", "read")
    with pytest.raises(RecipeError, match="there is a key 'anna'"):
        new_key(path, "anna", "write")
    with pytest.raises(RecipeError, match="no scope"):
        new_key(path, "bob", "all")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="name of a key"):
        new_key(path, "a b", "read")
    with pytest.raises(RecipeError, match="cannot be kept"):
        new_key(tmp_path / "no" / "folder", "anna", "read")


def test_a_key_is_taken_back_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RECHECK_S", 0.0)
    path = tmp_path / "keys"
    anna, bob = new_key(path, "anna", "read"), new_key(path, "bob", "read")
    keys = Keys(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[1])
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert keys.find(anna) is None
    assert keys.find(bob) is not None
    path.write_text(f"{lines[0]}broken\n")
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert keys.find(bob) is None, "a broken line keeps no other key in use"
    assert keys.find(anna) is not None


def test_a_file_that_changes_in_place_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RECHECK_S", 0.0)
    path = tmp_path / "keys"
    anna = new_key(path, "anna", "read")
    keys, text = Keys(path), path.read_text()
    path.write_text(f"{text[:-2]}{'0' if text[-2] != '0' else '1'}\n")
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert keys.find(anna) is None


@pytest.mark.parametrize("withdraw", [Path.unlink, lambda path: path.write_text("# none\n")])
def test_the_last_key_is_taken_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, withdraw: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(module, "_RECHECK_S", 0.0)
    path = tmp_path / "keys"
    anna = new_key(path, "anna", "read")
    keys = Keys(path)
    withdraw(path)
    assert keys.find(anna) is None


def test_a_process_that_begins_with_a_broken_file_takes_what_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RECHECK_S", 0.0)
    path = tmp_path / "keys"
    path.mkdir()
    keys = Keys(path)
    assert keys.none
    assert "cannot be read" in caplog.text
    path.rmdir()
    assert keys.none
    anna = new_key(path, "anna", "read")
    assert keys.find(anna) is not None
    with path.open("a") as file:
        file.write("bob read sha25")
    keys = Keys(path)
    assert not keys.none
    assert keys.find(anna) is not None
    assert "keys:2: the line is not" in caplog.text


def test_keys_stay_in_use_while_their_file_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RECHECK_S", 0.0)
    path = tmp_path / "keys"
    anna = new_key(path, "anna", "read")
    keys = Keys(path)
    text = path.read_text()
    path.unlink()
    path.mkdir()
    assert keys.find(anna) is not None
    path.rmdir()
    path.write_text(f"# back\n{text}")
    assert keys.find(anna) is not None
