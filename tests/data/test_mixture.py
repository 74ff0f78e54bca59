"""Sources are mixed in the proportions asked for, or read once each per epoch; the state continues exactly."""

import gzip
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from neobert.config.schema_data import MixtureSource
from neobert.data.rows import streams as mixture_module
from neobert.data.rows import streams as streams_module
from neobert.data.rows.lanes import DocumentBatch
from neobert.data.rows.streams import MixtureStream
from neobert.data.rows.training import choose_token_fractions
from neobert.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Counting:
    """A stream of documents numbered from 0; document d has `d + 1` tokens."""

    num_documents: int
    source: int
    size: int = 0
    most: int = 10_000
    """Documents of one take: as if they were large."""

    def start(self):
        return {"epoch": 0, "next": 0}

    def take(self, state, max_documents):
        documents = np.arange(state["next"], min(self.num_documents, state["next"] + min(self.most, max_documents)))
        end = state["next"] + len(documents)
        ended = end == self.num_documents
        return DocumentBatch(
            lengths=documents + 1,
            get=lambda item, start, length: 1000 * self.source + documents[item] + np.arange(start, start + length),
            documents=documents,
            sources=np.full(len(documents), self.source),
            starts=np.zeros(len(documents), dtype=np.int64),
            next_state={"epoch": state["epoch"] + 1, "next": 0} if ended else {**state, "next": end},
            ended=ended,
        )


def mix(*streams, weights=None, lane=0):
    labels = [f"source {n}" for n in range(len(streams))]
    return MixtureStream(streams=streams, weights=weights, labels=labels, seed=7, lane=lane)


def pairs(taken):
    return list(zip(taken.sources.tolist(), taken.documents.tolist()))


def test_slots_fall_to_sources_by_their_hashes(monkeypatch):
    monkeypatch.setattr(mixture_module, "uniforms", lambda keys: np.array([0.12, 0.80, 0.55, 0.91, 0.07])[: len(keys)])
    mixture = mix(Counting(num_documents=9, source=0), Counting(num_documents=9, source=1), weights=[3, 1])
    taken = mixture.take(mixture.start(), 5)
    assert pairs(taken) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert taken.lengths.tolist() == [1, 1, 2, 2, 3]
    assert taken.get(3, 0, 2).tolist() == [1001, 1002]
    assert taken.next_state["slot"] == 5
    assert [s["next"] for s in taken.next_state["sources"]] == [3, 2]


def test_weights_are_fractions_of_documents_and_short_sources_start_again():
    mixture = mix(Counting(num_documents=10_000, source=0), Counting(num_documents=7, source=1), weights=[0.8, 0.2])
    state, found = mixture.start(), []
    for _ in range(20):
        taken = mixture.take(state, 200)
        assert len(taken.lengths) == 200
        assert not taken.ended
        found += pairs(taken)
        state = json.loads(json.dumps(taken.next_state))
    counts = Counter(source for source, _ in found)
    assert counts[1] / len(found) == pytest.approx(0.2, abs=0.02)
    assert [d for s, d in found if s == 0] == list(range(counts[0]))
    assert [d for s, d in found if s == 1] == [n % 7 for n in range(counts[1])]


def test_lanes_and_epochs_draw_differently():
    streams = [Counting(num_documents=500, source=n) for n in range(2)]
    first, other = (mix(*streams, lane=lane).take(mix(*streams).start(), 50) for lane in (0, 1))
    assert first.sources.tolist() != other.sources.tolist()
    later = mix(*streams).take({**mix(*streams).start(), "epoch": 1}, 50)
    assert first.sources.tolist() != later.sources.tolist()


@pytest.mark.parametrize("most", [3, 10_000])
def test_without_weights_each_document_comes_once_an_epoch(most):
    sizes = [40, 5, 0, 90]
    streams = [Counting(num_documents=n, source=k, size=100 * n, most=most) for k, n in enumerate(sizes)]
    mixture = mix(*streams)
    state = mixture.start()
    for epoch in range(3):
        found, taken = [], None
        while taken is None or not taken.ended:
            assert state["epoch"] == epoch
            taken = mixture.take(state, 16)
            assert pairs(mixture.take(state, 16)) == pairs(taken)
            found += pairs(taken)
            state = json.loads(json.dumps(taken.next_state))
        assert sorted(found) == sorted((k, d) for k, n in enumerate(sizes) for d in range(n))
        firsts = [source for source, _ in found[:40]]
        assert firsts.count(3) > firsts.count(0) > 0, "sources alternate in proportion to their sizes"


def test_documents_that_did_not_fit_are_owed_to_the_next_window():
    mixture = mix(Counting(num_documents=100, source=0, most=4), Counting(num_documents=100, source=1), weights=[1, 1])
    first = mixture.take(mixture.start(), 30)
    owed = first.next_state["owed"][0]
    assert owed == 30 - 4 - Counter(first.sources.tolist())[1] > 0
    second = mixture.take(first.next_state, 0)
    assert pairs(second) == [(0, 4), (0, 5), (0, 6), (0, 7)]
    assert second.next_state["owed"][0] == owed - 4


def test_a_source_without_documents_is_an_error():
    mixture = mix(Counting(num_documents=5, source=0), Counting(num_documents=0, source=1), weights=[1, 1])
    with pytest.raises(DataError, match=r"dataset.mixture: source 1 has no usable documents in lane 0"):
        mixture.take(mixture.start(), 20)


