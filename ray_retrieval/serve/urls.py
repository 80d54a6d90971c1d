"""Images named by URL: fetched from listed hosts only, and from no private address that is not listed itself.

The name is resolved once, what it resolves to is checked, and that very address is connected to: a name that
resolves to something else a moment later changes nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urljoin, urlsplit

import httpx

from ray_retrieval.errors import QueryError
from ray_retrieval.serve.uploads import too_large

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Addresses of a host name and port."""
Count = Callable[[int], None]

_AT_ONCE = 8
"""Images of one request that are fetched at once."""
_REDIRECTS = 3
_MOVED = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_AGENT = "ray_retrieval"


class Fetcher:
    """Fetches images from listed hosts.

    Args:
        hosts: names or addresses; one with a port, such as `images.example.com:8443`, opens that port alone.
        max_bytes: largest file.
        timeout_s: for one file, redirections included.
        resolve: looks names up.
        transport: what carries requests, for tests.
    """

    def __init__(
        self,
        hosts: tuple[str, ...],
        *,
        max_bytes: int,
        timeout_s: float,
        resolve: Resolve | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._resolve = resolve or _look_up
        self._transport = transport
        self._made: httpx.AsyncClient | None = None

    async def fetch(self, url: str, count: Count = lambda _: None) -> bytes:
        """The bytes of a file.

        Args:
            url: of the file.
            count: told how many bytes have come, each time some do; what it raises ends the fetch.

        Raises:
            QueryError: 403 if its host is not listed or lies at a private address, 413 if it is too large,
                422 if it cannot be had.
        """
        try:
            return await asyncio.wait_for(self._fetch(url, count), self._timeout_s)
        except (asyncio.TimeoutError, TimeoutError, httpx.TimeoutException):
            raise _failed(url, f"its host gave no answer within {self._timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError):
            raise _failed(url, "its host cannot be reached") from None

    async def _fetch(self, url: str, count: Count) -> bytes:
        place = url
        for _ in range(_REDIRECTS + 1):
            try:
                found = await self._get(place, count)
            except QueryError as error:
                # Where a host sends on to is for the server alone: it may be signed.
                raise QueryError(
                    error.problem, where=url[:200], mend=error.mend, status=error.status
                ) from None
            if isinstance(found, bytes):
                return found
            place = urljoin(place, found)
        raise _failed(url, "it leads from one address to the next")

    async def _get(self, url: str, count: Count) -> bytes | str:
        """The file, or the address that it has moved to."""
        scheme, host, port = self._listed(url)
        address = await self._address(host, port)
        parts = urlsplit(url)
        literal = f"[{address}]" if address.version == 6 else str(address)
        # The connection goes to the checked address; name and certificate stay those of the host.
        target = parts._replace(netloc=f"{literal}:{port}", fragment="").geturl()
        headers = {"Host": _host_header(host, port, scheme), "Accept": "image/*", "User-Agent": _AGENT}
        headers["Accept-Encoding"] = "identity"
        client = self._client()
        request = client.build_request("GET", target, headers=headers, extensions={"sni_hostname": host})
        answer = await client.send(request, stream=True, follow_redirects=False)
        try:
            if answer.status_code in _MOVED:
                return str(answer.headers.get("location", ""))
            if answer.status_code != 200:
                raise _failed(url, f"its host answered with status {answer.status_code}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise _failed(url, "its host sends it compressed, though asked not to")
            return await self._read(answer, url, count)
        finally:
            await answer.aclose()

    def _client(self) -> httpx.AsyncClient:
        if self._made is None:
            self._made = httpx.AsyncClient(
                # Without the environment's proxies: they would resolve the name once more.
                trust_env=False,
                timeout=self._timeout_s,
                transport=self._transport,
                # Connections are kept by address, and several hosts may share one: each proves itself anew.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        return self._made

    async def _read(self, answer: httpx.Response, url: str, count: Count) -> bytes:
        data = bytearray()
        async for chunk in answer.aiter_bytes():
            data += chunk
            count(len(chunk))
            if len(data) > self._max_bytes:
                raise too_large("the image", self._max_bytes, where=url)
        return bytes(data)

    def _listed(self, url: str) -> tuple[str, str, int]:
        """Scheme, host and port of a URL that may be asked."""
        try:
            parts = urlsplit(url)
            host, scheme = (parts.hostname or "").rstrip("."), parts.scheme.lower()
            port = parts.port or _PORTS.get(scheme, 0)
        except ValueError:
            raise QueryError(
                "the URL cannot be read", where=url[:200], mend="send the address of an image", status=422
            ) from None
        if scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
            raise QueryError(
                "an image's URL is http:// or https://, a host and a path",
                where=url[:200],
                mend="send such an address, or the image itself",
                status=422,
            )
        if not self._lists(host, port):
            raise QueryError(
                f"images of '{host}' are not fetched here" if self._hosts else "images are not fetched here",
                where=url[:200],
                mend="send the image itself, or let the server's url_hosts name the host",
                status=403,
            )
        return scheme, host, port

    async def _address(self, host: str, port: int) -> Address:
        """An address of a host. All that its name stands for have to be allowed."""
        try:
            found = [ipaddress.ip_address(host)]
        except ValueError:
            try:
                found = [
                    ipaddress.ip_address(one.partition("%")[0]) for one in await self._resolve(host, port)
                ]
            except (OSError, UnicodeError):
                found = []
        if not found:
            raise QueryError(f"the host '{host}' is not known", where="url", status=422)
        for address in found:
            if not _is_public(address) and not self._lists(str(address), port):
                raise QueryError(
                    f"'{host}' lies at a private address",
                    where="url",
                    mend="send the image itself, or let url_hosts name that address and port too",
                    status=403,
                )
        return found[0]

    def _lists(self, host: str, port: int) -> bool:
        """Whether a name or address is listed with that port, or without one and the port is a usual one."""
        name = f"[{host}]" if ":" in host else host
        usual = port in _PORTS.values() and not self._hosts.isdisjoint({host, name})
        return usual or f"{name}:{port}" in self._hosts


class Fetching:
    """The images that one request names by URL: a few are fetched at once, all of them up to a size together.

    Args:
        fetcher: of each.
        max_bytes: of all of them.
    """

    def __init__(self, fetcher: Fetcher, max_bytes: int) -> None:
        self._fetcher, self._max_bytes = fetcher, max_bytes
        self._fetched = 0
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """The bytes of a file.

        Raises:
            QueryError: as `Fetcher.fetch`; 413 if those of the request are too many.
        """
        async with self._places:
            self.check()
            return await self._fetcher.fetch(url, self._count)

    def check(self) -> None:
        """See that the images are not too large together.

        Raises:
            QueryError: 413 if they are.
        """
        if self._fetched > self._max_bytes:
            raise too_large("the images of the request together", self._max_bytes, where="url")

    def _count(self, count: int) -> None:
        self._fetched += count
        self.check()


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        # Addresses that carry another one lead there.
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(_is_public(one) for one in inner if one is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


def _host_header(host: str, port: int, scheme: str) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port == _PORTS[scheme] else f"{name}:{port}"


async def _look_up(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _failed(url: str, why: str) -> QueryError:
    return QueryError(
        f"the image cannot be had: {why}", where=url[:200], mend="send the image itself", status=422
    )
