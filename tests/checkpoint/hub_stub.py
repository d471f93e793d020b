"""The few endpoints of the Hugging Face hub that an upload and a download need, on 127.0.0.1: repositories as maps of path to bytes.

Speaks the protocol of huggingface_hub's HfApi: create, preupload, LFS batch and transfer, commit, repository info, resolve.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

WRITER, READER = "hf_writer", "hf_reader"


class Hub:
    """A running stub: `url`, `repositories` {id: [(commit, {path: bytes})]}, `requests` [(method, path)]."""

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken_commits = 0
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def answer(self, status: int, data=None, body: bytes = b"", **headers: str) -> None:
        body = json.dumps(data).encode() if data is not None else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == WRITER:
            return False
        self.answer(403 if token == READER else 401, {"error": "You don't have the required permissions" if token == READER else "Invalid token"})
        return True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        state, path = self.state, unquote(urlparse(self.path).path)
        state.requests.append(("POST", path))
        raw = self.body()
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.refused():
            return None
        if path == "/api/repos/create":
            found = json.loads(raw)
            name = f"{found['organization']}/{found['name']}"
            if name in state.repositories:
                return self.answer(409, {"error": "You already created this model repo", "url": f"{state.url}/{name}"})
            state.repositories[name] = [(hashlib.sha1(name.encode()).hexdigest(), {})]
            return self.answer(200, {"url": f"{state.url}/{name}", "name": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(raw)["files"]
            ]
            return self.answer(200, {"files": modes})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [{**o, "actions": {"upload": {"href": f"{state.url}/storage/{o['oid']}"}}} for o in json.loads(raw)["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            if state.broken_commits:
                state.broken_commits -= 1
                return self.answer(409, {"error": "A commit has happened since"})
            files = dict(state.repositories[match[1]][-1][1])
            for line in raw.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = state.blobs[value["oid"]]
            commit = hashlib.sha1(raw).hexdigest()
            state.repositories[match[1]].append((commit, files))
            return self.answer(200, {"commitUrl": f"{state.url}/{match[1]}/commit/{commit}", "commitOid": commit, "commitMessage": "", "success": True})
        return self.answer(404, {"error": "not found"})

    def do_PUT(self) -> None:
        oid, raw = self.path.rpartition("/")[2], self.body()
        if hashlib.sha256(raw).hexdigest() != oid:
            return self.answer(400, {"error": "not what was announced"})
        self.state.blobs[oid] = raw
        return self.answer(200, {})

    def do_GET(self) -> None:
        state, path = self.state, unquote(urlparse(self.path).path)
        state.requests.append((self.command, path))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            found = self.at(match[1], match[2])
            if found is None:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return self.answer(200, {"id": match[1], "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            found = self.at(match[1], match[2])
            entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in found[1].items()] if found else []
            return self.answer(200 if found else 404, entries)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self.at(match[1], match[2])
            if found is None or match[3] not in found[1]:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0] if found else "")
            content = found[1][match[3]]
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(200, body=content, X_Repo_Commit=found[0], ETag=f'"{etag}"', Content_Type="application/octet-stream")
        return self.answer(404, {"error": "not found"})

    do_HEAD = do_GET

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.state.repositories.get(repo, [])
        return next((entry for entry in reversed(history) if revision in ("main", entry[0])), None)
