"""Records from several places of a file: enough to say whether there is text in it, little enough for many files."""

from collections.abc import Callable
from contextlib import closing
from itertools import islice

from neobert.data.files import DataFile
from neobert.data.inventory import Sample
from neobert.data.text import Record, Shard

FIRST_RECORDS = 100
MORE_RECORDS = 25
"""At each of the later places."""

_FIRST_BYTES = 1 << 20
_MORE_BYTES = 1 << 16
_LATER_PLACES = 4


def sample_file(file: DataFile, open_range: Callable[[int, int | None], Shard], *, cuttable: bool) -> Sample:
    """Reads the first records, and some behind each of four later places where a file can be entered in its middle.

    Args:
        open_range: the records of a byte range of the file; None is its end.

    Raises:
        ShardFault: the file cannot be read.
    """
    sample = Sample()

    def add_range(begin: int, end: int | None, count: int, num_bytes: int) -> bool:
        """Adds the first records of a range; False where they are so large that another place would cost too much."""
        with closing(open_range(begin, end).read(None)) as records:
            for record in islice(records, count):
                _add(sample, record, file, begin)
                if record.cursor["offset"] > begin + num_bytes:
                    return False
        return True

    if add_range(0, None, FIRST_RECORDS, _FIRST_BYTES) and cuttable and not file.is_streamed:
        for number in range(1, _LATER_PLACES + 1):
            begin = (file.size - _MORE_BYTES) * number // _LATER_PLACES
            if begin > _MORE_BYTES and not add_range(begin, begin + _MORE_BYTES, MORE_RECORDS, 2 * _MORE_BYTES):
                break
    return sample


def _add(sample: Sample, record: Record, file: DataFile, begin: int) -> None:
    """Counts a record of a range that begins at byte `begin`."""
    sample.num_records += 1
    sample.num_usable += record.text is not None
    sample.num_bad += record.problem is not None
    if record.problem is not None and sample.problem is None:
        place, _, reason = record.problem.removeprefix(file.url).lstrip(":, ").partition(": ")
        # Lines before a later place were not counted.
        place = "in its middle" if begin else f"line {place}" if place.isdecimal() else place
        sample.problem = f"{place}: {reason}"
