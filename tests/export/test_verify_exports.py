"""Verification passes every variant and sees every kind of damage."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from variants import EXPORTS

import neobert
import neobert.export.verify as verify_module
from neobert.export.compare import layer_errors, random_documents
from neobert.export.forms import ExportError
from neobert.export.verify import Verdict, verify
from neobert.export.write import Exported

SCRIPT = Path(__file__).parents[2] / "scripts" / "export" / "verify.py"


@pytest.mark.parametrize("name", EXPORTS)
def test_every_variant_matches_the_run_it_was_made_from(name: str, verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[name]
    assert verdict.passed, verdict.describe()
    names = [check.name for check in verdict.checks]
    packed = ["logits, packed"] if EXPORTS[name][1] != "native" and not name.startswith("native") else []
    for expected in (
        "embeddings",
        "block 1",
        "last hidden state",
        "logits, single, no mask",
        "logits, padded, bool mask",
        "logits, padded on the left",
        "fill-mask pipeline",
        "tokenizer",
        "inputs of the tokenizer",
        "from text",
        *packed,
    ):
        assert expected in names
    assert max(check.max_error or 0.0 for check in verdict.checks) < 1e-4


@pytest.mark.parametrize("name", [name for name, (_, _, dtype) in EXPORTS.items() if dtype == "fp32"])
def test_a_folder_answers_like_its_run(name: str, exports: dict[str, Exported], runs: dict[str, Path]) -> None:
    texts = ["the old house", "a [MASK] by the river"]
    folder, run = (neobert.load(path) for path in (exports[name].folder, runs[EXPORTS[name][0]]))
    for ours, theirs in zip(run.hidden_states(texts), folder.hidden_states(texts), strict=True):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (model.fill_mask(texts[1:], top_k=3)[0].masks[0] for model in (run, folder))
    assert [guess.token for guess in ours] == [guess.token for guess in theirs]
    assert [guess.probability for guess in ours] == pytest.approx([guess.probability for guess in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("swapped", {"last hidden state", "logits", "fill-mask pipeline", "logits, single, no mask"}),
        ("epsilon", {"block 1", "last hidden state", "logits"}),
        ("template", {"tokenizer", "from text"}),
        ("types", {"inputs of the tokenizer"}),
        ("space", {"fill-mask pipeline"}),
    ],
)
def test_damage_is_seen_where_it_is(name: str, failed: set[str], verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[name]
    assert not verdict.passed
    seen = {check.name for check in verdict.checks if not check.passed}
    assert failed <= seen
    assert "embeddings" not in seen
    if name in ("template", "space", "types"):
        assert not {"logits", "last hidden state"} & seen


def test_errors_of_a_layer_are_the_largest_over_all_documents() -> None:
    ours = [[torch.zeros(2, 3), torch.ones(2, 3), 4 * torch.ones(2, 5)]] * 2
    theirs = [[x.clone() for x in states] for states in ours]
    theirs[1][2][1, 4] += 0.5
    embeddings, last, logits = layer_errors(ours, theirs)
    assert (embeddings.passed, last.passed, logits.passed) == (True, True, False)
    assert (logits.max_error, logits.relative_error) == (0.5, 0.125)
    theirs[0][1][0, 0] = float("nan")
    assert not layer_errors(ours, theirs)[1].passed
    with pytest.raises(ValueError, match="logits: the two models have different shapes"):
        layer_errors(ours, [[a, b, c[:, :4]] for a, b, c in theirs])


def test_random_documents_fit_the_model_and_differ_in_length() -> None:
    lengths = [len(document) for document in random_documents(1024, 50)]
    assert lengths == [128, 65, 26, 7, 1]
    assert max(max(document) for document in random_documents(5, 50)) < 50
    assert max(len(document) for document in random_documents(5, 50)) == 5


def test_a_folder_that_transformers_cannot_load_is_an_error_with_its_message(
    exports: dict[str, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        returncode, stderr = 1, "Traceback ...\nRuntimeError: it broke"

    monkeypatch.setattr(verify_module.subprocess, "run", lambda *a, **k: Broken())
    with pytest.raises(ExportError, match=r"could not run an exported folder:\n(.|\n)*it broke"):
        verify([(exports["native"].folder, None)])


def test_only_exported_folders_are_verified(runs: dict[str, Path], exports: dict[str, Exported]) -> None:
    with pytest.raises(ExportError, match=r"is no exported folder with a tokenizer; make one with neobert export"):
        verify([(runs["tied"], None)])
    with pytest.raises(ExportError, match="have different tensors; compare a folder with its own source"):
        verify([(exports["native"].folder, str(runs["gelu_layernorm"]))])


@pytest.mark.parametrize(("name", "code"), [("native", 0), ("swapped", 1)])
def test_the_script_exits_with_the_verdict(
    name: str,
    code: int,
    verdicts: dict[str, Verdict],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verify_module, "verify", lambda folders, kind, table: [verdicts[name]])
    monkeypatch.setattr(sys, "argv", ["verify.py", "some/folder", "--json"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_info.value.code == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is (code == 0)
    assert {check["name"] for check in printed["checks"]} >= {"logits", "tokenizer"}


def test_the_script_names_a_folder_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["verify.py", "/nowhere"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_info.value.code == 2
    assert "/nowhere is no folder" in capsys.readouterr().err
