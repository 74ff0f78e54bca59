"""Whether the Hugging Face hub can be reached, and whether a run needs it. A connection is opened, nothing is sent."""

import os
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

from neobert.benchmark.write_speed import find_existing
from neobert.config.schema import Config
from neobert.data.source.spec import PYTHON_STDLIB, describe_sources

_SECONDS = 2.0
"""For one connection; the look-up of its name may take longer, and is not waited for either."""


class HubAccess:
    """The answer about the hub of a config; the connection is tried while others work.

    Args:
        network: tries to open a connection.
    """

    def __init__(self, config: Config, *, network: bool) -> None:
        self._names = list_hub_names(config)
        self._offline: bool = constants.HF_HUB_OFFLINE
        self._host, self._port, self._way = choose_address()
        self._error: str | None = f"no answer in {_SECONDS:.0f} s"
        self._thread: threading.Thread | None = None
        if network and not self._offline:
            self._thread = threading.Thread(target=self._connect, daemon=True)
            self._thread.start()

    def _connect(self) -> None:
        try:
            socket.create_connection((self._host, self._port), timeout=_SECONDS).close()
        except OSError as error:
            self._error = error.strerror or str(error)
        else:
            self._error = None

    def describe(self) -> tuple[str, dict[str, Any], list[str]]:
        """A line, the values in it, and advice where the config reads from a hub that cannot be reached or kept."""
        cache = Path(constants.HF_HUB_CACHE)
        address = f"{self._host}:{self._port}"
        if self._offline:
            state, problem = "HF_HUB_OFFLINE is set: only what is in its cache is read", "HF_HUB_OFFLINE is set"
        elif self._thread is None:
            state, problem = "not tried", None
        else:
            self._thread.join(_SECONDS)
            problem = None if self._error is None else f"{address} cannot be reached ({self._error})"
            state = problem or f"{address} can be reached"
        advice = []
        if problem is not None and self._names:
            advice.append(
                f"{problem}, and this config reads from the hub ({', '.join(self._names)}): only what is in {cache} is "
                "there; fetch it on a machine that can, set HF_ENDPOINT to a mirror, or name local files"
            )
        if not os.access(find_existing(cache), os.W_OK) and self._names:
            advice.append(
                f"{cache} cannot be written, and this config reads from the hub; set HF_HOME to another folder"
            )
        values = {"address": address, "way": self._way, "offline": self._offline, "problem": problem}
        return f"{state}; {self._way}; cache {cache}", values | {"cache": str(cache), "names": self._names}, advice


def choose_address() -> tuple[str, int, str]:
    """Host and port that a request to the hub would connect to, and why; nothing else of an address, which may hold a
    password."""
    endpoint = urlsplit(constants.ENDPOINT)
    mirrored = os.environ.get("HF_ENDPOINT") is not None
    way = f"HF_ENDPOINT names {endpoint.hostname}" if mirrored else "HF_ENDPOINT is not set"
    proxy = getproxies().get(endpoint.scheme)
    if proxy is not None and not proxy_bypass(endpoint.hostname or ""):
        endpoint = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        way += ", through a proxy"
    return endpoint.hostname or "localhost", endpoint.port or (443 if endpoint.scheme == "https" else 80), way


def list_hub_names(config: Config) -> list[str]:
    """Keys of a config that name something on the hub, each with its value."""
    tokenizer, initial = config.tokenizer, config.model.init_from
    names = [f"dataset {x.name}" for x in describe_sources(config.dataset) if not x.path and x.name != PYTHON_STDLIB]
    if tokenizer.path is None and not tokenizer.train and tokenizer.name is not None:
        names.append(f"tokenizer.name {tokenizer.name}")
    if initial is not None and not Path(initial).expanduser().exists():
        names.append(f"model.init_from {initial}")
    return names
