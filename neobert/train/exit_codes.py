"""Exit codes of the training scripts."""

from neobert.cli import STOPPED

EXIT_CODES: dict[str, int] = {
    "finished": 0,
    "complete": 0,
    "disk": 74,
    "preempted": STOPPED,
    "out_of_time": STOPPED,
    "numbers": 76,
}
"""How a run ended -> the exit code of the script."""
