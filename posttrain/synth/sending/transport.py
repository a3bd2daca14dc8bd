"""HTTP/1.1 on one connection per lane, as an httpx transport.

httpx's own connection pool looks at every connection for every request, which costs milliseconds at a hundred lanes
(benchmarks/README.md). Here a lane keeps its connection, and the types, the auth classes and the mock transport of
httpx stay usable; h11 reads the protocol.
"""

import asyncio
import importlib.metadata
import os
import re
import socket
import ssl
import urllib.request

import h11
import httpx

READ = 65536
NO_SUCH_HOST = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
LARGEST_HEADER = 256 * 1024


def user_agent() -> str:
    """Return what servers get to know about who asks."""
    try:
        return f"posttrain/{importlib.metadata.version('posttrain')}"
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        return "posttrain"


class Hopeless(httpx.ConnectError):
    """The server cannot be reached as it was named, however long one waits."""


def hopeless(error: BaseException | None) -> bool:
    """Whether a connection failed because the host has no address, or its certificate is not trusted."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        if isinstance(error, socket.gaierror) and error.errno in NO_SUCH_HOST:
            return True
        error = error.__cause__ or error.__context__
    return False


def plainly(error: BaseException) -> str:
    """Return why there is no connection, in the words of the operating system.

    >>> plainly(OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] Connect call failed"))
    'Connection refused'
    """
    codes = dict.fromkeys(re.findall(r"\[Errno (\d+)\]", str(error)))
    return ", ".join(os.strerror(int(code)) for code in codes) or str(error) or "no answer in time"


class LaneTransport(httpx.AsyncBaseTransport):
    """One request at a time to one origin; the connection is kept, and made again when it is gone."""

    def __init__(self, context: ssl.SSLContext | None, connect_timeout: float = 10.0) -> None:
        self._context, self._connect_timeout = context, connect_timeout
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEADER)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the whole answer.

        Raises:
            httpx.ConnectError: nothing was sent.
            httpx.ReadError, httpx.RemoteProtocolError: the connection broke, or the answer is cut short.
            httpx.LocalProtocolError: the request can never be sent.
        """
        if self._reader is None or self._reader.at_eof() or self._http.our_state is not h11.IDLE:
            await self._connect(request.url)
        try:
            await self._send(request)
            return await self._answer()
        except (OSError, EOFError) as error:
            self._drop()
            raise httpx.ReadError(f"the connection broke: {error or type(error).__name__}") from None
        except h11.LocalProtocolError:  # its message shows the header, and the header may hold the key
            self._drop()
            raise httpx.LocalProtocolError(
                "a header of the request holds a line break or another character that no header can hold"
            ) from None
        except h11.RemoteProtocolError as error:
            self._drop()
            raise httpx.RemoteProtocolError(f"the answer is not whole: {error}") from None
        except BaseException:  # cancelled or timed out in the middle: what comes next would be read as another's
            self._drop()
            raise

    async def aclose(self) -> None:
        """Close the connection."""
        self._drop()

    async def _connect(self, url: httpx.URL) -> None:
        self._drop()
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            async with asyncio.timeout(self._connect_timeout):
                self._reader, self._writer = await asyncio.open_connection(
                    url.host, port, ssl=self._context if url.scheme == "https" else None, limit=2**20
                )
        except (OSError, TimeoutError) as error:  # ssl.SSLError and name resolution are OSErrors
            kind = Hopeless if hopeless(error) else httpx.ConnectError
            raise kind(plainly(error)) from None

    async def _send(self, request: httpx.Request) -> None:
        assert self._writer is not None
        headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"transfer-encoding"]
        out = self._http.send(h11.Request(method=request.method, target=request.url.raw_path, headers=headers))
        body = self._http.send(h11.Data(data=request.content)) if request.content else b""
        end = self._http.send(h11.EndOfMessage())
        self._writer.write(b"".join((out or b"", body or b"", end or b"")))
        await self._writer.drain()

    async def _answer(self) -> httpx.Response:
        assert self._reader is not None
        head: h11.Response | None = None
        parts: list[bytes] = []
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                data = await self._reader.read(READ)
                if not data and head is None:
                    raise EOFError("closed without an answer")
                self._http.receive_data(data)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
        assert head is not None
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self._drop()
        return httpx.Response(
            head.status_code, headers=head.headers.raw_items(), stream=httpx.ByteStream(b"".join(parts))
        )

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEADER)


def lane_transport(url: httpx.URL, context: ssl.SSLContext | None) -> httpx.AsyncBaseTransport:
    """Return a transport for one lane: our own, or httpx's where the environment names a proxy for this host."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy is None or urllib.request.proxy_bypass(url.host):
        return LaneTransport(context)
    return httpx.AsyncHTTPTransport(verify=context or True, proxy=proxy, limits=httpx.Limits(max_connections=1))


async def exchange(transport: httpx.AsyncBaseTransport, auth: httpx.Auth, request: httpx.Request) -> httpx.Response:
    """Send a request with its auth and return the answer, read whole; an auth may answer a refusal with a new token."""
    flow = auth.async_auth_flow(request)
    try:
        outgoing = await anext(flow)
        while True:
            response = await transport.handle_async_request(outgoing)
            await response.aread()
            try:
                outgoing = await flow.asend(response)
            except StopAsyncIteration:
                return response
    finally:
        await flow.aclose()
