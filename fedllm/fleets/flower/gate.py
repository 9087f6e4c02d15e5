"""The one door of a server: passes what nodes need, and nothing else.

The open SuperLink serves its administration on the same port as the nodes' requests and asks nobody for a credential,
so it listens on loopback alone and this stands in front.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedllm.errors import FedError

FLEET = "/v1/fleet/"
"""The only paths that pass."""

ASK = FLEET + "fedllm-known"
"""A path of the gate's own: a node asks which client its key belongs to."""

KEY_HEADER = "flwr-public-key"

MOST = 8 << 20
"""Bytes of a request: Flower's objects have 5 MiB."""

DROPPED = {
    "host",
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "upgrade",
    "content-length",
    "accept-encoding",
}
"""Headers of one hop, and those that the next hop writes itself."""


@dataclass(frozen=True)
class Gate:
    """A gate that runs in a thread for as long as its context lasts.

    Args:
        host: where it listens.
        port: likewise.
        upstream: the SuperLink, as ``https://127.0.0.1:PORT``.
        ca: the certificate authority's file; None on plain HTTP.
        certificate: its own, and ``key`` the key to it.
        known: the public keys that may pass, as PEM, with their clients; None where nodes have none.
    """

    host: str
    port: int
    upstream: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    known: Callable[[], Mapping[bytes, str]] | None = None

    def application(self) -> Starlette:
        """The gate as an ASGI application."""
        verify: Any = True if self.ca is None else ssl.create_default_context(cafile=str(self.ca))

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
            async with httpx.AsyncClient(
                base_url=self.upstream, verify=verify, timeout=120.0, limits=limits, trust_env=False
            ) as client:
                app.state.client = client
                yield

        return Starlette(routes=[Route("/{path:path}", self._pass, methods=METHODS)], lifespan=lifespan)

    async def _pass(self, request: Request) -> Response:
        path = request.scope["path"]
        raw = request.scope.get("raw_path", b"").split(b"?")[0]
        if request.method != "POST" or not path.startswith(FLEET) or ".." in path or raw != path.encode():
            return Response(status_code=403)
        client = self._client(request)
        if client is None:
            return Response(status_code=401)
        if path == ASK:
            return Response(client)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST:
                return Response(status_code=413)
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in DROPPED]
        try:
            answer = await request.app.state.client.post(path, content=bytes(body), headers=headers)
        except httpx.HTTPError:
            return Response(status_code=503)  # the SuperLink is restarting: nodes come again
        passed = {
            name: value
            for name, value in answer.headers.items()
            if name.lower() not in DROPPED and name.lower() != "content-encoding"
        }
        return Response(answer.content, answer.status_code, passed)

    def _client(self, request: Request) -> str | None:
        """The client that a node's key belongs to; that it has the private half too is the SuperLink's to check."""
        if self.known is None:
            return ""
        with suppress(ValueError):
            return self.known().get(base64.b64decode(request.headers.get(KEY_HEADER, ""), validate=True))
        return None

    def __enter__(self) -> Gate:
        config = uvicorn.Config(
            self.application(),
            host=self.host,
            port=self.port,
            ssl_certfile=None if self.certificate is None else str(self.certificate),
            ssl_keyfile=None if self.key is None else str(self.key),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True, name="gate")
        object.__setattr__(self, "_running", (server, thread))
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise FedError(f"the gate cannot listen on {self.host}:{self.port}: another program may have the port.")
            thread.join(0.05)
        return self

    def __exit__(self, *ended: object) -> None:
        server, thread = self._running  # type: ignore[attr-defined]
        server.should_exit = True
        thread.join(5.0)


METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def refuse_taken(host: str, port: int) -> None:
    """Raises FedError where another program listens there."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, port))
    except OSError as error:
        raise FedError(f"{host}:{port} cannot be listened on: {error.strerror}. Give another --port.") from error
