"""An S3 server for tests: moto's, behind a gate that knows who asks for what and refuses some."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

KEY, SECRET = "RRTESTKEY", "a-secret-that-must-not-be-written"
BUCKET, CLOSED = "bucket", "closed"
"""Two buckets; nobody may do anything with the second."""

_DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
# What the tests set themselves, or what would be asked first.
_VARIABLES = re.compile("AWS_.*|RAY_ADDRESS")
_COMMANDS = """
import json, sys
from ray_retrieval.cli import app
from ray_retrieval.cluster import connect
with connect():
    for line in json.loads(sys.argv[1]):
        app(args=line, standalone_mode=False)
"""


@dataclass
class Gate:
    """Lets signed requests through to moto, but for the closed bucket's.

    Attributes:
        keys: access keys that requests were signed with; None for those that were not.
        requests: method and path of each, in the order that they came.
        held: the beginning of paths; what is to be written there waits until it is None, and is refused.
    """

    keys: set[str | None] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    held: str | None = None

    def __post_init__(self):
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ, start_response):
        signed = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        key = signed[1] if signed else None
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.keys.add(key)
        self.requests.append((method, path))
        if key is None or path.split("/")[1] == CLOSED or self._waited(method, path):
            body = b"" if method == "HEAD" else _DENIED
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start_response("403 Forbidden", headers)
            return [body]
        return self._moto(environ, start_response)

    def _waited(self, method, path):
        waits = False
        while self.held is not None and method in ("PUT", "POST") and path.startswith(self.held):
            waits = True
            time.sleep(0.05)
        return waits


class Server:
    """The server in a thread of this process; a `with` block ends it.

    Attributes:
        gate: what stands before it.
        address: `127.0.0.1:PORT`.
        variables: of the environment, for a process to find it and to be let in.
        client: boto3's, to look at the store by other means than those that are tested.
    """

    def __enter__(self):
        self.gate = Gate()
        self._server = make_server("127.0.0.1", 0, self.gate, threaded=True, request_handler=_QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://{self.address}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, key, data):
        """Make an object of bytes."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_folder(self, key, folder):
        """Make objects of all files below a folder."""
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def objects(self, prefix=""):
        """Keys of all objects of the bucket below a prefix but markers of folders, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return sorted(key for key in found if not key.endswith("/"))

    def read(self, key):
        """Bytes of an object; None where there is none."""
        try:
            return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def environment(self, temporary, **changes):
        """The environment of a process that finds it: of AWS nothing but its variables.

        Args:
            temporary: the folder of temporary files, Ray's among them: a short path.
            changes: variables that are otherwise; None for those that are not to be there.
        """
        here = {name: value for name, value in os.environ.items() if not _VARIABLES.fullmatch(name)}
        folders = {"TMPDIR": str(temporary), "RAY_TMPDIR": str(temporary)}
        wanted = {**here, **folders, **self.variables, **changes}
        return {name: value for name, value in wanted.items() if value is not None}


class _QuietHandler(MotoRequestHandler):
    def log(self, *_):
        pass


def python(code, environment, **options):
    """A process that runs some lines of Python."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def commands(lines, environment, log):
    """A process, and its group, that runs some command lines on one Ray of its own.

    Args:
        lines: of each its arguments.
        environment: of the process.
        log: a file for all that it writes.
    """
    with open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", _COMMANDS, json.dumps(lines)],
            env=environment,
            start_new_session=True,
            stdout=stream,
            stderr=stream,
        )
