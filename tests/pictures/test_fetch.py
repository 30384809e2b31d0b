"""Downloads from servers that hang, send wrong headers, redirect to the local network or never end. They are threads here."""

import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from paligemma.errors import AccessError
from paligemma.pictures import fetch
from paligemma.pictures.fetch import is_public, shorten

BODY = b"\x89PNG pretended"


class Handler(BaseHTTPRequestHandler):
    """Answers by path: /200, /404, /redirect?to, /loop, /drip, /endless, /headers, /short, /huge, /typeless."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.server.seen.append((self.path, dict(self.headers)))
        getattr(self, "do_" + path.strip("/").replace("/", "_"), self.answer)(query)

    def answer(self, _: str = "", status: int = 200, **headers: object) -> None:
        self.send_response(int(self.path.strip("/")) if self.path.strip("/").isdigit() else status)
        for name, value in {"Content_Type": "image/png; x=1", "Content_Length": len(BODY), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(BODY)

    def do_redirect(self, query: str) -> None:
        self.answer(status=302, Location=query, Content_Length=0)

    def do_loop(self, _: str) -> None:
        self.answer(status=301, Location="/loop", Content_Length=0)

    def do_hops(self, query: str) -> None:
        self.answer(status=307, Location=f"/hops?{int(query) - 1}" if int(query) > 1 else "/200", Content_Length=0)

    def do_typeless(self, _: str) -> None:
        self.answer(Content_Type=None, Content_Length=None)
        self.close_connection = True

    def do_short(self, _: str) -> None:
        self.answer(Content_Length=len(BODY) + 5)
        self.close_connection = True

    def do_huge(self, _: str) -> None:
        self.answer(Content_Length=10**12)

    def pour(self, part: bytes, pause: float) -> None:
        try:
            while not self.server.is_over.wait(pause):
                self.wfile.write(part)
        except OSError:
            self.close_connection = True

    def do_endless(self, _: str) -> None:
        self.answer(Content_Length=None)
        self.pour(bytes(1 << 20), 0)

    def do_drip(self, _: str) -> None:
        self.answer(Content_Length=10_000)
        self.pour(b".", 0.05)

    def do_headers(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.pour(b"A", 0.05)

    def do_nonsense(self, _: str) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.is_over = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.is_over.set()
    server.shutdown()
    server.server_close()


def refusal(address: str, **options: object) -> str:
    with pytest.raises(AccessError) as caught:
        fetch.fetch(address, **options)
    assert caught.value.code == 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_answer_is_its_bytes_and_its_type(server):
    assert fetch.fetch(server.url + "/200") == (BODY, "image/png")
    assert fetch.fetch(server.url + "/typeless") == (BODY, "")


def test_the_address_is_sent_as_a_browser_would(server):
    fetch.fetch(server.url.replace("127.0.0.1", "localhost") + "/a b/\u00fc.png?q=\u00fc&x=%20#part")
    path, headers = server.seen[-1]
    assert path == "/a%20b/%C3%BC.png?q=%C3%BC&x=%20"
    assert headers["Host"] == f"localhost:{server.server_port}"


@pytest.mark.parametrize("status", [204, 304, 400, 403, 404, 500, 503])
def test_any_status_but_200_is_refused_by_number(server, status):
    assert f"answered {status} " in refusal(f"{server.url}/{status}")


def test_three_redirects_are_followed_and_no_more(server):
    assert fetch.fetch(server.url + "/hops?3")[0] == BODY
    assert "redirects more than 3 times" in refusal(server.url + "/hops?4")
    assert "redirects more than 3 times" in refusal(server.url + "/loop")


@pytest.mark.parametrize("goal", ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://x", "http://h:99999/", "//:0"])
def test_a_redirect_to_anything_but_http_is_refused(server, goal):
    assert "must begin with http" in refusal(f"{server.url}/redirect?{goal}")


@pytest.mark.parametrize("path", ["/drip", "/headers"])
def test_a_slow_drip_ends_when_the_time_is_over(server, path):
    start = time.monotonic()
    assert "took longer than 0.4 s" in refusal(server.url + path, timeout_s=0.4)
    assert time.monotonic() - start < 20


def test_a_server_that_says_nothing_ends_when_the_time_is_over():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "took longer" in refusal(f"http://127.0.0.1:{port}/", timeout_s=0.3)
        assert "took longer" in refusal(f"https://127.0.0.1:{port}/", timeout_s=0.3)


def test_reading_stops_at_the_limit(server, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 4 << 20)
    assert "larger than 4 MB" in refusal(server.url + "/endless")
    assert "larger than 4 MB" in refusal(server.url + "/huge")


def test_an_answer_that_breaks_off_is_refused(server):
    assert f"broke off after {len(BODY)} of {len(BODY) + 5} bytes" in refusal(server.url + "/short")


def test_what_is_no_http_is_refused(server):
    assert "cannot be read" in refusal(server.url + "/nonsense")


def test_no_server_no_name_and_no_certificate_are_refused(server, monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    assert "Connection refused" in refusal("http://127.0.0.1:1/")
    assert "cannot be read" in refusal(server.url.replace("http:", "https:"))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in refusal("http://nowhere.invalid/a.png")


def test_a_proxy_is_not_used_and_the_message_says_so(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert "Proxies are not used" in refusal("http://127.0.0.1:1/")


@pytest.mark.parametrize(
    "address", ["http://", "http:///a", "http://h:0/", "http://h:x/", "http://[::1/", "ftp://h/", "a.png", ""]
)
def test_an_address_without_a_server_is_refused(address):
    assert "must begin with http" in refusal(address)


def test_odd_characters_in_an_address_stay_in_one_line(server):
    assert "\x1b" not in refusal(server.url + "/loop?\x1b[31m")
    refusal("http://a\x00b.invalid/\x1b[31m")
    refusal("http://" + "\u00e4" * 100 + ".invalid/")


# Addresses in the local network

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9b:1::1", "64:ff9b:1::808:808",
    "fec0::1", "fed0::1", "2001:0:7f00:1::", "2001:db8::1", "3fff::1", "100::1", "5f00::1", "2606:4700::5efe:7f00:1",
    "2606:4700::200:5efe:a00:1", "2002:a00:1::5", "4000::1", "192.0.2.1", "198.18.0.1", "240.0.0.1", "0.1.2.3", "ff0e::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]


def test_which_addresses_are_public_is_known_in_every_spelling():
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []


@pytest.fixture
def pretended(server, monkeypatch):
    """The local server, reachable as public.example with a public IP address. Returns: the addresses that were connected to."""
    dialled, names = [], {"public.example": ["93.184.216.34"], "inside.example": ["10.0.0.1", "127.0.0.1"]}
    real = socket.create_connection

    def look_up(host: str, port: int, *_: object, **__: object) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names.get(host, [host])]

    def dial(address: tuple[str, int], timeout: float) -> socket.socket:
        dialled.append(address[0])
        return real(("127.0.0.1", server.server_port), timeout)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", dial)
    return names, dialled


@pytest.mark.parametrize("goal", ["http://127.0.0.1/200", "http://inside.example/200", "http://[::ffff:169.254.169.254]/200"])
def test_a_public_server_may_not_redirect_into_the_own_network(pretended, goal):
    names, dialled = pretended
    names["::ffff:169.254.169.254"] = ["::ffff:169.254.169.254"]
    assert "in the local network" in refusal(f"http://public.example/redirect?{goal}")
    assert dialled == ["93.184.216.34"]


@pytest.mark.usefixtures("pretended")
def test_nor_over_a_detour():
    assert "in the local network" in refusal(
        "http://127.0.0.1/redirect?http://public.example/redirect?http://public.example/redirect?http://127.0.0.1/200"
    )


@pytest.mark.usefixtures("pretended")
def test_an_address_in_the_own_network_may_be_typed_and_may_redirect_within():
    assert fetch.fetch("http://inside.example/redirect?http://127.0.0.1/200")[0] == BODY
    assert fetch.fetch("http://127.0.0.1/redirect?http://public.example/200")[0] == BODY


def test_what_stands_in_data_must_be_public(server):
    seen = len(server.seen)
    for address in (f"{server.url}/200", f"http://localhost:{server.server_port}/200", f"http://2130706433:{server.server_port}/"):
        assert "in the local network. Addresses in a data file" in refusal(address, may_be_private=False)
    assert len(server.seen) == seen


def test_data_may_lead_to_public_servers_only_at_every_redirect(pretended):
    names, dialled = pretended
    assert fetch.fetch("http://public.example/200", may_be_private=False)[0] == BODY
    assert "in the local network" in refusal("http://public.example/redirect?http://127.0.0.1/200", may_be_private=False)
    names["mixed.example"] = ["10.0.0.1", "8.8.8.8"]
    assert fetch.fetch("http://mixed.example/200", may_be_private=False)[0] == BODY
    assert dialled == ["93.184.216.34", "93.184.216.34", "8.8.8.8"]


def test_looking_up_the_name_is_within_the_time(monkeypatch):
    is_over = threading.Event()

    def never(*_: object, **__: object) -> list:
        is_over.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", never)
    assert "took longer than 0.2 s" in refusal("http://slow.example/a.png", timeout_s=0.2)
    is_over.set()


def test_the_connection_goes_to_the_address_that_was_checked(pretended):
    names, dialled = pretended
    names["mixed.example"] = ["127.0.0.1", "8.8.8.8"]
    assert fetch.fetch("http://public.example/redirect?http://mixed.example/200")[0] == BODY
    assert dialled == ["93.184.216.34", "8.8.8.8"]  # never the name: a second look-up could return another address


def test_https_names_the_server_and_its_certificate_is_checked(pretended, server, monkeypatch):
    asked = {}

    class Wrapped(socket.socket):
        def do_handshake(self) -> None:
            asked["is_shaken"] = True

    class Context:
        def wrap_socket(self, connection: socket.socket, **options: object) -> Wrapped:
            asked.update(options)
            timeout, wrapped = connection.gettimeout(), Wrapped(fileno=connection.detach())
            wrapped.settimeout(timeout)
            return wrapped

    context = ssl.create_default_context()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED
    monkeypatch.setattr(ssl, "create_default_context", Context)
    assert fetch.fetch("https://public.example/200")[0] == BODY
    assert asked["server_hostname"] == "public.example" and asked["is_shaken"]
    assert server.seen[-1][1]["Host"] == "public.example"
    assert pretended[1] == ["93.184.216.34"]


def test_a_password_in_an_address_is_not_repeated():
    assert shorten("https://user:secret@host/path@x") == "https://host/path@x"
    assert "secret" not in refusal("http://user:secret@127.0.0.1:1/")
    assert len(shorten("http://h/" + "x" * 1000)) < 200
