"""Many ranks over many files, simulated in one process."""

from pathlib import Path

from neobert.benchmark.simulated_ranks import DOCUMENTS, simulate


def test_ranks_read_every_row_once_and_every_document(tmp_path: Path) -> None:
    """24 ranks, one lane each; `simulate` raises where a row is read twice or not at all, or a document is missing."""
    found = simulate(tmp_path / "files", ranks=24, shards=240, say=lambda text: None)
    assert (found.lanes, found.documents) == (24, 240 * DOCUMENTS)
    assert found.rows == found.steps * 24
    assert found.state_bytes < 24 * 400, "a few hundred bytes a lane"
    assert found.sent_bytes < 240 * 300
    assert "24 ranks, 240 files" in found.describe()
