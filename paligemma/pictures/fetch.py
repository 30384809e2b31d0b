"""The bytes behind an http(s) address, with a limit on everything: time, size, redirects, and where they may lead.

A server may drip one byte a second, never end, or redirect to a machine inside the own network. So one clock runs over the
whole download and cuts the connection when it is over; reading stops at the size limit whatever the headers promised; and
the name of the server is looked up once, checked, and the connection made to the very address that was checked (else the
second look-up could answer differently). An address inside the own network may be typed, but neither may a public server
redirect to one, nor may one come from data such as a list of pictures. Proxies are not used: with one, nothing of this could
be checked.

Checked in tests/pictures/test_fetch.py. The network modules are imported when the first address is read.
"""

import os
import queue
import threading
import time
import urllib.parse
from contextlib import suppress
from typing import TYPE_CHECKING

from paligemma.errors import AccessError, one_line

if TYPE_CHECKING:
    import http.client
    import socket

MAX_DOWNLOAD_BYTES = 32 << 20
MAX_REDIRECTS = 3
TIMEOUT_S = 30.0
UNQUOTED = "/%:@!$&'()*+,;=~[]"  # what may stand in an address as it is
IN_DATA = "What stands in data may name public addresses only. Type this one yourself if you trust it, or download it first."
REDIRECTED = "A public server may not redirect to it. Type that address yourself if you trust it."
REDIRECTS = (301, 302, 303, 307, 308)


class Deadline:
    """Cuts the connection when the time is up: a timeout of the socket alone would begin anew with every byte.

    Args:
        seconds: from now on, for everything.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.is_over = False
        self.socket: socket.socket | None = None
        self.timer = threading.Timer(seconds, self.cut)
        self.timer.daemon = True
        self.timer.start()

    def cut(self) -> None:
        import socket

        self.is_over = True
        if self.socket is not None:
            with suppress(OSError):  # it was closed in the meantime
                self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.timer.cancel()
        if self.socket is not None:
            self.socket.close()

    def left(self) -> float:
        """Seconds that remain. Raises: TimeoutError when none do."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def is_public(address: str) -> bool:
    """Whether an IP address is reachable by everyone, also when IPv6 wraps an IPv4 one."""
    import ipaddress

    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast
    low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.ipv4_mapped is not None or ip in ipaddress.ip_network("64:ff9b::/96"):
        return is_public(str(low))
    # Everything that is given out to the public lies in 2000::/3 (RFC 4291); of that, 3fff::/20 is for documentation.
    if ip not in ipaddress.ip_network("2000::/3") or ip in ipaddress.ip_network("3fff::/20"):
        return False
    if ip.sixtofour is not None:
        return is_public(str(ip.sixtofour))
    is_isatap = int(ip) >> 32 & 0xFFFFFFFF in (0x00005EFE, 0x02005EFE)  # RFC 5214: an IPv4 address in the lower half
    return ip.is_global and not (is_isatap and not is_public(str(low)))


