"""Where the time of profiled steps went, from a trace of torch's profiler; the standard library suffices.

Every instant of the window has one owner, so that the fractions add up to 1:

- On a CPU the window is the profiled steps, and an instant belongs to the innermost operation that the training thread
  was in: an operation that calls others owns what they leave. Without any, the instant is idle: Python.
- On CUDA the window reaches from the first step's begin to the end of its last kernel, and an instant belongs to a
  kernel that ran. Where several streams ran one, computing wins over communication and copies: these show what they
  cost beyond it. Without any, the instant is idle: the GPU waited for the host.

The category of an operation or kernel comes from its own name and from what it was called in (`RULES`): a product
inside the loss is loss. A kernel was called in what the host was doing when it launched it, on whatever thread.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from neobert.errors import UserError

TRACE = "profiler_trace.json"
DATA_WAIT = "data wait"

Event = dict[str, Any]

RULES: tuple[tuple[str, Literal["own", "any"], str], ...] = (
    ("copies", "own", r"^memcpy|^memset"),
    ("communication", "own", r"nccl|gloo|c10d::"),
    ("data wait", "any", rf"^{DATA_WAIT}$"),
    ("loss", "any", r"cross_?entropy|nll_loss"),
    ("optimizer", "any", r"^optimizer\.|fused_adam|_foreach_"),
    ("attention", "any", r"attention|flash|fmha|flex_"),
    ("copies", "own", r"^aten::(copy_|_to_copy|to)$|direct_copy_kernel"),
    ("GEMM", "own", r"^aten::(mm|addmm|bmm|baddbmm|matmul|linear)$|gemm|nvjet|cutlass|cublas|splitk|triton_tem_.*mm"),
)
"""Category, whether the `own` name or `any` name around it counts, pattern in lower case; the first that fits."""

OTHERS = "norms, elementwise and other"
IDLE = "idle"
CATEGORIES = ("GEMM", "attention", "loss", OTHERS, "optimizer", "communication", "copies", "data wait", IDLE)
"""In the order in which they are shown, and in which simultaneous kernels win."""

SMALL_MICROSECONDS = {"cpu": 20.0, "cuda": 10.0}
"""Mean time up to which an operation or kernel is small: about what it costs to start it."""

FREQUENT = 10
"""Times in a step from which it is frequent."""

SHOWN = 5


class ProfileError(UserError):
    """The trace cannot be read, or holds no profiled step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSpan:
    """A time that one operation or kernel owns, in microseconds."""

    start: float
    end: float
    name: str
    category: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """All calls of one name."""

    name: str
    category: str
    calls_per_step: float
    mean_microseconds: float
    """On a CPU without the operations that it calls; on CUDA all of it, also where another stream ran."""

    share: float
    """Of the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """A time in which nothing ran."""

    milliseconds: float
    step: int | None
    """The step that the host was in when it started; None between two."""

    after: str
    before: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """What a trace says."""

    device: Literal["cpu", "cuda"]
    steps: tuple[int, ...]
    milliseconds_per_step: float
    shares: dict[str, float]
    """Category -> fraction of the window; they add up to 1."""

    largest: tuple[Operation, ...]
    small: tuple[Operation, ...]
    """Small and frequent ones, by their fraction."""

    gaps: tuple[Gap, ...]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def analyse_path(path: Path) -> Analysis:
    """Of a trace, or of the folder of a run.

    Raises:
        ProfileError: there is no trace, or nothing in it.
    """
    file = path / TRACE if path.is_dir() else path
    try:
        trace = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ProfileError(
            f"{file} is not there; train with trainer.profiler_steps_start and trainer.profiler_steps"
        ) from error
    except (OSError, ValueError) as error:
        raise ProfileError(f"{file} cannot be read as a trace ({error})") from error
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise ProfileError(f"{file} is not a trace of torch's profiler: it has no list `traceEvents`")
    return analyse(trace)


def analyse(trace: dict[str, Any]) -> Analysis:
    """Of a trace in the format of Chrome's, as torch's profiler exports it.

    Raises:
        ProfileError: it has no profiled step.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "cat" in e]
    steps = find_steps(events, trace.get("profiled_steps"))
    if not steps:
        raise ProfileError("the trace has no mark `ProfilerStep#N` of a step: it is not of a training run")
    kernels = [e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        windows, spans, calls = _analyse_cuda(events, kernels, steps)
    else:
        windows, spans, calls = _analyse_cpu(events, steps)
    return _summarise("cuda" if kernels else "cpu", steps, windows, spans, calls)


def find_steps(events: Iterable[Event], profiled: Sequence[int] | None) -> dict[int, Event]:
    """Number -> mark of each profiled step, in order; marks of steps that were not made are left out."""
    marks = {
        int(e["name"].removeprefix("ProfilerStep#")): e
        for e in events
        if e["cat"] == "user_annotation" and e["name"].startswith("ProfilerStep#")
    }
    return {number: marks[number] for number in sorted(marks) if profiled is None or number in profiled}


def classify(name: str, around: Sequence[str]) -> str:
    """The category of an operation or kernel called inside of `around`."""
    own, names = name.lower(), [text.lower() for text in (name, *around)]
    for category, where, pattern in RULES:
        if any(re.search(pattern, text) for text in (names if where == "any" else [own])):
            return category
    return OTHERS


Windows = list[tuple[float, float]]
Calls = list[tuple[str, str, float]]
"""Name, category and microseconds of every call."""


def _analyse_cpu(events: Sequence[Event], steps: dict[int, Event]) -> tuple[Windows, list[TraceSpan], Calls]:
    windows = [(e["ts"], e["ts"] + e["dur"]) for e in steps.values()]
    thread = next(iter(steps.values()))["tid"]
    work = [e for e in events if e["tid"] == thread and e["cat"] in ("cpu_op", "user_annotation")]
    spans: list[TraceSpan] = []
    own: dict[int, float] = defaultdict(float)
    chosen: dict[int, tuple[str, str]] = {}
    for start, end in windows:
        inside = [e for e in work if start <= e["ts"] < end and not e["name"].startswith("ProfilerStep#")]
        for at, to, stack in flatten(inside):
            innermost = stack[-1]
            key = id(innermost)
            if key not in chosen:
                around = [e["name"] for e in stack[:-1]]
                chosen[key] = (innermost["name"], classify(innermost["name"], around))
            name, category = chosen[key]
            spans.append(TraceSpan(start=at, end=min(to, end), name=name, category=category))
            own[key] += min(to, end) - at
    return windows, spans, [(*chosen[key], time) for key, time in own.items()]


def flatten(events: Sequence[Event]) -> Iterator[tuple[float, float, list[Event]]]:
    """Nested events of one thread as times that follow each other, each with its events from outermost to innermost."""
    stack: list[Event] = []
    cursor = 0.0
    for event in [*sorted(events, key=lambda e: (e["ts"], -e["dur"])), None]:
        start = float("inf") if event is None else event["ts"]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= start:
            end = stack[-1]["ts"] + stack[-1]["dur"]
            if end > cursor:
                yield cursor, end, list(stack)
                cursor = end
            stack.pop()
        if event is None:
            return
        if stack and start > cursor:
            yield cursor, start, list(stack)
        cursor = max(cursor, start)
        stack.append(event)


def _analyse_cuda(
    events: Sequence[Event], kernels: Sequence[Event], steps: dict[int, Event]
) -> tuple[Windows, list[TraceSpan], Calls]:
    marks = list(steps.values())
    start = marks[0]["ts"]
    host_end = marks[-1]["ts"] + marks[-1]["dur"]
    around = _names_around_launches(events)
    launched = {e["args"]["correlation"]: e["ts"] for e in events if _is_launch(e)}
    # A kernel without a launch was launched before the recording started.
    ours = [e for e in kernels if launched.get(e["args"].get("correlation"), -1.0) < host_end]
    end = max([host_end, *(e["ts"] + e["dur"] for e in ours)])
    spans, calls = [], []
    for event in kernels:
        at, to = max(event["ts"], start), min(event["ts"] + event["dur"], end)
        if to <= at:
            continue
        category = classify(event["name"], around.get(event["args"].get("correlation"), ()))
        spans.append(TraceSpan(start=at, end=to, name=event["name"], category=category))
        calls.append((event["name"], category, to - at))
    return [(start, end)], list(without_overlap(spans)), calls


def _is_launch(event: Event) -> bool:
    return event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})


