"""A small HTTP server for one model: JSON in, JSON out, a thread for each connection, one model behind all.

It is for a machine of one's own: no encryption, no accounts, and by default it listens on this machine alone.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from neobert.errors import CallError
from neobert.inference.service import RequestError, Service
from neobert.secrets import build_logger

logger = build_logger(__name__)

_IDLE_SECONDS = 30.0
"""A connection that says nothing for so long is closed, and a body that is not there after it is not waited for."""

_MOST_CONNECTIONS = 256
"""At once, each with a thread and at most one body; more are closed as they come."""

_DROPPED_BYTES, _DROPPED_SECONDS = 64 << 20, 5.0
"""Of a body that is refused: read and dropped, so that a client that still sends it gets the answer."""

Route = Callable[[Service, Mapping[str, Any]], dict[str, Any]]
ROUTES: dict[str, tuple[str, Route]] = {
    "/health": ("GET", Service.health),
    "/v1/models": ("GET", Service.models),
    "/v1/embeddings": ("POST", Service.embeddings),
    "/v1/fill-mask": ("POST", Service.fill_mask),
}
"""Path -> its method and what answers."""


class ModelServer(ThreadingHTTPServer):
    """Listens from its construction on; `service` is set before `serve_forever`.

    Raises:
        CallError: it cannot listen there.
    """

    daemon_threads = True
    # Clients that wait for a connection while threads start.
    request_queue_size = 128
    service: Service

    def __init__(self, host: str, port: int) -> None:
        if not 0 <= port < 1 << 16:
            raise CallError(f"--port: {port}; write a number from 0 (any that is free) to 65535")
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._answering, self._idle = 0, threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            key = "--port" if port else "--host"
            raise CallError(
                f"{key}: cannot listen on {host} port {port} ({error.strerror}); choose another one, --port 0 takes "
                "one that is free"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, where one is free."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around a request, from its head to the end of the response."""
        with self._idle:
            self._answering += 1
        try:
            yield
        finally:
            with self._idle:
                self._answering -= 1
                self._idle.notify_all()

    def wait_for_answers(self) -> None:
        """Until every request that was begun has its response; for a while only, since a client may be gone."""
        with self._idle:
            self._idle.wait_for(lambda: self._answering == 0, timeout=_IDLE_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no error."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("a connection failed")

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "neobert"
    sys_version = ""
    timeout = _IDLE_SECONDS
    # The head and the body of a response are one packet for small ones.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: ModelServer

    def do_GET(self) -> None:
        with self.server.answering():
            self._answer("GET")

    def do_POST(self) -> None:
        with self.server.answering():
            self._answer("POST")

    def handle_expect_100(self) -> bool:
        """Says at once that a body may come: what is written waits in a buffer otherwise."""
        may_come = super().handle_expect_100()
        self.wfile.flush()
        return may_come

    def _answer(self, method: str) -> None:
        try:
            status, body = 200, self._run(method)
        except RequestError as error:
            status, body = error.status, error.to_dict()
        except Exception:
            logger.exception("%s %s failed", method, self.path)
            status, body = 500, RequestError(500, "the model failed; the server's output says why").to_dict()
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        if status in (411, 413):
            self._drop_body()

    def _drop_body(self) -> None:
        """Reads what a client still sends of a body that was refused: closed at once, it would see a broken connection
        instead of the answer."""
        end, dropped = time.monotonic() + _DROPPED_SECONDS, 0
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_DROPPED_SECONDS)
            while dropped < _DROPPED_BYTES and time.monotonic() < end and (part := self.rfile.read1(1 << 16)):
                dropped += len(part)

    def _run(self, method: str) -> dict[str, Any]:
        request: Mapping[str, Any] = {}
        if method == "POST":
            request = self._read_body()
        elif self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True  # What is not read would be taken for the next request.
        path = self.path.split("?")[0].rstrip("/") or "/"
        if path not in ROUTES:
            raise RequestError(404, f"{path}: there is no such path; known are {', '.join(ROUTES)}")
        expected, route = ROUTES[path]
        if method != expected:
            raise RequestError(405, f"{path}: {method} is not answered; use {expected}")
        return route(self.server.service, request)

    def _read_body(self) -> Mapping[str, Any]:
        """The JSON object that was sent. After an error the rest of it is not read, so the connection closes."""
        closes, self.close_connection = self.close_connection, True
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError(411, "Content-Length: missing or no number; send the length of the body")
        largest = self.server.service.limits.max_body_bytes
        if int(length) > largest:
            raise RequestError(413, f"the body has {length} bytes, and a request may have {largest}; send several")
        end, parts, left = time.monotonic() + _IDLE_SECONDS, list[bytes](), int(length)
        try:
            while left and (part := self.rfile.read1(min(left, 1 << 16))):
                parts.append(part)
                left -= len(part)
                if left and time.monotonic() > end:
                    raise TimeoutError
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive in {_IDLE_SECONDS:g} seconds") from None
        content = b"".join(parts)
        if len(content) < int(length):
            raise RequestError(400, f"the body has {len(content)} bytes, and Content-Length says {length}")
        self.close_connection = closes
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"the body is no JSON ({error}); send one object") from error
        if not isinstance(body, dict):
            raise RequestError(400, f"the body is JSON of a {type(body).__name__}; send one object")
        return body

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class answers by itself (a malformed request line), as JSON too."""
        content = json.dumps(RequestError(code, message or "the request is malformed").to_dict()).encode()
        self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests hold texts of others."""


def serve(server: ModelServer, service: Service) -> None:
    """Answers until it is interrupted, then what waits."""
    server.service = service
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        logger.info("stopping: requests that wait are answered")
    finally:
        server.server_close()
        service.close()
        server.wait_for_answers()
