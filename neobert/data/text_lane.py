"""The lane that reads text and tokenises it window by window.

A text longer than `max_document_chars` is cut at white space into consecutive documents; the lane's state then holds,
beside the cursor, how many characters of the next record are already used.
"""

from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from neobert.data.lanes import LaneSettings, State, Window, check_lane_gave_rows
from neobert.data.order import key
from neobert.data.packing import split_documents
from neobert.data.text import WINDOW_CHARS, Encode, Reader, Record, RecordCounts, cut_end


@dataclass(kw_only=True, slots=True)
class _Reading:
    """The texts of a window while they are read."""

    cursor: State
    char: int
    texts: list[str] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    num_chars: int = 0
    ended: bool = False

    def take(self, record: Record, text: str, settings: LaneSettings) -> bool:
        """Adds the parts of a record while there is room; whether it was used up."""
        while self.char < len(text) and not self.is_full(settings):
            end = cut_end(text, self.char, settings.max_document_chars)
            self.texts.append(text[self.char : end])
            self.documents.append(record.document)
            self.num_chars += end - self.char
            self.char = end
        if self.char < len(text):
            return False
        self.char = 0
        return True

    def is_full(self, settings: LaneSettings) -> bool:
        return len(self.texts) >= settings.window_documents or self.num_chars >= WINDOW_CHARS


class TextLane:
    """A reader's documents, tokenised and packed in windows of neighbouring documents."""

    def __init__(self, reader: Reader, encode: Encode, settings: LaneSettings, lane: int) -> None:
        self._reader, self._encode, self._settings, self._lane = reader, encode, settings, lane

    def start(self) -> State:
        counters = {"used": 0, "bad": 0, "bad_in_epoch": 0, "skipped": 0, "dropped": 0}
        return {"epoch": 0, "window": 0, "row": 0, "cursor": self._reader.start(), "char": 0, **counters}

    def open(self, state: State) -> Window:
        settings, epoch = self._settings, state["epoch"]
        # The same records are bad in every epoch: they are named once.
        counts = RecordCounts(
            max_bad=settings.max_bad_records,
            where=f"lane {self._lane} in an epoch",
            log=epoch == 0,
            bad=state["bad_in_epoch"],
        )
        reading = self._read(state, counts)
        tokens = self._encode(reading.texts) if reading.texts else []
        lengths = np.array([len(document) for document in tokens], dtype=np.int64)
        pieces, num_dropped = split_documents(
            lengths, settings.max_seq_length, settings.min_length, truncate=settings.truncate
        )
        next_state = {
            "epoch": epoch,
            "window": state["window"] + 1,
            "row": 0,
            "cursor": reading.cursor,
            "char": reading.char,
            "used": state["used"] + len(pieces),
            "bad": state["bad"] + counts.bad - state["bad_in_epoch"],
            "bad_in_epoch": counts.bad,
            "skipped": state["skipped"] + counts.skipped,
            "dropped": state["dropped"] + num_dropped,
        }
        if reading.ended:
            check_lane_gave_rows(self._lane, next_state["used"])
            next_state |= {"epoch": epoch + 1, "window": 0, "cursor": self._reader.start(), "used": 0}
            next_state |= {"bad_in_epoch": 0}
        return Window(
            rows=settings.plan(pieces, key(settings.seed, "rows", self._lane, epoch, state["window"])),
            get=lambda piece: tokens[piece.document][piece.start : piece.start + piece.length],
            documents=np.array(reading.documents, dtype=np.int64),
            next_state=next_state,
        )

    def _read(self, state: State, counts: RecordCounts) -> _Reading:
        reading = _Reading(cursor=state["cursor"], char=state["char"])
        with closing(self._reader.read(state["epoch"], reading.cursor)) as records:
            for record in records:
                if record.text is None:
                    counts.add(record)
                elif not reading.take(record, record.text, self._settings):
                    return reading
                reading.cursor = record.cursor
                if reading.is_full(self._settings):
                    return reading
        reading.ended = True
        return reading
