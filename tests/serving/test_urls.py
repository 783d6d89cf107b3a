"""Images by URL: servers that lie, dawdle or point inside are refused, each with one message."""

import base64
import gzip
import io
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from ipaddress import ip_network

import pytest
from PIL import Image

from finetune.errors import FetchError
from finetune.serving import urls
from finetune.serving.addresses import is_allowed
from finetune.serving.urls import UrlPolicy, fetch_image, is_url

HERE = (ip_network("127.0.0.1/32"),)  # where the servers of these tests are; 127.0.0.2 is as private as ever


def image(format="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(out, format)
    return out.getvalue()


PNG = image()


@contextmanager
def serving(answer, *, tls=None):
    """Have ``answer(request, connection)`` serve on a free port; yield ``host:port`` and the requests that came."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests, threads = [], []

    def one(connection):
        try:
            connection = tls.wrap_socket(connection, server_side=True) if tls else connection
            requests.append(connection.recv(65536).decode())
            answer(requests[-1], connection)
        except OSError:
            return  # the client has gone, as it should where it was told too much
        finally:
            connection.close()

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=one, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [accepting, *threads]:
            thread.join(20)
            assert not thread.is_alive()


def responding(body=PNG, *, status="200 OK", type="image/png", **headers):
    """An answer with these headers; ``content_length`` stands for Content-Length."""
    named = {"content-type": type, "content-length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{k}: {v}" for k, v in named.items() if v is not None), "", ""]
    return lambda request, connection: connection.sendall("\r\n".join(lines).encode() + body)


def policy(**changes):
    return UrlPolicy(**{"allow_private": HERE, "timeout": 10.0} | changes)


@pytest.mark.parametrize("format", ["GIF", "JPEG", "PNG", "WEBP"])
def test_an_image_is_fetched(format):
    with serving(responding(image(format), type=f"Image/{format}; charset=binary")) as (host, requests):
        assert fetch_image(f"HTTP://{host}/a/b%20c.png?size=1&x=#top", policy()) == image(format)
    (request,) = requests
    assert request.startswith("GET /a/b%20c.png?size=1&x= HTTP/1.1\r\n")
    assert f"\r\nHost: {host}\r\n" in request and "\r\nAccept-Encoding: identity\r\n" in request


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status):
    def answer(request, connection):
        moved = responding(b"", status=f"{status} Moved", type=None, location="../c.png")
        (moved if request.startswith("GET /a/b ") else responding())(request, connection)

    with serving(answer) as (host, requests):
        assert fetch_image(f"http://{host}/a/b", policy()) == PNG
    assert [request.split()[1] for request in requests] == ["/a/b", "/c.png"]


def test_in_pieces_of_any_size():
    def answer(request, connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(PNG), 7):
            piece = PNG[start : start + 7]
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        connection.sendall(b"0\r\n\r\n")

    with serving(answer) as (host, _):
        assert fetch_image(f"http://{host}/", policy()) == PNG


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (responding(status="404 Not Found"), "must answer with status 200, got 404"),
        (responding(status="304 Not Modified"), "must answer with status 200, got 304"),
        (responding(b"", status="302 Found"), "must answer with status 200, got 302"),
        (responding(type="text/html"), "media type must be one of image/gif, image/jpeg.*, got 'text/html'"),
        (responding(type=None), "media type must be .*, got ''"),
        (responding(type="image/svg+xml"), "media type must be .*, got 'image/svg"),
        (responding(b"<svg></svg>"), "its 11 bytes do not begin like one"),
        (responding(b"%!PS-Adobe-3.0 EPSF-3.0"), "bytes do not begin like one"),
        (responding(b""), "its 0 bytes do not begin"),
        (
            responding(gzip.compress(bytes(1_000_000)), content_encoding="gzip"),
            "Content-Encoding must be identity, got 'gzip'",
        ),
        (responding(content_length=10**15), "at most 1000 bytes, got at least 1000000000000000"),
        (responding(content_length=10**30), "cannot be fetched: 'bad Content-Length"),
        (responding(content_length=-5), "cannot be fetched: 'bad Content-Length"),
        (responding(PNG + bytes(5000), content_length=None), "at most 1000 bytes, got at least"),
        (responding(content_length=len(PNG) + 1), "cannot be fetched: 'peer closed connection"),
        (lambda request, connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"), "cannot be fetched: "),
        (responding(x=b"a" * 300_000), "cannot be fetched: "),
        (lambda request, connection: None, "cannot be fetched: 'Server disconnected"),
    ],
)
def test_what_is_no_image_is_refused(answer, message):
    with serving(answer) as (host, _), pytest.raises(FetchError, match=f"http://{host}/p: .*{message}"):
        fetch_image(f"http://{host}/p?token=secret", policy(max_bytes=1000))


def test_nothing_is_waited_for_that_is_announced_too_large():
    def answer(request, connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 1001\r\n\r\n")
        keep_silent(request, connection)

    with serving(answer) as (host, _), pytest.raises(FetchError, match="at most 1000 bytes, got at least 1001"):
        fetch_image(f"http://{host}/p", policy(max_bytes=1000))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.2/", "http://127.0.0.2/: every address of the host must be public"),
        ("//127.0.0.2:80/", "http://127.0.0.2:80/: every address of the host must be public"),
        ("http://169.254.169.254/latest/meta-data/", "address of the host must be public"),
        ("http://[::1]:80/", "address of the host must be public"),
        ("http://2130706433/", "'2130706433' is not a host"),
        ("file:///etc/passwd", "the scheme must be http or https, got 'file'"),
        ("data:image/png;base64,iVBORw0KGgo=", "the scheme must be http or https, got 'data'"),
        ("ftp://127.0.0.1/x.png", "the scheme must be http or https, got 'ftp'"),
        ("http://user:pw@127.0.0.1/", "http://127.0.0.1/: a URL must not contain a user name or password"),
        ("http://[", "target of its redirect must be a URL, got 'http://.'"),
        ("/again", "http://127.0.0.1:[0-9]+/again: it may redirect at most 3 times"),
    ],
)
def test_a_redirect_is_checked_as_the_first_url_is(location, message):
    with serving(responding(b"", status="302 Found", type=None, location=location)) as (host, requests):
        with pytest.raises(FetchError, match=message):
            fetch_image(f"http://{host}/", policy())
    assert len(requests) == (4 if location == "/again" else 1)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://10.1.2.3/",
        "http://192.168.0.1:8080/",
        "http://100.100.100.200/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://168.63.129.16/",
        "http://192.0.0.192/",
        "http://[::]/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/",
        "http://[ff02::1]/",
        "http://[::ffff:8.8.8.8]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b:1::a00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[2001:0:1234::1]/",
        "http://[2001:db8::1]/",
    ],
)
def test_what_is_not_public_is_not_reached(url, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", None)
    with pytest.raises(FetchError, match="every address of the host must be public, and one is not"):
        fetch_image(url, UrlPolicy())


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::200e"])
def test_what_is_public_is_allowed(address):
    assert is_allowed(address, ())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://0x7f000001/", "is not a host. Write an address as four decimal numbers"),
        ("http://0x7f.1/", "is not a host. Write an address as"),
        ("http://0177.0.0.1/", "is not a host. Write an address as"),
        ("http://127.1/", "is not a host. Write an address as"),
        ("http://127.0.0.1./", "is not a host. Write an address as"),
        ("http://[fe80::1%25eth0]/", "is not a host. Write an address as"),
        ("http://127.0.0.1:0/", "is not a host"),
        ("http:///x.png", "'' is not a host"),
        ("http://a..b/", "'a..b' is not a host"),
        ("http://a%00b/", "is not a host"),
        ("http://[1::2/", "not a URL: Invalid IPv6 URL"),
        ("http://a:99999/", "not a URL: Port out of range"),
        ("http://a:b/", "not a URL: Port could not be cast"),
        ("http://a/\r\nX-Evil: 1", "visible ASCII characters and no backslash"),
        ("http://a\\@127.0.0.1/", "visible ASCII characters and no backslash"),
        ("http://ⓛocalhost/", "those of a host as xn--"),
        (f"http://a/{'b' * 9000}", "a URL must have at most 8192"),
        ("file:///etc/passwd", "the scheme must be http or https, got 'file'"),
        ("/etc/passwd", "the scheme must be http or https, got ''"),
        ("http://me@example.com/", "^http://example.com/: a URL must not contain a user name or password"),
    ],
)
def test_an_ambiguous_or_empty_text_is_no_url(url, message):
    with pytest.raises(FetchError, match=message):
        fetch_image(url, UrlPolicy(resolve=lambda host, port: pytest.fail(f"{host} was looked up")))


def test_the_address_that_was_checked_is_the_one_connected_to():
    """A name server may answer otherwise the second time."""
    asked = []

    def resolve(host, port):
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    with serving(responding()) as (host, requests):
        port = host.partition(":")[2]
        url = f"http://images.example:{port}/p.png"
        assert fetch_image(url, policy(resolve=resolve)) == PNG
        assert asked == ["images.example"], "one look-up for each connection, and none behind it"
        assert f"Host: images.example:{port}\r\n" in requests[0]
        with pytest.raises(FetchError, match="address of the host must be public"):
            fetch_image(url, policy(resolve=resolve))
        assert len(requests) == 1


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    with pytest.raises(FetchError, match="address of the host must be public"):
        fetch_image("http://a.example/", UrlPolicy(resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"]))


def test_a_name_that_stands_for_nothing():
    def resolve(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(FetchError, match="^http://a.example/x: the host has no address. Check its spelling.$"):
        fetch_image("http://a.example/x?y", UrlPolicy(resolve=resolve))
    with pytest.raises(FetchError, match="cannot be fetched: 'the host has no address"):
        fetch_image("http://a.example/x", UrlPolicy(resolve=lambda host, port: []))


def test_the_next_address_is_tried():
    with serving(responding()) as (host, _):
        port = host.partition(":")[2]
        both = policy(resolve=lambda host, port: ["127.0.0.3", "127.0.0.1"], allow_private=(ip_network("127.0.0.0/8"),))
        assert fetch_image(f"http://a.example:{port}/", both) == PNG


def drip(request, connection):
    """One byte of the headers a moment, each well within any limit on a single read."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(500):
        connection.sendall(b"x")
        time.sleep(0.02)


def drip_body(request, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
    for _ in range(500):
        connection.sendall(PNG[:1])
        time.sleep(0.02)


def keep_silent(request, connection):
    connection.recv(1)  # until the client goes


@pytest.mark.parametrize("answer", [drip, drip_body, keep_silent])
def test_what_dawdles_is_given_up(answer):
    with serving(answer) as (host, _), pytest.raises(FetchError, match=r"the fetch took more than 0.3 seconds$"):
        fetch_image(f"http://{host}/", policy(timeout=0.3))


def test_redirects_and_names_count_into_the_time():
    def answer(request, connection):
        time.sleep(0.15)
        responding(b"", status="302 Found", type=None, location="/again")(request, connection)

    with serving(answer) as (host, _), pytest.raises(FetchError, match="took more than 0.4 seconds"):
        fetch_image(f"http://{host}/", policy(timeout=0.4, max_redirects=1000))
    done = threading.Event()
    with pytest.raises(FetchError, match="took more than 0.2 seconds"):
        fetch_image("http://a.example/", policy(timeout=0.2, resolve=lambda host, port: done.wait(20) and []))
    done.set()


def test_a_certificate_must_be_the_hosts(tmp_path, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*own_certificate(tmp_path, "images.example"))
    names, at_home = [], policy(resolve=lambda host, port: ["127.0.0.1"])
    context.sni_callback = lambda connection, name, context: names.append(name)
    with serving(responding(), tls=context) as (host, requests):
        port = host.partition(":")[2]
        with pytest.raises(FetchError, match="cannot be fetched: .*self-signed certificate"):
            fetch_image(f"https://images.example:{port}/", at_home)
        assert names == ["images.example"] and requests == [], "the name is asked for, at the checked address"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        urls._tls.cache_clear()
        assert fetch_image(f"https://images.example:{port}/", at_home) == PNG
        with pytest.raises(FetchError, match="cannot be fetched: .*Hostname mismatch"):
            fetch_image(f"https://other.example:{port}/", at_home)
    urls._tls.cache_clear()


def own_certificate(folder, host):
    """The files of a certificate that a host gave itself, and of its key."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    key, name, now = generate_private_key(SECP256R1()), x509.Name([]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True)
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(*plain))
    return folder / "cert.pem", folder / "key.pem"


def data_url(data, head="data:image/png;base64,"):
    return head + base64.b64encode(data).decode()


def test_data():
    assert fetch_image(data_url(PNG), UrlPolicy()) == PNG
    assert fetch_image(data_url(PNG, "DATA:image/png;name=a.png;base64,"), UrlPolicy(max_bytes=len(PNG))) == PNG


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (data_url(PNG + bytes(1000)), "data URL: an image may have at most 100 bytes, got more"),
        (data_url(PNG[:50] + bytes(51)), "data URL: an image may have at most 100 bytes, got 101"),
        (data_url(PNG, "data:text/html;base64,"), "data URL: the media type must be .*, got 'text/html'"),
        (data_url(PNG, "data:;base64,"), "data URL: the media type must be .*, got ''"),
        (data_url(b"<html>"), "data URL: the file must be one of .*, but its 6 bytes do not begin like one"),
        ("data:image/png;base64,iVBO Rw0K", "data URL: the data after the comma is not base64"),
        ("data:image/png;base64,iVBORw0KG", "data URL: the data after the comma is not base64"),
        ("data:image/png;base64,é", "data URL: the data after the comma is not base64"),
        ("data:image/png,%89PNG", "a data URL of an image must have the form data:image/png;base64,"),
        (f"data:{';a=b' * 5000};base64,", "a data URL of an image must have the form"),
    ],
)
def test_data_that_is_no_image(url, message):
    with pytest.raises(FetchError, match=message):
        fetch_image(url, UrlPolicy(max_bytes=100))


def test_what_is_a_url():
    assert all(
        is_url(text)
        for text in ("http://a/b.png", "HTTPS://a", "data:image/png;base64,", "file:///a.png", "ftp://a/b.png")
    )
    assert not any(is_url(text) for text in ("a.png", "/a/b.png", "http.png", "C:\\a.png", "database:x"))
