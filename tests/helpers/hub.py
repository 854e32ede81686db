"""Fake Hugging Face Hub, served over HTTP from memory, for the tests of downloads and uploads.

It answers the requests with which huggingface_hub downloads a repository (info, tree, resolve), of
a model or a data set, and
uploads to one (create, validation of the card, preupload, LFS batch and PUT, commit as JSON lines).
The token determines the permissions.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

WRITER, READER, COMMIT = "hf_writer", "hf_reader", "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Request handler of the fake Hub.

    `repos` maps "owner/name" -> path -> content. `private` holds the repositories that need a known
    token. "x/gated" is gated, "x/full" refuses large files, and a repository under "broken/" cannot
    be created.
    """

    repos: dict[str, dict[str, bytes]]
    private: set[str]
    requests: list[str]
    blobs: dict[str, bytes]  # files of the LFS store, by sha256
    commits: list[dict[str, Any]]  # repository, revision, summary and paths of each commit

    def do_GET(self) -> None:
        type(self).requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        path = path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/(revision|tree)/(\w+))?", path):
            repo, what, revision = found.groups()
            if (files := self.seen(repo, revision)) is None:
                return None
            if what == "tree":
                return self.send(
                    [
                        {"type": "file", "path": n, "size": len(f), "oid": n}
                        for n, f in files.items()
                    ]
                )
            names = [{"rfilename": name} for name in files]
            return self.send(
                {"id": repo, "sha": COMMIT, "siblings": names, "private": repo in self.private}
            )
        if found := re.fullmatch(r"/(\w+/[\w-]+)/resolve/(\w+)/(.+)", path):
            if (files := self.seen(found[1], found[2])) is None:
                return None
            return (
                self.send(files[found[3]])
                if found[3] in files
                else self.send({}, 404, "EntryNotFound")
            )
        return self.send({}, 404, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        type(self).requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if (token := self.token()) != WRITER:
            return self.send({"error": "no"}, *((403, "") if token == READER else (401, "")))
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/(\w+/[\w-]+)\.git/info/lfs/objects/batch", self.path):
            store = f"http://{self.headers['Host']}/lfs/{found[1]}/"
            objects = json.loads(body)["objects"]
            actions = [o | {"actions": {"upload": {"href": store + o["oid"]}}} for o in objects]
            return self.send({"objects": actions})
        if self.path == "/api/validate-yaml":  # the front matter of a README.md
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            ids = [front.get("base_model", "a/b"), *front.get("datasets", [])]
            errors = [
                {"message": f"{name} is no id"}
                for name in ids
                if name.count("/") != 1 or name[0] == "/"
            ]
            return self.send({"errors": errors, "warnings": []}, 400 if errors else 200)
        found = re.fullmatch(r"/api/models/(\w+/[\w-]+)/(preupload|commit)/(\w+)", self.path)
        if found is None:
            return self.send({"error": f"the fake Hub does not support {self.path}"}, 400)
        if self.seen(found[1], found[3]) is None:
            return None
        if found[2] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {
                path: "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
                for path in files
            }
            return self.send(
                {
                    "files": [
                        {"path": p, "uploadMode": m, "shouldIgnore": False}
                        for p, m in modes.items()
                    ]
                }
            )
        return self.commit(found[1], found[3], [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        type(self).requests.append(f"{self.command} {self.path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "/full/" in self.path:
            return self.send({"error": "no room"}, 403)
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.blobs[self.path.rpartition("/")[2]] = content
        return self.send({})

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo.startswith("broken/"):
            return self.send({"error": "out of order"}, 500)
        there = repo in self.repos
        self.repos.setdefault(repo, {})
        if not there and asked.get("visibility") == "private":
            self.private.add(repo)
        return self.send({"url": f"http://{self.headers['Host']}/{repo}"}, 409 if there else 200)

    def commit(self, repo: str, revision: str, lines: list[dict[str, Any]]) -> None:
        header, *files = [line["value"] for line in lines]
        contents = {
            f["path"]: base64.b64decode(f["content"]) if "content" in f else self.blobs[f["oid"]]
            for f in files
        }
        self.repos[repo] |= contents
        paths = [f["path"] for f in files]  # a file that is sent twice appears twice
        self.commits.append(
            {"repo": repo, "revision": revision, "summary": header["summary"], "paths": paths}
        )
        url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
        return self.send({"commitUrl": url, "commitOid": COMMIT})

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def seen(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        """Return the files of a repository. Send an error and return None if it is not visible."""
        if repo.endswith("/gated"):
            return self.send({}, 403, "GatedRepo")
        if repo not in self.repos or (
            repo in self.private and self.token() not in (WRITER, READER)
        ):
            return self.send({}, 404, "RepoNotFound")
        if revision not in (None, "main", "branch", COMMIT):
            return self.send({}, 404, "RevisionNotFound")
        return self.repos[repo]

    def send(self, body: Any, status: int = 200, error: str = "") -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        etag = hashlib.sha256(body).hexdigest()
        headers = {"Content-Length": len(body), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        for name, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


@contextmanager
def serve(repos: dict[str, dict[str, bytes]]) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """Run the fake Hub; yield its handler class and environment variables for huggingface_hub.

    The variables set its address (plain HTTP) and no token.
    """
    fresh: dict[str, Any] = {
        "repos": repos,
        "private": set(),
        "requests": [],
        "blobs": {},
        "commits": [],
    }
    hub: Any = type("Hub", (Hub,), fresh)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
    }
    try:
        yield hub, env | {"HF_HUB_OFFLINE": "0"}
    finally:
        server.shutdown()
        server.server_close()
