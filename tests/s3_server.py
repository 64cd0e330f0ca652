"""Object storage on loopback: as much of S3's interface as reading the files of a folder takes."""

import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from loopback import LoopbackServer


class S3Server(LoopbackServer):
    """The server; use it as a context manager. Objects are `bucket/key`."""

    def __init__(self):
        super().__init__(Handler)
        self.objects: dict[str, bytes] = {}
        self.sent = 0  # bytes of objects

    def url(self, path: str) -> str:
        """The URL by which Arrow finds a folder here."""
        return f"s3://{path}?scheme=http&endpoint_override={quote(f'127.0.0.1:{self.server_port}')}&region=us-east-1"

    def put_folder(self, path: str, folder: Path) -> None:
        for file in folder.iterdir():
            self.objects[f"{path}/{file.name}"] = file.read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query, path = parse_qs(parts.query), unquote(parts.path).strip("/")
        if "list-type" in query:
            return self.answer(self.listing(path, query.get("prefix", [""])[0]), kind="application/xml")
        content = self.server.objects.get(path)
        if content is None:
            return self.answer(b"", 404)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted:
            content = content[int(wanted[1]) : int(wanted[2]) + 1]
        if self.command == "GET":
            self.server.sent += len(content)
        self.answer(content, 206 if wanted else 200)

    def listing(self, bucket: str, prefix: str) -> bytes:
        start = len(bucket) + 1
        keys = [name[start:] for name in self.server.objects if name.startswith(f"{bucket}/{prefix}")]
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[f'{bucket}/{key}'])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        ).encode()

    def answer(self, content: bytes, status: int = 200, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
