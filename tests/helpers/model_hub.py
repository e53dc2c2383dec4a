"""A stand-in for the part of the Hugging Face hub that takes uploads of models, on the loopback."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.helpers.loopback import LoopbackServer


class ModelHub(LoopbackServer):
    """Takes commits to repositories of models, from whoever has the `token`; `files` has what they hold."""

    def __init__(self, token: str, *, refuses: int | None = None) -> None:
        self.token, self.refuses = token, refuses  # an HTTP status for everybody
        self.files: dict[str, dict[str, bytes]] = {}  # by repository and name
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}  # by SHA-256
        self.commits: list[tuple[str, str]] = []  # branch and message
        self.branches: list[str] = []  # besides main
        self.requests: list[str] = []
        super().__init__(Handler)


class Handler(BaseHTTPRequestHandler):
    hub: ModelHub

    def do_POST(self) -> None:
        body = self._body()
        if (status := self._refusal()) is not None:
            self._answer(status, {"error": "no"})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/branch/" in self.path:
            self.hub.branches.append(self.path.partition("/branch/")[2])
            self._answer(200, {})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer(200, {})  # checks of the card's metadata, and that a blob has arrived

    def do_PUT(self) -> None:
        content, digest = self._body(), self.path.rpartition("/")[2]
        is_whole = hashlib.sha256(content).hexdigest() == digest
        if is_whole:
            self.hub.blobs[digest] = content
        self._answer(200 if is_whole else 400, {})

    def _refusal(self) -> int | None:
        """The status for somebody who may not write."""
        if self.hub.refuses is not None:
            return self.hub.refuses
        return None if self.headers["Authorization"] == f"Bearer {self.hub.token}" else 401

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.hub.files:
            self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            return
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # by version of the client
        self.hub.files[name], self.hub.private[name] = {}, is_private
        self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{each['oid']}"}}}
            for each in wanted["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes) -> None:
        name, _, branch = self.path.removeprefix("/api/models/").partition("/commit/")
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append((branch, value["summary"]))
            elif line["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[name][value["path"]] = self.hub.blobs[value["oid"]]
        commit = "7" * 40
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _body(self) -> bytes:
        self.hub.requests.append(self.path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps stderr empty."""
