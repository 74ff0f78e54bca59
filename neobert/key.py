"""All that is known of one config key, written at its field in the schema.

    max_bad_steps: int = key(5, at_least=1, resume="declared")
    ema_start_step: int = key(0, at_least=0, needs="trainer.ema_decay", resume="declared")

Range checks, "has no effect without", refusals of another task's keys, what a resume may change, `--help` and
docs/configuration.md are made from it. Only rules over several keys are written by hand, in `neobert.config.rules`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")

Resume = Literal["free", "schedule", "declared", "order", "fixed"]

RESUME: dict[Resume, str] = {
    "free": "changes nothing that is learned: speed, logging, paths, the machine",
    "schedule": "the learning rate and the length of the run: may always change, since both are functions of the step",
    "declared": "changes what is learned: accepted when `trainer.resume_allow` names it",
    "order": "changes which rows are read: as declared, and the order starts at its first row",
    "fixed": "cannot change: start a new run",
}
"""What a resume does with another value of a key than the checkpoint's."""

Changes = Literal["source", "split", "evaluation", "batch"]

CHANGES: dict[Changes, str] = {
    "source": "names the data: other data starts at its first row, and needs no declaration; the same data is free",
    "split": "decides which documents of the data train: to be declared only when they change",
    "evaluation": "changes what is evaluated: free when another source is named anyway",
    "batch": "changes what is in the next batch, though not which rows come next",
}
"""What of the data a key changes; a key may have several."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Alternatives of which one must hold: a key that is set, or that has one of these values."""

    alternatives: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """`trainer.ema_decay`, `scheduler.name=wsd|constant`, or several of them joined by ` or `."""
        pairs = (part.partition("=") for part in text.split(" or "))
        return cls(tuple((name, tuple(values.split("|")) if values else ()) for name, _, values in pairs))

    def holds(self, read: Callable[[str], Any]) -> bool:
        """Whether it holds where `read` gives the value of a key."""
        return any(
            show_value(read(name)) in values if values else read(name) not in (None, False, 0, (), [])
            for name, values in self.alternatives
        )

    def reason(self, read: Callable[[str], Any]) -> str:
        """The rest of a sentence that starts with "has no effect", where it does not hold."""
        if len(self.alternatives) == 1 and not self.alternatives[0][1]:
            return f"without {self.alternatives[0][0]}"
        return "with " + " and ".join(f"{name}: {show_value(read(name))}" for name, _ in self.alternatives)

    @property
    def remedy(self) -> str:
        """What to do where it does not hold."""
        if len(self.alternatives) == 1 and not self.alternatives[0][1]:
            return "set that, or remove this key"
        expected = (f"{name}: {' or '.join(values)}" if values else name for name, values in self.alternatives)
        return f"remove it, or write {' or '.join(expected)}"

    def __str__(self) -> str:
        return " or ".join(
            f"`{name}`" if not values else f"`{name}: {' | '.join(values)}`" for name, values in self.alternatives
        )


@dataclass(frozen=True, slots=True)
class When:
    """A resume class that depends on other keys."""

    condition: Condition
    then: Resume
    otherwise: Resume

    def __str__(self) -> str:
        return f"{self.then} with {self.condition}, else {self.otherwise}"


def when(condition: str, then: Resume, *, otherwise: Resume = "free") -> When:
    """The class `then` where `condition` holds (written as `Condition.parse` reads it)."""
    return When(Condition.parse(condition), then, otherwise)


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """The arguments of `key`, beside the default."""

    resume: Resume | When
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    because: str = ""
    needs: tuple[Condition, ...] = ()
    changes: tuple[str, ...] = ()
    path: bool = False
    machine: bool = False

    def choose_class(self, read: Callable[[str], Any]) -> Resume:
        """The resume class where `read` gives the values of keys."""
        if isinstance(self.resume, When):
            return self.resume.then if self.resume.condition.holds(read) else self.resume.otherwise
        return self.resume

    @property
    def classes(self) -> tuple[Resume, ...]:
        """The resume classes that it can have."""
        return (self.resume.then, self.resume.otherwise) if isinstance(self.resume, When) else (self.resume,)

    @property
    def has_range(self) -> bool:
        """Whether there is a bound."""
        return any(bound is not None for bound in (self.at_least, self.above, self.at_most, self.below))

    @property
    def range_text(self) -> str:
        """`at least 1`, `from 0 to 1`; empty without bounds."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        bounds = {"at least": self.at_least, "greater than": self.above, "at most": self.at_most}
        parts = [f"{phrase} {bound}" for phrase, bound in bounds.items() if bound is not None]
        if self.below is not None:
            parts.append(f"less than {self.below}")
        return " and ".join(parts)

    def allows(self, value: float) -> bool:
        """Whether a number is within the range."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def range_problems(self, name: str, value: Any) -> Iterator[str]:
        """A sentence where a value, or an item of a list, is out of range; null and `auto` are in every range."""
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(self.allows(number) for number in numbers if number not in (None, "auto")):
            because = f" ({self.because})" if self.because else ""
            yield f"{name}: {show_value(value)} must be {self.range_text}{because}"


def key(
    default: T,
    *,
    resume: Resume | When,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    because: str = "",
    needs: str | tuple[str, ...] = (),
    tasks: str = "",
    changes: str = "",
    path: bool = False,
    machine: bool = False,
) -> T:
    """A field of the schema; the text under it is its documentation.

    Args:
        resume: what a resume does with another value, one of `RESUME`, or `when(...)`.
        at_least, above, at_most, below: bounds of the value, or of every item of a list.
        because: what the error of a value out of range adds in parentheses.
        needs: conditions without which the key has no effect, each as `Condition.parse` reads it: another value than
            the default is then an error.
        tasks: the tasks that read it, separated by spaces; empty for all.
        changes: names of `CHANGES`, separated by spaces.
        path: a path, or an address: a first `~` is the home folder, and `token=x` in it no secret.
        machine: the processes of a run may differ in it.
    """
    known = Known(
        resume=resume,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        because=because,
        needs=build_needs(needs, tasks),
        changes=tuple(changes.split()),
        path=path,
        machine=machine,
    )
    assert set(known.changes) <= set(CHANGES), changes
    assert set(known.classes) <= set(get_args(Resume)), resume
    made: T = dataclasses.field(default=default, metadata={"key": known})
    return made


def section(kind: type[T], *, needs: str | tuple[str, ...] = (), tasks: str = "") -> T:
    """A field that holds a section; what it needs holds for all of its keys."""
    made: T = dataclasses.field(default_factory=kind, metadata={"needs": build_needs(needs, tasks)})
    return made


def build_needs(needs: str | tuple[str, ...], tasks: str) -> tuple[Condition, ...]:
    """The conditions of a key, its tasks first."""
    texts = (needs,) if isinstance(needs, str) else needs
    of_tasks = (f"task={'|'.join(tasks.split())}",) if tasks else ()
    return tuple(Condition.parse(text) for text in (*of_tasks, *texts))


def show_value(value: Any) -> str:
    """A value as it would be written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    return str(value)