def look_up(host: str, port: int, deadline: Deadline) -> list[str]:
    """The addresses of a host. A look-up cannot be cut off, so a thread waits for it, and is left behind when the time is up.

    Raises: TimeoutError, OSError, UnicodeError.
    """
    import socket

    found: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put([entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, ValueError) as error:
            found.put(error)

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        addresses = found.get(timeout=deadline.left())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(addresses, Exception):
        raise addresses
    return addresses


def connect(host: str, port: int, deadline: Deadline, refusal: str | None) -> tuple["socket.socket", bool]:
    """A connection to the first address of a host that answers, and whether that address is public.

    Args:
        refusal: why the address must be public; None if it may be inside the own network.
    Raises: AccessError when only addresses in the own network are found and a public one is needed; OSError.
    """
    import socket

    found = look_up(host, port, deadline)
    allowed = [address for address in found if refusal is None or is_public(address)]
    if not allowed:
        raise AccessError(f"{one_line(host)} ({found[0]}) is inside the own network. {refusal}", path=host)
    for address in allowed:
        try:
            connection = socket.create_connection((address, port), timeout=deadline.left())
        except OSError as error:
            failure = error
        else:
            deadline.socket = connection
            return connection, is_public(address)
    raise failure


def open_connection(
    url: urllib.parse.SplitResult, deadline: Deadline, refusal: str | None
) -> tuple["http.client.HTTPConnection", bool]:
    """A connection to the server of an address, encrypted if it says https, and whether the server is public."""
    import http.client

    host = url.hostname if url.hostname.isascii() else url.hostname.encode("idna").decode()
    port = url.port or (443 if url.scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port)
    connection.sock, is_open_to_all = connect(host, port, deadline, refusal)
    if url.scheme == "https":
        import ssl

        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
        deadline.socket = connection.sock
        connection.sock.do_handshake()
        connection.default_port = 443  # so that the Host header names the port only where it is another one
    return connection, is_open_to_all


def read_body(response: "http.client.HTTPResponse", name: str, deadline: Deadline) -> bytes:
    """The body, unless it is too large or breaks off. Raises: AccessError, TimeoutError."""
    promised = response.length
    too_large = f"{name} is larger than {MAX_DOWNLOAD_BYTES >> 20} MB. Download a smaller version of the picture."
    if promised is not None and promised > MAX_DOWNLOAD_BYTES:
        raise AccessError(too_large, path=name)
    body = bytearray()
    while part := response.read(1 << 16):
        body += part
        if len(body) > MAX_DOWNLOAD_BYTES:
            raise AccessError(too_large, path=name)
    deadline.left()  # a connection that was cut looks like one that ended
    if promised is not None and len(body) < promised:
        raise AccessError(f"{name} broke off after {len(body)} of {promised} bytes. Try again.", path=name)
    return bytes(body)


def split(address: str) -> urllib.parse.SplitResult:
    """The parts of an address. Raises: AccessError unless it is http(s) and names a server."""
    try:
        url = urllib.parse.urlsplit(address)
        is_fine = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_fine = False
    if not is_fine:
        name = shorten(address)
        raise AccessError(f"{name} cannot be read. It must begin with http:// or https:// and name a server.", path=name)
    return url


def shorten(address: str) -> str:
    """An address for messages, without the password in it."""
    scheme, slashes, rest = address.partition("://")
    server, slash, path = rest.partition("/")
    return one_line(f"{scheme}{slashes}{server.rpartition('@')[2]}{slash}{path}")


def follow(address: str, deadline: Deadline, may_be_private: bool) -> tuple[bytes, str]:
    """The body and its type, at the end of at most 3 redirects."""
    name, refusal = shorten(address), None if may_be_private else IN_DATA
    for _ in range(MAX_REDIRECTS + 1):
        url = split(address)
        connection, is_open_to_all = open_connection(url, deadline, refusal)
        target = urllib.parse.quote(url.path or "/", safe=UNQUOTED)
        target += "?" + urllib.parse.quote(url.query, safe=UNQUOTED + "?") if url.query else ""
        connection.request("GET", target, headers={"User-Agent": "paligemma", "Accept": "image/*", "Connection": "close"})
        with connection.getresponse() as response:
            goal, kind = response.headers["Location"], response.headers["Content-Type"] or ""
            if response.status == 200:
                return read_body(response, name, deadline), kind.partition(";")[0].strip().lower()
            if response.status not in REDIRECTS or not goal:
                raise AccessError(f"{name} answered {response.status} {one_line(response.reason)}. Check the address.", path=name)
        refusal = REDIRECTED if is_open_to_all and refusal is None else refusal
        address = urllib.parse.urljoin(address, goal)
    raise AccessError(
        f"{name} redirects more than {MAX_REDIRECTS} times. Open it in a browser and copy the last address.", path=name
    )


def fetch(address: str, *, may_be_private: bool = True, timeout_s: float = TIMEOUT_S) -> tuple[bytes, str]:
    """What a GET of an http(s) address answers: the body and its type, such as "image/png" ("" if not said).

    Args:
        may_be_private: whether the address may be inside the own network, as one that a user typed may.
        timeout_s: for everything: looking up the name, connecting, redirects, reading.
    Raises: AccessError for any status but 200, more than 3 redirects or one into the own network, more than 32 MB, and
        when the whole takes longer than `timeout_s`.
    """
    import http.client

    name, deadline = shorten(address), Deadline(timeout_s)
    try:
        return follow(address, deadline, may_be_private)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if deadline.is_over or isinstance(error, TimeoutError):
            raise AccessError(f"{name} took longer than {timeout_s:g} s. Try again, or download it first.", path=name) from error
        has_proxy = any(os.environ.get(key) for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"))
        advice = "Proxies are not used for pictures: download it first." if has_proxy else "Check the address and the network."
        raise AccessError(
            f"{name} cannot be read: {one_line(error) or type(error).__name__}. {advice}", path=name
        ) from error
    finally:
        deadline.close()
