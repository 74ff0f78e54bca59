"""What a model card claims: valid for the hub, and nothing that is not known."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from neobert.config.load import parse_config, save_config
from neobert.config.schema import Config
from neobert.export.card import check_language
from neobert.export.facts import RunFacts, datasets_on_hub, hub_model, load_run_facts, model_on_hub, name_sources
from neobert.export.forms import ExportError
from neobert.export.write import Exported, ExportRequest, export

Tiny = Callable[..., Config]


def facts_of(config: Config) -> RunFacts:
    return RunFacts(config=config, step=8, state={}, records=(), evaluation=None)


def test_the_front_matter_of_a_masked_language_model(
    exports: dict[str, Exported], runs: dict[str, Path], corpus: Path
) -> None:
    data = ModelCard.load(exports["native"].folder / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "fill-mask")
    assert data.tags == ["masked-lm", "encoder"]
    assert (data.language, data.license, data.datasets, data.base_model) == (None, None, None, None), "not known"
    lines = [json.loads(line) for line in (runs["tied"] / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert data.model_name == "native"
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("loss", last["loss"]),
        ("accuracy", last["accuracy"]),
    ]
    assert {(r.task_type, r.dataset_name) for r in data.eval_results} == {("fill-mask", corpus.name)}
    assert ModelCard.load(exports["learned"].folder / "README.md").data.tags[-1] == "custom_code"


def test_an_evaluation_of_an_earlier_step_is_no_result_of_this_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "8"
    folder.mkdir(parents=True)
    save_config(tiny(tmp_path / "run"), folder / "config.yaml")
    lines = [{"kind": "eval", "step": step, "loss": None, "accuracy": 0.5, "num_targets": 9} for step in (4, 12)]
    (tmp_path / "run" / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '[1]\n{"kind": "ev'
    )
    facts = load_run_facts(folder, 8)
    assert facts is not None
    assert facts.evaluation == lines[0]


def test_the_language_is_what_the_call_says(runs: dict[str, Path], tmp_path: Path) -> None:
    request = ExportRequest(source=str(runs["norms"]), output=tmp_path / "out", language=("no", "de"))
    done = export(request)
    card = ModelCard.load(done.folder / "README.md")
    assert card.data.language == ["no", "de"], "no is a word of YAML"
    text = (done.folder / "README.md").read_text()
    matter = "license: mit\nlanguage: de\nbase_model: acme/base\n"
    (done.folder / "README.md").write_text(f"---\n{matter}---\n\n# out\n\n## Training\n\nLong.\n\n## Use\n\nEasily.\n")
    again = ModelCard.load(
        export(ExportRequest(source=str(done.folder), output=tmp_path / "again")).folder / "README.md"
    )
    assert (again.data.license, again.data.language, again.data.base_model) == ("mit", "de", "acme/base"), "kept"
    assert "## Training\n\nLong.\n\n## Use" in again.text
    assert "license: yours" not in again.content
    for broken, said in (
        ("a: [", "its front matter is no YAML"),
        (f"a: {'[' * 2000}{']' * 2000}", "its front matter is no YAML .*nested more than"),
        ("- a", "its front matter is no mapping"),
    ):
        (done.folder / "README.md").write_text(text.replace("library_name: transformers", broken + "\nx: y"))
        if broken == "- a":
            (done.folder / "README.md").write_text("---\n- a\n---\n")
        with pytest.raises(ExportError, match=rf"README.md: {said}"):
            export(ExportRequest(source=str(done.folder), output=tmp_path / "third"))
    assert not check_language(("en", "deu", "code", "multilingual"))
    assert len(check_language(("EN", "english", "en de", ""))) == 4


def test_names_of_the_hub_are_no_folders(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny(Path("outputs/run"), "model.init_from=chandar-lab/NeoBERT@main")
    assert model_on_hub(facts_of(run)) == "chandar-lab/NeoBERT"
    for folder in ("outputs/base", "/data/base", "./outputs/base", "a/b/c"):
        assert model_on_hub(facts_of(tiny(Path("outputs/run"), f"model.init_from={folder}"))) is None
    (tmp_path / "acme").mkdir()
    assert (hub_model("acme/gone"), hub_model("other/model")) == (None, "other/model")
    hub = tiny(Path("out"), "dataset.path=null", "dataset.name=acme/wiki:500,python_stdlib", "dataset.num_lanes=null")
    assert datasets_on_hub(facts_of(hub)) == ["acme/wiki"]
    assert name_sources(facts_of(hub)) == ["acme/wiki", "python_stdlib"]
    signed = tiny(Path("out"), "dataset.path=https://host/data/text.jsonl?X-Amz-Signature=abc")
    assert name_sources(facts_of(signed)) == ["https://host/data/text.jsonl"]
    assert datasets_on_hub(facts_of(signed)) == []


@pytest.mark.parametrize(
    ("settings", "names", "datasets"),
    [
        (["dataset.name=[all-nli, acme/pairs]"], ["sentence-transformers/all-nli", "acme/pairs"], 2),
        (["dataset.name=/home/me/pairs.jsonl"], ["pairs.jsonl"], 0),
        (["dataset.name=data/pairs.jsonl"], ["data/pairs.jsonl"], 0),
        (["contrastive.sets=[{name: STS12}, {name: ./my}]"], ["mteb/sts12-sts", "my"], 1),
    ],
)
def test_the_sets_of_a_contrastive_run(settings: list[str], names: list[str], datasets: int, tmp_path: Path) -> None:
    more = ["task=contrastive", "contrastive.allow_random_weights=true", f"dataset.path={tmp_path}"]
    more += ["tokenizer.path=tokenizer", f"trainer.output_dir={tmp_path}/run", "trainer.max_steps=8"]
    facts = facts_of(parse_config("", [*more, *settings]))
    assert name_sources(facts) == names
    assert len(datasets_on_hub(facts)) == datasets
