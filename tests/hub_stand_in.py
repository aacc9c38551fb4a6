"""A stand-in of the hub's HTTP API on this machine: takes a repository and a commit, and keeps the files."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """A server while its context is open. `refuses` answers every request with 403.

    `address` is its URL, `repositories` those made, `files` what was committed, `tokens` who asked.
    """

    def __init__(self, refuses: bool = False):
        self.refuses = refuses
        self.repositories: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            """Hands each request to the hub."""

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self._chunks()
                hub.tokens.add(self.headers.get("Authorization", ""))
                self._send(*hub.post(self.path, body))

            def do_GET(self) -> None:
                self._send(404, {"error": "nothing here"})

            do_HEAD = do_GET

            def _chunks(self) -> bytes:
                """A body that comes in chunks."""
                body = b""
                while self.headers.get("Transfer-Encoding") == "chunked":
                    size = int(self.rfile.readline(), 16)
                    body += self.rfile.read(size)
                    self.rfile.readline()
                    if not size:
                        break
                return body

            def _send(self, status: int, answer: dict) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *anything) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *anything) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, body: bytes) -> tuple[int, dict]:
        """(status, answer) of a request, as the hub documents them."""
        if self.refuses:
            return 403, {"error": "you may not write here"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else wish["name"]
            self.repositories.add(name)
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path.endswith("/preupload/main"):
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            return 200, {"files": modes}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"success": True, "commitOid": "0" * 40, "hookOutput": "",
                         "commitUrl": f"{self.address}/user/name/commit/{'0' * 40}"}
        return 404, {"error": f"nothing at {path}"}
