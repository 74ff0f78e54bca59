"""Exit codes of the training scripts."""

EXIT_CODES: dict[str, int] = {
    "finished": 0,
    "complete": 0,
    "disk": 74,
    "preempted": 75,
    "out_of_time": 75,
    "numbers": 76,
}
"""How a run ended -> the exit code of the script."""
