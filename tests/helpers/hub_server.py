"""A small server that answers as the Hub does, for what a download asks of it."""

import hashlib
import json
import re
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Answers of the Hub to every request, by a name: status, headers and body.
TROUBLE: dict[str, tuple[int, dict[str, str], bytes]] = {
    "gated": (
        403,
        {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."},
        b"{}",
    ),
    "bad token": (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        b'{"error": "Invalid credentials in Authorization header"}',
    ),
    "unknown": (
        404,
        {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
        b'{"error": "Repository not found"}',
    ),
    "private": (401, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound"}, b"{}"),
    "forbidden": (403, {"X-Error-Message": "You may not"}, b"{}"),
    "limited": (429, {"X-Error-Message": "We had to rate limit you"}, b"{}"),
    "broken": (500, {}, b"Internal error"),
    "busy": (503, {}, b"Service Unavailable"),
    "proxy": (407, {}, b"Proxy Authentication Required"),
}


class HubServer:
    """One repository, made of the files of a folder.

    Attributes:
        folder: The repository's files; what lies there when it is asked for is sent.
        trouble: A name of TROUBLE: what every request is answered with.
        damaged: Names of files that arrive with one bit changed.
        cut: Names of files of which half arrives.
        requests: The paths that were asked for.
        url: Where it listens.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.trouble: str | None = None
        self.damaged: set[str] = set()
        self.cut: set[str] = set()
        self.requests: list[str] = []
        self.revisions = {"main", "v1", COMMIT, COMMIT[:7]}
        self.url = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes, bool]:
        """Status, headers, body, and whether only half of it is sent."""
        self.requests.append(path)
        if self.trouble:
            return (*TROUBLE[self.trouble], False)
        if match := re.fullmatch(r"/api/models/[^/]+/[^/]+(?:/(revision|tree)/([^/]+))?", path):
            return self.listing(match[1], match[2])
        if match := re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path):
            return self.file(match[1])
        return 404, {}, b"{}", False

    def listing(self, kind: str | None, revision: str | None):
        if revision and revision not in self.revisions:
            return (*TROUBLE["no revision"], False)
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        sizes = {str(file.relative_to(self.folder)): file.stat().st_size for file in files}
        if kind == "tree":
            body: object = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in sizes.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            body = {"_id": "1", "id": "me/model", "sha": COMMIT, "siblings": siblings, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode(), False

    def file(self, name: str):
        if not (self.folder / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", False
        data = (self.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        # Small files are announced by git's hash, large ones by SHA-256.
        in_git = hashlib.sha1(b"blob %d\0" % len(data) + data)
        announced = in_git if name.endswith(".json") else hashlib.sha256(data)
        headers["ETag"] = f'"{announced.hexdigest()}"'
        if name in self.damaged:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return 200, headers, data, name in self.cut


def self_signed(folder: Path) -> Path:
    """A key and a certificate that nobody else signed, in one file."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    certificate.write_text(key.read_text() + certificate.read_text())
    return certificate


@contextmanager
def hub_server(folder: Path, certificate: Path | None = None) -> Iterator[HubServer]:
    """Serves a folder on this machine while the block runs; over TLS if it gets a certificate.

    As a proxy it refuses every way.
    """
    hub = HubServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            status, headers, body, is_cut = hub.answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if is_cut else body)
                self.close_connection = is_cut

        do_HEAD = do_GET

        def do_CONNECT(self):
            self.send_error(407)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args):
            pass  # a client that hangs up is what some tests are about

    server = Server(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