def words_of(step):
    """Tokens of a step before they were corrupted, and its tokens by source."""
    tokens, by_source = Counter(), np.zeros(2, dtype=int)
    for batch in step.micro_batches:
        ids = batch.input_ids.flatten().clone()
        kept = batch.targets >= 0
        ids[batch.masked_index[kept]] = batch.targets[kept].int()
        tokens.update(ids[batch.segments.ids.flatten() > 0].tolist())
        by_source += batch.source_tokens
    return tokens, by_source


@pytest.fixture
def halves(tmp_path, texts):
    """The corpus as two sources: 100 documents as JSONL, 50 as gzipped JSONL."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines[:100]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[100:])
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")


def test_a_run_on_two_sources_reads_every_document_once(halves, texts, tokenizer, make_config, make_data):
    config = make_config(mixture=tuple(MixtureSource(path=path) for path in halves), eval_samples=20, num_lanes=2)
    data = make_data(config)
    assert "held out of training" in " ".join(data.notes)
    held_out = Counter()
    for batch in data.eval_batches():
        held_out += words_of(type("Step", (), {"micro_batches": [batch]}))[0]
    encoded = tokenizer.encode_batch(texts)
    specials = Counter(dict.fromkeys(tokenizer.special_ids, 10**6))
    first = Counter(t for d in [*range(10), *range(100, 110)] for t in encoded[d].tolist())
    assert held_out - specials == first, "ten documents of each source"
    loader, found, sources = data.loader(), Counter(), np.zeros(2, dtype=int)
    while True:
        step = next(loader)
        tokens, by_source = words_of(step)
        assert by_source.sum() == sum(tokens.values())
        found, sources = found + tokens, sources + by_source
        if all(lane["epoch"] >= 1 for lane in step.state["lanes"].values()):
            break
    assert set(found) - set(specials) == {t for d in [*range(10, 100), *range(110, 150)] for t in encoded[d].tolist()}
    assert (sources > 0).all()


def test_weights_caps_and_slices_of_a_mixture(halves, tokenizer, texts, make_config, make_data):
    sources = (
        MixtureSource(path=halves[0], weight=3, max_documents=8),
        MixtureSource(path=halves[1], weight=1, split="train[5:9]"),
    )
    data = make_data(make_config(mixture=sources, num_lanes=1))
    assert "documents are drawn 75.0% " in " ".join(data.notes)
    loader, found = data.loader(), Counter()
    for _ in range(20):
        found += words_of(next(loader))[0]
    encoded = tokenizer.encode_batch(texts)
    wanted = {t for d in [*range(8), *range(105, 109)] for t in encoded[d].tolist()}
    assert set(found) - set(tokenizer.special_ids) == wanted
    assert data.num_tokens is None, "weights decide how often a source is read"


def test_names_in_comma_form_are_one_corpus(halves, make_config, make_data):
    """Names are hub names; local folders replace them."""
    config = make_config(path=None, name="python_stdlib:7,python_stdlib:3", streaming=None)
    data = make_data(config)
    assert data.num_documents == 10
    assert data.train.labels == ("python_stdlib (0)", "python_stdlib (1)")


def test_large_documents_of_a_mixture_are_bounded_and_complete(
    halves, tokenizer, texts, make_config, make_data, monkeypatch
):
    monkeypatch.setattr(streams_module, "WINDOW_CHARS", 200)
    data = make_data(make_config(mixture=tuple(MixtureSource(path=path) for path in halves), num_lanes=1))
    lane = data.train.lane_opener()(0)
    state, found = lane.start(), Counter()
    while state["epoch"] == 0:
        window = lane.open(state)
        for piece in (piece for row in window.rows for piece in row):
            found.update(np.asarray(window.get(piece)).tolist())
        state = window.next_state
    assert found == Counter(t for tokens in tokenizer.encode_batch(texts) for t in tokens.tolist())


def test_fractions_of_tokens():
    assert choose_token_fractions([None, None], [900, 100], 1) == [0.9, 0.1]
    assert choose_token_fractions([None, None], [900, 100], 0) == [0.5, 0.5]
    assert choose_token_fractions([3, 1], [900, 100], 0) == [0.75, 0.25]
    assert choose_token_fractions([1, 2], [900, 100], 0.5) == pytest.approx([0.6, 0.4])


@pytest.mark.parametrize(("alpha", "fraction"), [(0.0, 0.5), (1.0, 0.8)])
def test_sources_are_mixed_by_tokens(alpha, fraction, tmp_path, make_config, make_data):
    """One source has eight times the documents, half as long each: four times the tokens."""
    for name, count, words in (("short", 640, 40), ("long", 80, 80)):
        lines = [json.dumps({"text": " ".join(f"w{n % 90}" for n in range(d, d + words))}) + "\n" for d in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    mixture = tuple(MixtureSource(path=str(tmp_path / f"{name}.jsonl")) for name in ("short", "long"))
    values = {"path": None, "mixture": mixture, "mixture_alpha": alpha, "eval_samples": None}
    with pytest.raises(DataError, match=r"mixture_alpha: needs the number of tokens.*streaming: false"):
        make_data(make_config(**values))
    data = make_data(make_config(**values, streaming=False))
    assert any(note.startswith("tokens are mixed ") for note in data.notes)
    lane = data.train.lane_opener()(0)
    state, tokens = lane.start(), Counter()
    for _ in range(12):
        window = lane.open(state)
        for piece in (piece for row in window.rows for piece in row):
            tokens[int(window.sources[piece.document])] += piece.length
        state = window.next_state
    assert tokens[0] / tokens.total() == pytest.approx(fraction, abs=0.06)
