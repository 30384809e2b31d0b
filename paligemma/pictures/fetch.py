"""Downloads the bytes at an http(s) address, with limits on the time, the size, the redirects and the servers.

A server may send one byte per second, never finish, or redirect to a machine in the local network. So:
    - one timer runs for the whole download and closes the connection when the time is up;
    - reading stops at the size limit, whatever length the headers give;
    - a host is resolved once, its IP address is checked, and the connection uses exactly this IP address. A second look-up could
      return another one.
A user may type an address in the local network. But a public server must not redirect to such an address, and a dataset, such as
a list of pictures, must not contain one. Proxies are not used, because the IP address cannot be checked through a proxy.

Checked in tests/pictures/test_fetch.py.
"""

import http.client
import ipaddress
import os
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from contextlib import suppress

from paligemma.errors import AccessError, one_line

MAX_DOWNLOAD_BYTES = 32 << 20
MAX_REDIRECTS = 3
TIMEOUT_S = 30.0
UNQUOTED = "/%:@!$&'()*+,;=~[]"  # characters of an address that are not percent-encoded
# Ends of messages for an address in the local network.
IN_DATA = "Addresses in a data file must be public. Type this address yourself if you trust it, or download the picture first."
REDIRECTED = "A public server must not redirect to it. Type that address yourself if you trust it."
REDIRECTS = (301, 302, 303, 307, 308)


class Deadline:
    """Closes the connection when the time is up. A socket's own timeout would start again with every byte.

    Args:
        seconds: time for the whole download, from now.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.is_over = False
        self.socket: socket.socket | None = None
        self.timer = threading.Timer(seconds, self.cut)
        self.timer.daemon = True
        self.timer.start()

    def cut(self) -> None:
        self.is_over = True
        if self.socket is not None:
            with suppress(OSError):  # the socket was closed in the meantime
                self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.timer.cancel()
        if self.socket is not None:
            self.socket.close()

    def left(self) -> float:
        """The seconds that remain. Raises: TimeoutError if the time is up."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def is_public(address: str) -> bool:
    """Whether an IP address is public. An IPv6 address that contains an IPv4 address is public only if the IPv4 address is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast
    low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.ipv4_mapped is not None or ip in ipaddress.ip_network("64:ff9b::/96"):
        return is_public(str(low))
    # All public addresses lie in 2000::/3 (RFC 4291); 3fff::/20 in it is reserved for documentation.
    if ip not in ipaddress.ip_network("2000::/3") or ip in ipaddress.ip_network("3fff::/20"):
        return False
    if ip.sixtofour is not None:
        return is_public(str(ip.sixtofour))
    is_isatap = int(ip) >> 32 & 0xFFFFFFFF in (0x00005EFE, 0x02005EFE)  # RFC 5214: the lower half holds an IPv4 address
    return ip.is_global and not (is_isatap and not is_public(str(low)))


def look_up(host: str, port: int, deadline: Deadline) -> list[str]:
    """The IP addresses of a host. A look-up cannot be interrupted, so a thread does it and is abandoned when the time is up.

    Raises: TimeoutError, OSError, UnicodeError.
    """
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


def connect(host: str, port: int, deadline: Deadline, refusal: str | None) -> tuple[socket.socket, bool]:
    """A connection to the first IP address of the host that accepts one, and whether this address is public.

    Args:
        refusal: the end of the message if all addresses are in the local network; None if such addresses are allowed.
    Raises: AccessError if a public address is needed and the host has none; OSError.
    """
    found = look_up(host, port, deadline)
    allowed = [address for address in found if refusal is None or is_public(address)]
    if not allowed:
        raise AccessError(f"{one_line(host)} ({found[0]}) is in the local network. {refusal}", path=host)
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
) -> tuple[http.client.HTTPConnection, bool]:
    """A connection to the server of an address, encrypted for https, and whether the server is public."""
    host = url.hostname if url.hostname.isascii() else url.hostname.encode("idna").decode()
    port = url.port or (443 if url.scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port)
    connection.sock, is_public_server = connect(host, port, deadline, refusal)
    if url.scheme == "https":
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
        deadline.socket = connection.sock
        connection.sock.do_handshake()
        connection.default_port = 443  # so that the Host header leaves out port 443
    return connection, is_public_server


def read_body(response: http.client.HTTPResponse, name: str, deadline: Deadline) -> bytes:
    """The body of a response. Raises: AccessError if it is too large or incomplete; TimeoutError."""
    promised = response.length
    too_large = f"{name} is larger than {MAX_DOWNLOAD_BYTES >> 20} MB. Download a smaller version of the picture."
    if promised is not None and promised > MAX_DOWNLOAD_BYTES:
        raise AccessError(too_large, path=name)
    body = bytearray()
    while part := response.read(1 << 16):
        body += part
        if len(body) > MAX_DOWNLOAD_BYTES:
            raise AccessError(too_large, path=name)
    deadline.left()  # a connection closed by the timer looks like one that ended normally
    if promised is not None and len(body) < promised:
        raise AccessError(f"{name} broke off after {len(body)} of {promised} bytes. Try again.", path=name)
    return bytes(body)


def split(address: str) -> urllib.parse.SplitResult:
    """The parts of an address. Raises: AccessError unless it begins with http(s) and names a server."""
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
    """The address for messages: one line, shortened, without a password."""
    scheme, slashes, rest = address.partition("://")
    server, slash, path = rest.partition("/")
    return one_line(f"{scheme}{slashes}{server.rpartition('@')[2]}{slash}{path}")


def follow(address: str, deadline: Deadline, may_be_private: bool) -> tuple[bytes, str]:
    """The body and its content type, after at most MAX_REDIRECTS redirects. Raises: as fetch, and OSError, HTTPException."""
    name, refusal = shorten(address), None if may_be_private else IN_DATA
    for _ in range(MAX_REDIRECTS + 1):
        url = split(address)
        connection, is_public_server = open_connection(url, deadline, refusal)
        target = urllib.parse.quote(url.path or "/", safe=UNQUOTED)
        target += "?" + urllib.parse.quote(url.query, safe=UNQUOTED + "?") if url.query else ""
        connection.request("GET", target, headers={"User-Agent": "paligemma", "Accept": "image/*", "Connection": "close"})
        with connection.getresponse() as response:
            location, content_type = response.headers["Location"], response.headers["Content-Type"] or ""
            if response.status == 200:
                return read_body(response, name, deadline), content_type.partition(";")[0].strip().lower()
            if response.status not in REDIRECTS or not location:
                raise AccessError(f"{name} answered {response.status} {one_line(response.reason)}. Check the address.", path=name)
        refusal = REDIRECTED if is_public_server and refusal is None else refusal
        address = urllib.parse.urljoin(address, location)
    raise AccessError(
        f"{name} redirects more than {MAX_REDIRECTS} times. Open it in a browser and copy the last address.", path=name
    )


def fetch(address: str, *, may_be_private: bool = True, timeout_s: float = TIMEOUT_S) -> tuple[bytes, str]:
    """The response to a GET of an http(s) address: the body and its content type, such as "image/png"; "" if there is none.

    Args:
        may_be_private: whether the address may be in the local network. True for an address that a user typed.
        timeout_s: time for the whole download: looking up the host, connecting, redirects, reading.
    Raises: AccessError for a status other than 200, more than 3 redirects, a redirect into the local network, more than 32 MB,
        or a download that takes longer than `timeout_s`.
    """
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
