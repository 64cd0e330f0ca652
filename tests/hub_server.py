"""A Hub on loopback: the REST interface that huggingface_hub speaks, over repositories in memory.

Only what the clients of transformers, sentence-transformers, datasets and huggingface_hub ask for: repositories,
preupload, LFS upload, commits, branches and tags, file trees, and downloads with ranges. `drop` cuts connections.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import LoopbackServer

LFS_FROM = 10_000  # bytes; the Hub decides by .gitattributes and size
BINARY = (".safetensors", ".parquet", ".bin", ".npy")


@dataclass
class File:
    """One version of a file; its address is the sha256 for LFS and git's blob hash otherwise."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict:
        row = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            row["lfs"] = {"oid": self.oid, "sha256": self.oid, "size": len(self.content), "pointerSize": 130}
        return row


@dataclass
class Repository:
    """Commits, newest last, and the names that point to them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        listing = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr((listing, message, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = files
        self.messages[sha] = message
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        revision = revision.removeprefix("refs/heads/")
        sha = self.branches.get(revision) or self.tags.get(revision)
        return sha or next((found for found in self.commits if found.startswith(revision)), None)


class HubServer(LoopbackServer):
    """The server; use it as a context manager. `drop` maps a path's regular expression to the bytes it lets pass."""

    def __init__(self):
        super().__init__(Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.drop: dict[str, int] = {}
        self.log: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home) -> dict[str, str]:
        """What a client process needs to see this Hub only, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def put_folder(self, name: str, folder, kind: str = "model") -> None:
        """Makes a repository of a folder, without a client."""
        root = Path(folder)
        paths = [path for path in root.rglob("*") if path.is_file()]
        files = {str(path.relative_to(root)): File(path.read_bytes(), path.suffix in BINARY) for path in paths}
        repository = self.repositories[kind, name] = Repository()
        repository.commit("main", files, "initial commit")

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, File]:
        repository = self.repositories[kind, name]
        return repository.commits[repository.resolve(revision)]

    def handle_error(self, request, client_address):
        """A client that went away, or a connection that was cut on purpose, is no failure of the server."""


class NotFound(Exception):
    """Answered as 404 with the Hub's error code."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    # --- requests and answers ------------------------------------------------------------------------------------

    def do(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = parts.path, parse_qs(parts.query)
        self.server.log.append(f"{self.command} {unquote(path)}")
        self.server.tokens.add(self.headers.get("Authorization"))
        limit = next((count for pattern, count in self.server.drop.items() if re.search(pattern, unquote(path))), None)
        if limit is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(limit, int(self.headers.get("Content-Length") or limit)))
            return self.cut()
        self.limit = limit if self.command == "GET" else None
        self.body = self.read_body()
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    return action(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
            self.answer({"error": "no such route"}, 404)
        except NotFound as error:
            self.answer({"error": str(error)}, 404, {"X-Error-Code": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, content: dict | list | bytes, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.limit is not None and len(body) > self.limit:
            self.wfile.write(body[: self.limit])
            self.wfile.flush()
            return self.cut()
        self.wfile.write(body)

    # --- what the routes do --------------------------------------------------------------------------------------

    def repository(self, kind: str, name: str) -> Repository:
        found = self.server.repositories.get((kind or "model", name))
        if found is None or (found.private and not self.headers.get("Authorization")):
            raise NotFound("RepoNotFound")
        return found

    def version(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self.repository(kind, name)
        sha = repository.resolve(revision or "main")
        if sha is None:
            raise NotFound("RevisionNotFound")
        return sha, repository.commits[sha]

    def whoami(self) -> None:
        self.answer({"name": "tester", "type": "user", "orgs": [{"name": "org"}], "auth": {"type": "access_token"}})

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or 'tester'}/{asked['name']}"
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.server.repositories:
            return self.answer({"url": url, "error": "exists"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repository = self.server.repositories[kind, name] = Repository(private=private)
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.answer({"url": url})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        _, present = self.version(kind, name, revision)
        rows = []
        for asked in json.loads(self.body)["files"]:
            lfs = asked["path"].endswith(BINARY) or asked["size"] > LFS_FROM
            row = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if asked["path"] in present:
                row["oid"] = present[asked["path"]].oid
            rows.append(row)
        self.answer({"files": rows})

    def lfs_batch(self, kind: str, name: str) -> None:
        rows = []
        for asked in json.loads(self.body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.objects:
                row["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs-verify"},
                }
            rows.append(row)
        self.answer({"transfer": "basic", "objects": rows}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer({"error": "checksum"}, 422)
        self.server.objects[oid] = self.body
        self.answer({})

    def lfs_verify(self) -> None:
        known = json.loads(self.body)["oid"] in self.server.objects
        self.answer({}, 200 if known else 404)

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name)
        sha, present = self.version(kind, name, revision)
        files, message = dict(present), ""
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    return self.answer({"error": "parent commit is not the newest"}, 412)
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[value["path"]] = File(self.server.objects[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(folder)}
        new = repository.commit(revision.removeprefix("refs/heads/"), files, message)
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{new}", "commitOid": new, "pullRequestUrl": None})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        sha, files = self.version(kind, name, revision)
        siblings = [{"rfilename": path, "size": len(file.content), "blobId": file.oid} for path, file in files.items()]
        self.answer({"id": name, "sha": sha, "siblings": siblings, "private": self.repository(kind, name).private,
                     "gated": False, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, kind: str, name: str, revision: str, folder: str = "") -> None:
        sha, files = self.version(kind, name, revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows: dict[str, dict] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(len(parents) if recursive else min(1, len(parents))):
                above = prefix + "/".join(parents[: depth + 1])
                rows[above] = {"type": "directory", "path": above, "size": 0, "oid": sha}
            if recursive or not parents:
                rows[path] = file.entry(path)
        if prefix and not rows:
            raise NotFound("EntryNotFound")
        self.answer(list(rows.values()))

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        sha, files = self.version(kind, name, revision)
        asked = parse_qs(self.body.decode())
        if not asked and self.body:
            asked = json.loads(self.body)
        rows = []
        for path in asked.get("paths", []):
            if path in files:
                rows.append(files[path].entry(path))
            elif any(found.startswith(path.rstrip("/") + "/") for found in files):
                rows.append({"type": "directory", "path": path, "size": 0, "oid": sha})
        self.answer(rows)

    def refs(self, kind: str, name: str) -> None:
        repository = self.repository(kind, name)
        rows = {
            key: [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": sha} for ref, sha in found.items()]
            for key, folder, found in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        self.answer({**rows, "converts": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name)
        rows = [{"id": sha, "title": message, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
                for sha, message in reversed(repository.messages.items())]  # fmt: skip
        self.answer(rows)

    def branch(self, kind: str, name: str, branch: str) -> None:
        repository = self.repository(kind, name)
        if branch in repository.branches:
            return self.answer({"error": "exists"}, 409)
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[branch] = self.version(kind, name, start)[0]
        self.answer({})

    def tag(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name)
        repository.tags[json.loads(self.body)["tag"]] = self.version(kind, name, revision)[0]
        self.answer({})

    def download(self, kind: str, name: str, revision: str, path: str) -> None:
        sha, files = self.version(kind, name, revision)
        if path not in files:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.answer(file.content, 200, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(file.content)), len(file.content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(file.content)}"
        self.answer(file.content[start:stop], 206, headers)


NAME = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>model|dataset)s/{NAME}"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/(?:(?P<kind>dataset)s/)?{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", "/lfs-verify", Handler.lfs_verify),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", API, Handler.info),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", rf"{API}/refs", Handler.refs),
    ("GET", rf"{API}/commits/(?P<revision>[^/]+)", Handler.commits),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", Handler.tag),
    *[
        (method, rf"/(?:(?P<kind>dataset)s/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.download)
        for method in ("HEAD", "GET")
    ],
]
