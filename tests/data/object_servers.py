"""Servers for the tests of object stores: an endpoint like the Hugging Face Hub's, and a proxy that is slow
and cuts connections."""

import contextlib
import json
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "owner/pictures"


class _Hub(BaseHTTPRequestHandler):
    """The calls of huggingface_hub's file system, for the files {path: bytes} of one dataset."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def _json(self, content):
        self._send(json.dumps(content).encode(), Content_Type="application/json")

    def _missing(self):
        self._send(b"{}", 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")

    def _tree(self, folder: str, recursive: bool = False) -> list[dict]:
        begin, found = folder + "/" if folder else "", {}
        for path, content in self.server.files.items():
            if path.startswith(begin):
                parts = path[len(begin) :].split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    name = begin + "/".join(parts[:depth])
                    found[name] = dict(type="directory", oid="0", path=name, size=0)
                if recursive or len(parts) == 1:
                    found[path] = dict(type="file", oid=str(hash(content)), path=path, size=len(content))
        return list(found.values())

    def do_GET(self):
        asked = urllib.parse.urlparse(self.path)
        path, recursive = urllib.parse.unquote(asked.path), "recursive=true" in asked.query.lower()
        api, files = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/main/"
        if path in (api, api + "/revision/main"):
            return self._json(dict(id=REPOSITORY, sha="0" * 40, private=False, siblings=[], tags=[]))
        if path.startswith(api + "/tree/main"):
            tree = self._tree(path.removeprefix(api + "/tree/main").strip("/"), recursive)
            return self._json(tree) if tree else self._missing()
        content = self.server.files.get(path.removeprefix(files))
        if content is None:
            return self._missing()
        begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(begin) : int(end) + 1]
        self.server.ranges.append((path.removeprefix(files), int(begin), len(part)))
        return self._send(part, 206, Content_Range=f"bytes {begin}-{end}/{len(content)}")

    def do_HEAD(self):
        self._missing()

    def do_POST(self):
        asked = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        paths = asked.get("paths", [])
        above = [entry for path in paths for entry in self._tree(path.rpartition("/")[0])]
        self._json([entry for entry in above if entry["path"] in paths])


@contextlib.contextmanager
def hub(files: dict[str, bytes]):
    """A server of one dataset; `.ranges` lists (path, offset, bytes) of the reads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.daemon_threads, server.files, server.ranges = True, files, []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Proxy:
    """Forwards connections to a port of this machine. delay: seconds before each request is passed on.
    cuts: so many responses are cut after `cut_after` bytes, with their connections."""

    def __init__(self, port: int):
        self._port, self.delay, self.cuts, self.cut_after = port, 0.0, 0, 0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._server.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self._server.accept()[0]
                upstream = socket.create_connection(("127.0.0.1", self._port))
                for pump in (self._requests, self._responses):
                    threading.Thread(target=pump, args=(client, upstream), daemon=True).start()

    def _requests(self, client, upstream):
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                time.sleep(self.delay)
                upstream.sendall(data)
        self._end(client, upstream)

    def _responses(self, client, upstream):
        passed = 0
        with contextlib.suppress(OSError):
            while data := upstream.recv(1 << 16):
                passed += len(data)
                with self._lock:
                    cut = self.cuts > 0 and passed > self.cut_after
                    self.cuts -= cut
                client.sendall(data[: len(data) // 2] if cut else data)
                if cut:
                    break
        self._end(client, upstream)

    def _end(self, *sockets):
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