def _names_around_launches(events: Sequence[Event]) -> dict[int, list[str]]:
    """Correlation number -> names of what its thread was in at the launch."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event["cat"] in ("cpu_op", "user_annotation") or _is_launch(event):
            threads[event["tid"]].append(event)
    found: dict[int, list[str]] = {}
    for thread in threads.values():
        stack: list[Event] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                stack.pop()
            if _is_launch(event):
                found[event["args"]["correlation"]] = [e["name"] for e in stack]
            else:
                stack.append(event)
    return found


def without_overlap(spans: Sequence[TraceSpan]) -> Iterator[TraceSpan]:
    """The same times, each once: of simultaneous spans the one of the earlier category, then the one started first."""
    ranks = {category: rank for rank, category in enumerate(CATEGORIES)}
    borders = sorted(
        [(s.start, 1, number) for number, s in enumerate(spans)]
        + [(s.end, 0, number) for number, s in enumerate(spans)]
    )
    active: set[int] = set()
    cursor = 0.0
    for time, begins, number in borders:
        if active and time > cursor:
            winner = spans[min(active, key=lambda n: (ranks[spans[n].category], spans[n].start, n))]
            yield TraceSpan(start=cursor, end=time, name=winner.name, category=winner.category)
        cursor = time
        (active.add if begins else active.remove)(number)


def _summarise(
    device: Literal["cpu", "cuda"], steps: dict[int, Event], windows: Windows, spans: Sequence[TraceSpan], calls: Calls
) -> Analysis:
    total = sum(end - start for start, end in windows)
    times = dict.fromkeys(CATEGORIES, 0.0)
    for span in spans:
        times[span.category] += span.end - span.start
    times[IDLE] = total - sum(times.values())
    operations = _add_up(calls, len(steps), total)
    small = (
        o for o in operations if o.calls_per_step >= FREQUENT and o.mean_microseconds <= SMALL_MICROSECONDS[device]
    )
    return Analysis(
        device=device,
        steps=tuple(steps),
        milliseconds_per_step=total / len(steps) / 1e3,
        shares={category: time / total for category, time in times.items()},
        largest=tuple(operations[:SHOWN]),
        small=tuple(small)[:SHOWN],
        gaps=tuple(sorted(_find_gaps(windows, spans, steps), key=lambda g: -g.milliseconds)[:SHOWN]),
    )


def _add_up(calls: Calls, num_steps: int, total: float) -> list[Operation]:
    """All calls by name and category, the largest first."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, category, time in calls:
        times[name, category].append(time)
    found = [
        Operation(
            name=name,
            category=category,
            calls_per_step=len(each) / num_steps,
            mean_microseconds=sum(each) / len(each),
            share=sum(each) / total,
        )
        for (name, category), each in times.items()
    ]
    return sorted(found, key=lambda o: -o.share)


