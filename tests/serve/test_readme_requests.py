"""The commands and the program of the page on asking a server, run against one."""

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from http_parts import FakeBackend, changed
from serving_parts import picture

from ray_retrieval.serve.http import create_app

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "asking.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = re.findall(r"^(curl .*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    backend = FakeBackend(("quickstart",), ["a.jpg", "b.jpg"])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(backend, changed()), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(("photo.jpg", "other.jpg")):
        (tmp_path / name).write_bytes(picture(number, side=256, kind="JPEG"))
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    monkeypatch.setenv("CURL_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_work(command: str, address: str, folder: Path) -> None:
    made = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, address)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    if " -o " in command:
        assert any(folder.glob("*.png")) or any(folder.glob("small.jpg"))
    else:
        assert made.stdout.startswith("{")


def test_the_program_of_the_page_works(
    address: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(program.replace(ADDRESS, address), "asking.md", "exec"), {})
    assert "1 a.jpg 0 of 8 bits differ" in capsys.readouterr().out
