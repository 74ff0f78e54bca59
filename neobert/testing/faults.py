"""Named fault points: points where a test makes a run die, fail or wait.

    NEOBERT_FAULT="commit.written.optimizer.bin@8"           kill -9 there, at step 8
    NEOBERT_FAULT="commit.write.model.safetensors@*:enospc"  the disk is full, at every step
    NEOBERT_FAULT="commit.staged@4:sleep0.5:1"               rank 1 waits half a second

The form is `point@step[:action[:rank]]`. Actions: `kill` (default), `enospc`, `eio` (an OSError with that number),
`sleepS` (seconds). Without the variable a point is one look into the environment.
"""

import errno
import os
import signal
import time

VARIABLE = "NEOBERT_FAULT"


def fault_point(name: str, step: int) -> None:
    """Does what `NEOBERT_FAULT` asks for at this point and step; nothing without it.

    Raises:
        OSError: the action is `enospc` or `eio`.
        ValueError: the action is unknown.
    """
    if VARIABLE not in os.environ:
        return
    point, _, rest = os.environ[VARIABLE].partition("@")
    when, action, rank = (*rest.split(":"), "", "")[:3]
    if point != name or when not in ("*", str(step)) or rank not in ("", os.environ.get("RANK", "0")):
        return
    if action in ("", "kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in ERRORS:
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]), name)
    elif action.startswith("sleep"):
        time.sleep(float(action.removeprefix("sleep")))
    else:
        raise ValueError(f"{VARIABLE}: action {action!r} is unknown; write kill, {', '.join(ERRORS)} or sleepS")


ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
