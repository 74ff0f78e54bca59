"""What tests of the data order have in common: every kind of source, and what several ranks read together."""

import json
from dataclasses import replace

import numpy as np
import torch

from neobert.config.schema_data import MixtureSource
from neobert.data.rows.loader import merge_states
from neobert.types import IGNORE_INDEX

KINDS = (
    "indexed",
    "text_indexed",
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "text",
    "csv",
    "parquet",
    "hub",
    "mixture",
)


def dataset_values(kind, corpora):
    """Fields of `dataset` that read the corpus as this kind."""
    if kind == "hub":  # A folder of files replaces a name: it is read by the lane for hub data.
        return {"path": None, "name": str(corpora["jsonl.gz"])}
    if kind == "mixture":
        halves = (corpora["jsonl"] / "part-0.jsonl", corpora["half"])
        return {"path": None, "mixture": tuple(MixtureSource(path=str(path)) for path in halves)}
    return {"path": str(corpora[kind])}


PACKINGS = {
    "packed": {},
    "unpacked": {"pack_sequences": False},
    "not_full": {"enforce_full_packed_batches": False},
}


def rows_of(step):
    """Every row of a step by its key: tokens, borders, masks."""
    rows = {}
    for batch in step.micro_batches:
        width = batch.input_ids.shape[1]
        labels = torch.full((batch.input_ids.numel(),), IGNORE_INDEX)
        kept = batch.targets != IGNORE_INDEX
        labels[batch.masked_index[kept]] = batch.targets[kept]
        for n, key in enumerate(batch.row_keys.tolist()):
            parts = (batch.input_ids[n], batch.segments.ids[n], labels.view(-1, width)[n])
            rows[key] = b"".join(part.numpy().astype(np.int64).tobytes() for part in parts)
    return rows


def read_world(make_data, config, world, num_workers, state, num_steps):
    """What `world` ranks read together: (rows, digest, merged state) of each step."""
    config = replace(config, dataset=replace(config.dataset, num_workers=num_workers, prefetch_factor=2))
    loaders = [make_data(config, rank=rank, world=world).loader(state) for rank in range(world)]
    found = []
    for _ in range(num_steps):
        steps = [next(loader) for loader in loaders]
        rows = {key: row for step in steps for key, row in rows_of(step).items()}
        state = json.loads(json.dumps(merge_states([step.state for step in steps])))
        found.append((rows, sum(step.digest for step in steps) % 2**64, state))
    for loader in loaders:
        loader.close()
    return found
