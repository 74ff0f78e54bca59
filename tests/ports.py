"""Ports for tests of several processes, so that workers and suites that run side by side do not meet."""

import itertools
import os
import socket

_FIRST, _PROCESSES, _PER_PROCESS = 10_000, 200, 100
"""Below 32,768, where the system takes ports of outgoing connections from; each process has a hundred of its own."""

_numbers = itertools.cycle(range(_PER_PROCESS))


def free_port() -> int:
    """A port that nobody listens on, and that no other call returns soon.

    Raises:
        OSError: all ports of this process are taken.
    """
    first = _FIRST + os.getpid() % _PROCESSES * _PER_PROCESS
    for number in itertools.islice(_numbers, _PER_PROCESS):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + number))
            except OSError:
                continue
            return first + number
    raise OSError(f"no port from {first} to {first + _PER_PROCESS - 1} is free")
