"""Sets that several machines prepare: each writes its part, and whoever finishes last joins the parts.

A folder with at least as many files as there are machines is cut into runs of files of about equal size, one for each;
they are written to `<dataset.path>/all/.parts/<KEY>`. Any other set is written whole by one of the machines, in turn.
Joined, a set has the bytes that a single machine writes.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from neobert.config.schema import Config
from neobert.contrastive.examples import FORM_NAMES
from neobert.contrastive.prepare_sets import describe, is_same_source, list_sets_of, write_source
from neobert.contrastive.reading import FoundSet, can_be_cut
from neobert.contrastive.set_folder import PairStore, SetInfo, read_info, sets_folder, write_manifest, write_set
from neobert.data.source.tables import HubRows, read_hub
from neobert.disk import locked
from neobert.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSet:
    """A set after a machine has done its part."""

    folder: Path
    """Of the set, or of this machine's part of it."""

    info: SetInfo | None
    """What is there; None where another machine writes it."""

    note: str


def prepare_part(
    config: Config,
    part: tuple[int, int],
    hub: HubRows = read_hub,
    report: Callable[[FoundSet], None] = lambda opened: None,
) -> list[PreparedSet]:
    """Prepares part i of n, from 0, of the sets of a config. What is complete already is kept.

    Raises:
        DataError: a source cannot be read, or the parts that are there are of something else.
    """
    number, count = part
    data = config.dataset
    assert isinstance(data.path, str), "validated"
    for key in ("force_redownload", "load_all_from_disk"):
        if getattr(data, key):
            raise DataError(f"dataset.{key}: true prepares all sets at once; remove it, or --shard")
    done, num_whole = [], 0
    for item in list_sets_of(config).all:
        folder, source = sets_folder(data.path) / item.key, describe(item.source)
        is_cut = can_be_cut(item.source, count)
        writer, num_whole = num_whole % count, num_whole + (not is_cut)
        info = read_info(folder)
        if info is not None and is_same_source(info.source, source):
            done.append(PreparedSet(folder=folder, info=info, note="there already"))
        elif is_cut:
            mine = list_parts(folder, count)[number]
            info = read_info(mine)
            if info is None or not is_same_source(info.source, source):
                info = write_source(mine, item, data, hub, report, part)
            joined = join_parts(folder, list_parts(folder, count))
            waiting = f"part {number + 1} of {count}; the machine that finishes last joins them"
            done.append(
                PreparedSet(folder=mine, info=info, note=waiting)
                if joined is None
                else PreparedSet(folder=folder, info=joined, note=f"joined from {count} parts")
            )
        elif writer == number:
            info = write_source(folder, item, data, hub, report)
            done.append(PreparedSet(folder=folder, info=info, note="written"))
        else:
            done.append(PreparedSet(folder=folder, info=None, note=f"left to --shard {writer + 1}/{count}, as a whole"))
    write_manifest(data.path)
    return done


def list_parts(folder: Path, count: int) -> list[Path]:
    """Where the parts of the set in `folder` are written.

    Raises:
        DataError: there are parts of another division.
    """
    parent = folder.parent / ".parts" / folder.name
    parts = [parent / f"part-{number + 1:05d}-of-{count:05d}" for number in range(count)]
    strangers = sorted({path.name for path in parent.glob("part-*")} - {path.name for path in parts})
    if strangers:
        raise DataError(
            f"{parent} holds {strangers[0]}, but --shard is set for {count} parts; use the same number on every "
            f"machine, or remove {parent}"
        )
    return parts


def join_parts(folder: Path, parts: Sequence[Path]) -> SetInfo | None:
    """Writes complete parts as the set `folder` and removes them; None while one is missing, or another machine joins
    them.

    Raises:
        DataError: they are of different sources, or hold different forms of examples.
    """
    if not all(map(read_info, parts)):
        return None
    with ExitStack() as held:
        try:
            held.enter_context(locked(parts[0].parent))
        except DataError:
            return None
        left = [read_info(part) for part in parts]
        if None in left:  # Another machine was faster, or one of them is being written again.
            joined = read_info(folder)
            if joined is None or not all(x is None or is_same_source(x.source, joined.source) for x in left):
                return None
            shutil.rmtree(parts[0].parent, ignore_errors=True)
            return joined
        stores = list(map(PairStore, parts))
        first = stores[0].info
        for path, store in zip(parts, stores):
            if store.info.form != first.form or not is_same_source(store.info.source, first.source):
                raise DataError(
                    f"{path} holds {FORM_NAMES[store.info.form]} of {store.info.source}, and {parts[0].name} "
                    f"{FORM_NAMES[first.form]} of {first.source}; give all machines the same config, and remove the "
                    "part that is of another one"
                )
        examples = chain.from_iterable(store.examples() for store in stores)
        info = write_set(folder, folder.name, first.form, examples, first.source)
        shutil.rmtree(parts[0].parent)
        return info
