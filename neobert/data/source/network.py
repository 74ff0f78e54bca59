"""Faults of a network: which ones pass, and waiting for that."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from neobert.errors import DataError
from neobert.secrets import build_logger

logger = build_logger(__name__)

Result = TypeVar("Result")

_MAX_PAUSE_SECONDS = 60

_CLIENTS = ("requests", "urllib3", "httpx", "httpcore", "aiohttp", "botocore", "aiobotocore", "http", "google", "gcsfs")
"""Packages whose connection errors count."""

_CONNECTION_ERRORS = {
    "ConnectionError",
    "ConnectTimeout",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ChunkedEncodingError",
    "ClientConnectionError",
    "ClientOSError",
    "ClientPayloadError",
    "ConnectError",
    "EndpointConnectionError",
    "IncompleteRead",
    "NetworkError",
    "PoolTimeout",
    "ProtocolError",
    "ReadError",
    "ReadTimeout",
    "ReadTimeoutError",
    "RemoteProtocolError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
    "ServerTimeoutError",
    "Timeout",
    "TimeoutException",
    "TransportError",
}


def with_retries(
    read: Callable[[], Result], *, retries: int, where: str, sleep: Callable[[float], Any] = time.sleep
) -> Result:
    """What `read` returns; after a network error that may pass it is called again, at most `retries` times.

    The pauses are 1, 2, 4 ... seconds, at most a minute.

    Raises:
        DataError: it fails still; names `where`.
    """
    attempt = 0
    while True:
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip() or 'no further message'}".splitlines()[0]
            if attempt == retries:
                raise DataError(
                    f"{where} cannot be read: {reason}. It was tried again {retries} times (dataset.network_retries); "
                    "check the connection and start again; a run continues from its last checkpoint"
                ) from error
        seconds = min(_MAX_PAUSE_SECONDS, 2**attempt)
        attempt += 1
        logger.warning("%s: %s; attempt %d of %d in %d s", where, reason, attempt, retries, seconds)
        sleep(seconds)


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of the network and may pass.

    Detected by the names of types and by HTTP status, because the packages they come from are optional.
    """
    while error is not None:
        names = {base.__name__ for base in type(error).__mro__}
        if "OfflineModeIsEnabled" in names:
            return False
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        packages = {base.__module__.split(".")[0] for base in type(error).__mro__}
        if packages.intersection(_CLIENTS) and names.intersection(_CONNECTION_ERRORS):
            return True
        status = _http_status(error)
        if status is not None and (status == 429 or 500 <= status < 600):
            return True
        error = error.__cause__
    return False


def _http_status(error: BaseException) -> int | None:
    """The status in an error of requests and httpx (`response.status_code`), aiohttp (`status`), gcsfs (`code`) or
    botocore (`response["ResponseMetadata"]`)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = (
            getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
        )
    try:
        return int(status) if status is not None else None
    except (TypeError, ValueError):
        return None
