"""References to OCI registries, tokens, and registries that do not do as they should."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune.adapters.manifest import FileEntry, sha256_hex
from finetune.errors import IntegrityError, StoreError
from finetune.registry.transfer.oci_client import OciRef, OciRepository
from tests.servers.docker_registry import free_port

DIGEST = "a" * 64


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("localhost/a", ("localhost", "a", None, None)),
        ("localhost:5000/medical/brain-mri:17", ("localhost:5000", "medical/brain-mri", "17", None)),
        ("ghcr.io/a/b/c__d.e:v1.0_x-y", ("ghcr.io", "a/b/c__d.e", "v1.0_x-y", None)),
        (f"[::1]:5000/a@sha256:{DIGEST}", ("[::1]:5000", "a", None, DIGEST)),
    ],
)
def test_references(text, parts):
    ref = OciRef.parse(text)
    assert (ref.host, ref.repository, ref.tag, ref.digest) == parts
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "a/b:1", "localhost:5000", "localhost:5000/", "localhost:5000/A/b", "localhost:5000/../a",
        "localhost:5000/a/../b", "http://localhost:5000/a", "localhost:5000/a:", "localhost:5000/a:b/c",
        f"localhost:5000/a:1@sha256:{DIGEST}", "localhost:5000/a@sha256:abc", "user@localhost:5000/a",
        "host.example/a?b",
        "localhost:5000/a\n", "localhost:123456/a", "localhost:5000//a", "localhost:5000/a#b",
    ],
)  # fmt: skip
def test_what_is_no_reference(text):
    with pytest.raises(StoreError, match="a reference to an OCI registry must be HOST/REPOSITORY"):
        OciRef.parse(text)


@pytest.fixture
def answering():
    """Return a function that starts a server from a function of the request, and return its host."""
    servers = []

    def start(act):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def serve(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                code, headers, body = act(self)
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_HEAD = serve

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _keep_password(tmp_path, monkeypatch, host):
    auths = {host: {"auth": base64.b64encode(b"ali:sesame").decode()}}
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": auths}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


def test_a_token_comes_from_the_address_of_the_challenge(answering, tmp_path, monkeypatch):
    asked = []

    def tokens(request):
        asked.append((request.path, request.headers.get("Authorization")))
        return 200, {}, json.dumps({"token": "t0ken"}).encode()

    realm = f"http://{answering(tokens)}/token"
    challenge = f'Bearer realm="{realm}",service="reg",scope="repository:a:pull"'

    def registry(request):
        if request.headers.get("Authorization") != "Bearer t0ken":
            return 401, {"WWW-Authenticate": challenge}, b""
        return 200, {}, b"{}"

    host = answering(registry)
    with OciRepository(OciRef.parse(f"{host}/a:1")) as repository:
        assert repository.get_manifest("1") == (sha256_hex(b"{}"), b"{}")
        assert repository.get_manifest("2") == (sha256_hex(b"{}"), b"{}")
    assert asked == [("/token?service=reg&scope=repository%3Aa%3Apull", None)], "once, and without a password"
    _keep_password(tmp_path, monkeypatch, host)
    with OciRepository(OciRef.parse(f"{host}/a:1")) as repository:
        repository.get_manifest("1")
    assert base64.b64decode(asked[1][1].removeprefix("Basic ")) == b"ali:sesame"


def test_a_password_goes_nowhere_unsafe(answering, tmp_path, monkeypatch):
    seen = []

    def elsewhere(request):
        seen.append(request.headers.get("Authorization"))
        return 200, {}, b"{}"

    other = answering(elsewhere)

    def registry(request):
        if request.path.endswith("/1"):
            return 401, {"WWW-Authenticate": 'Bearer realm="http://evil.example/token"'}, b""
        if not request.headers.get("Authorization"):
            return 401, {"WWW-Authenticate": 'Basic realm="x"'}, b""
        if request.command == "POST":
            return 202, {"Location": f"http://{other}/upload?state=1"}, b""
        return 307, {"Location": f"http://{other}/manifest"}, b""

    host = answering(registry)
    _keep_password(tmp_path, monkeypatch, host)
    (tmp_path / "file").write_bytes(b"abc")
    with OciRepository(OciRef.parse(f"{host}/a:1")) as repository:
        with pytest.raises(StoreError, match="the address for a token must be HTTPS, got 'http://evil.example/token'"):
            repository.get_manifest("1")
        assert repository.get_manifest("2")[1] == b"{}"
        repository.put_blob(FileEntry(sha256=sha256_hex(b"abc"), size=3), tmp_path / "file")
    assert seen == [None, None], "a redirect and an upload to another host"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}, b"<html>"), r"the registry refused: 500 Internal Server Error\.$"),
        ((403, {}, b'{"errors":[{"code":"DENIED","message":"no"}]}'), "403 Forbidden; DENIED: no. Log in with `docker"),
        ((401, {"WWW-Authenticate": "Negotiate"}, b""), "401 Unauthorized. Log in with `docker login"),
        ((429, {}, b'{"errors":"x"}'), "429 Too Many Requests"),
        ((500, {}, b'{"errors":[' + b" " * 100_000 + b"]}"), "500 Internal Server Error"),
        ((302, {"Location": "/v2/a/manifests/1"}, b""), "redirect"),
        ((200, {"Content-Length": "100"}, b"short"), "cannot reach 127.0.0.1"),
    ],
)
def test_the_refusal_of_a_registry_is_reported(answering, answer, message):
    host = answering(lambda request: answer)
    with OciRepository(OciRef.parse(f"{host}/a:1")) as repository, pytest.raises(StoreError, match=message):
        repository.get_manifest("1")


def test_a_registry_that_is_not_there():
    with (
        OciRepository(OciRef.parse(f"localhost:{free_port()}/a")) as repository,
        pytest.raises(
            StoreError, match="cannot reach localhost:.*: .*refused.* Check the name, and that the registry is"
        ),
    ):
        repository.get_manifest("1")


def test_no_more_is_read_than_there_should_be(answering):
    host = answering(lambda request: (200, {}, b"x" * (5 * 1024**2)))
    with OciRepository(OciRef.parse(f"{host}/a:1")) as repository:
        with pytest.raises(IntegrityError, match="the registry must send at most 4194304 bytes, and sent more"):
            repository.get_manifest("1")
        with pytest.raises(IntegrityError, match="must have 10 bytes, got more"):
            list(repository.get_blob(FileEntry(sha256=DIGEST, size=10)))
        with pytest.raises(IntegrityError, match=f"must have {2**40} bytes, got 5242880"):
            list(repository.get_blob(FileEntry(sha256=DIGEST, size=2**40)))


def test_a_manifest_is_the_one_that_was_asked_for(answering):
    host = answering(lambda request: (200, {}, b"{}"))
    with OciRepository(OciRef.parse(f"{host}/a")) as repository:
        with pytest.raises(
            IntegrityError,
            match=f"must send the manifest with sha256:{DIGEST}, but sent one with sha256:{sha256_hex(b'{}')}",
        ):
            repository.get_manifest(f"sha256:{DIGEST}")
        assert repository.get_manifest(f"sha256:{sha256_hex(b'{}')}")[1] == b"{}"


def test_an_upload_without_an_address(answering, tmp_path):
    host = answering(lambda request: (202, {}, b""))
    (tmp_path / "file").write_bytes(b"abc")
    with (
        OciRepository(OciRef.parse(f"{host}/a")) as repository,
        pytest.raises(StoreError, match=f"{host}: its answer to an upload must have the header Location"),
    ):
        repository.put_blob(FileEntry(sha256=sha256_hex(b"abc"), size=3), tmp_path / "file")
