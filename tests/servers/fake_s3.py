"""A small S3 on loopback that can be told to misbehave, for what no real server does when asked to."""

import contextlib
import re
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

BUCKET = "bucket"


class FakeS3(ThreadingHTTPServer):
    """Whole objects in a dict, one bucket.

    Attributes:
        objects: key -> bytes.
        log: method and key of every request.
        ignores_conditions: takes a create for a plain write, as some servers do.
        conflicts: number of creates still to be answered with 409 without writing.
        losses: number of writes still to be done and then not answered.
        cuts: number of reads still to be cut off in the middle.
        refusal: status and code by which everything is refused; None for nothing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.log: list[tuple[str, str]] = []
        self.ignores_conditions = False
        self.conflicts = 0
        self.losses = 0
        self.cuts = 0
        self.refusal: tuple[int, str] | None = None

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is no news


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer in one packet
    server: FakeS3

    def log_message(self, *args) -> None:
        pass

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = url.path.lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store = self.server
        with store.lock:
            store.log.append((self.command, key))
            if store.refusal is not None:
                return self.answer(*store.refusal)
            if bucket != BUCKET:
                return self.answer(404, "NoSuchBucket")
            if self.command == "GET" and not key:
                return self.answer_list(parse_qs(url.query).get("prefix", [""])[0])
            if self.command == "PUT":
                return self.take(key, body)
            if self.command == "POST" and url.query == "delete":
                gone = re.findall("<Key>(.*?)</Key>", body.decode())
                for key in gone:
                    store.objects.pop(key, None)
                deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in gone)
                return self.answer(200, body=f"<DeleteResult>{deleted}</DeleteResult>".encode())
            if key not in store.objects:
                return self.answer(404, "NoSuchKey")
            if self.command == "GET" and store.cuts:
                store.cuts -= 1
                self.close_connection = True
                return self.answer(200, body=store.objects[key], cut=True)
            return self.answer(200, body=store.objects[key])

    do_GET = do_HEAD = do_PUT = do_POST = handle_one

    def take(self, key: str, body: bytes) -> None:
        store = self.server
        if self.headers.get("If-None-Match") == "*" and not store.ignores_conditions:
            if store.conflicts:
                store.conflicts -= 1
                return self.answer(409, "ConditionalRequestConflict")
            if key in store.objects:
                return self.answer(412, "PreconditionFailed")
        store.objects[key] = body
        if store.losses:
            store.losses -= 1
            self.close_connection = True
            return self.connection.close()
        return self.answer(200)

    def answer_list(self, prefix: str) -> None:
        entry = (
            "<Contents><Key>{}</Key><Size>{}</Size><LastModified>2031-01-01T00:00:00.000Z</LastModified>"
            "<ETag>x</ETag></Contents>"
        )
        found = [entry.format(key, len(data)) for key, data in self.server.objects.items() if key.startswith(prefix)]
        self.answer(200, body=f"<ListBucketResult>{''.join(found)}</ListBucketResult>".encode())

    def answer(self, status: int, code: str = "", *, body: bytes = b"", cut: bool = False) -> None:
        if code:
            body = f"<Error><Code>{code}</Code><Message>As the test wants it.</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.send_header("ETag", '"x"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)


@contextlib.contextmanager
def fake_s3() -> Iterator[tuple[FakeS3, dict[str, str]]]:
    """Run one; yield it, and the environment by which obstore finds it."""
    server = FakeS3()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield (
            server,
            {
                "AWS_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "tests",
                "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            },
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