def _find_gaps(windows: Windows, spans: Sequence[TraceSpan], steps: dict[int, Event]) -> Iterator[Gap]:
    """Times inside of the windows that no span covers."""
    for start, end in windows:
        inside = sorted((s.start, s.end, s.name) for s in spans if start <= s.start < end)
        cursor, previous = start, "the begin"
        for at, to, name in [*inside, (end, end, "the end")]:
            if at > cursor:
                number = next((n for n, e in steps.items() if e["ts"] <= cursor < e["ts"] + e["dur"]), None)
                yield Gap(milliseconds=(at - cursor) / 1e3, step=number, after=previous, before=name)
            cursor, previous = max(cursor, to), name


def describe(analysis: Analysis) -> str:
    """The analysis as text."""
    first, last, step = analysis.steps[0], analysis.steps[-1], analysis.milliseconds_per_step
    lines = [
        f"{analysis.device}, steps {first} to {last}: {step:,.2f} ms a step",
        "",
        f"{'category':<34}{'ms a step':>12}{'fraction':>9}",
        *(f"{name:<34}{share * step:>12,.2f}{share:>9.1%}" for name, share in analysis.shares.items()),
    ]
    for title, operations in (("largest", analysis.largest), ("small and frequent", analysis.small)):
        lines += ["", f"{title:<60}{'calls a step':>13}{'mean us':>11}{'fraction':>9}  category"]
        lines += [
            f"{_shorten(o.name):<60}{o.calls_per_step:>13,.1f}{o.mean_microseconds:>11,.1f}{o.share:>9.1%}"
            f"  {o.category}"
            for o in operations
        ] or ["none"]
    lines += ["", "largest gaps"]
    lines += [
        f"{gap.milliseconds:>10,.3f} ms in {'step ' + str(gap.step) if gap.step is not None else 'between two steps'}: "
        f"after {_shorten(gap.after)}, before {_shorten(gap.before)}"
        for gap in analysis.gaps
    ] or ["none"]
    return "\n".join(lines)


def _shorten(name: str) -> str:
    return name if len(name) <= 58 else f"{name[:55]}..."
