"""Runs exported folders through transformers alone, in its own process: `python -P probe.py JOB.json`.

It imports nothing of this package, so a folder that needed it would fail here. The job is a list of folders with their
inputs; for each, tensors go to `outputs.safetensors` and everything else to `outputs.json` in its working folder.
`neobert.export.verify` compares them with our model.
"""

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    FillMaskPipeline,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)

ONNX = ("onnx", "onnxruntime", "onnxscript")


def main(job_file: str) -> None:
    for item in json.loads(Path(job_file).read_text()):
        work = Path(item["work"])
        tensors, facts = probe(item, load_file(work / "inputs.safetensors"), work)
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, work / "outputs.safetensors")
        (work / "outputs.json").write_text(json.dumps(facts))


@torch.inference_mode()
def probe(item: dict[str, Any], inputs: dict[str, Tensor], work: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All outputs of one folder. `item["class"]` is what comes after `AutoModelFor`."""
    folder, options = item["folder"], {"trust_remote_code": True} if item["trust"] else {}
    model, loading = load(getattr(transformers, f"AutoModelFor{item['class']}"), folder, options)
    base, base_loading = load(AutoModel, folder, options)
    loadings = {"model": loading, "base": base_loading}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    tensors = {f"layer.{number}": state for number, state in enumerate(output.hidden_states)}
    tensors["logits.padded, int mask"] = output.logits
    tensors["base"] = base(input_ids=ids, attention_mask=mask).last_hidden_state
    if item["class"] == "MaskedLM":
        tensors |= run_new_heads(folder, options, inputs, loadings)
    # A class for texts takes a row for one text.
    packed = item["trust"] and item["class"] != "SequenceClassification"
    for name, arguments in forms(inputs, packed=packed, left=item["left"]).items():
        tensors[f"logits.{name}"] = model(**arguments).logits
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    encoded = [tokenizer(text).input_ids for text in item["texts"]]
    batch = tokenizer(item["texts"], item["seconds"], padding=True, truncation=True, return_tensors="pt")
    tensors["text.mask"], tensors["text.logits"] = batch["attention_mask"], model(**batch).logits
    with torch.inference_mode(False), torch.no_grad():
        answers = PIPELINES[item["class"]](model, tokenizer, item)
    facts = {
        "loading": loadings,
        "id2label": {str(number): label for number, label in model.config.id2label.items()},
        "dtype": str(next(model.parameters()).dtype),
        "encoded": encoded,
        "decoded": [tokenizer.decode(x[1:-1]) for x in encoded],
        "not_accepted": sorted(set(batch) - set(inspect.signature(model.forward).parameters)),
        "max_length": tokenizer.model_max_length,
        "answers": answers,
        "sentences": "not installed",
        "onnx": "not installed",
    }
    if importlib.util.find_spec("sentence_transformers") is not None:
        vectors = encode_sentences(folder, item["texts"], options)
        tensors |= {f"sentences.{number}": vector for number, vector in enumerate(vectors)}
        facts["sentences"] = "run"
    if item["trust"]:
        facts["onnx"] = "not for remote code: its attention loops over documents"
    elif not item["onnx"]:
        facts["onnx"] = "the folder has its own file"
    elif all(importlib.util.find_spec(name) is not None for name in ONNX):
        tensors["logits.ONNX"], tensors["text.ONNX"] = run_onnx(model, [inputs, batch], work / "model.onnx")
        facts["onnx"] = "run"
    return tensors, facts


def run_new_heads(
    folder: str, options: dict[str, Any], inputs: dict[str, Tensor], loadings: dict[str, Any]
) -> dict[str, Tensor]:
    """Outputs of the classes with heads that the folder has no weights for, of a padded and of a single text."""
    classifier, loadings["classifier"] = load(AutoModelForSequenceClassification, folder, options)
    tagger, loadings["tagger"] = load(AutoModelForTokenClassification, folder, options)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    short, length = len(mask) - 1, int(mask[-1].sum())
    return {
        "classifier.padded": classifier(input_ids=ids, attention_mask=mask).logits,
        "classifier.single": classifier(input_ids=ids[short:, :length]).logits,
        "tagger.padded": tagger(input_ids=ids, attention_mask=mask).logits,
        "tagger.single": tagger(input_ids=ids[short:, :length]).logits,
    }


def fill(model: Any, tokenizer: Any, item: dict[str, Any]) -> list[Any]:
    """Token and probability of the best tokens for a mask."""
    guesses = FillMaskPipeline(model=model, tokenizer=tokenizer, top_k=5)(item["fill"])  # type: ignore[arg-type]
    return [[guess["token"], guess["score"]] for guess in guesses]


def classify(model: Any, tokenizer: Any, item: dict[str, Any]) -> list[Any]:
    """For each text, or pair, the probability of every label."""
    pipeline = TextClassificationPipeline(model=model, tokenizer=tokenizer)
    seconds = item["seconds"] or [None] * len(item["texts"])
    pairs = [{"text": text, "text_pair": second} for text, second in zip(item["texts"], seconds)]
    found = [pipeline(pair, top_k=None, truncation=True) for pair in pairs]
    return [{answer["label"]: answer["score"] for answer in answers} for answers in found]


def tag(model: Any, tokenizer: Any, item: dict[str, Any]) -> list[Any]:
    """For each text the index, label and probability of every token."""
    pipeline = TokenClassificationPipeline(model=model, tokenizer=tokenizer, ignore_labels=[])
    found = [pipeline(text) for text in item["texts"]]
    return [[[token["index"], token["entity"], float(token["score"])] for token in tokens] for tokens in found]


PIPELINES = {"MaskedLM": fill, "SequenceClassification": classify, "TokenClassification": tag}
"""Class of a model -> what its pipeline answers."""


def load(auto: Any, folder: str, options: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """The model in fp32, and the tensors that its class missed or did not expect."""
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), {name: sorted(map(str, info[name])) for name in names}


def forms(inputs: dict[str, Tensor], *, packed: bool, left: bool) -> dict[str, dict[str, Tensor]]:
    """Ways of passing the same documents: name to arguments. The first document fills its row."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = ids[:1]
    lengths = mask.sum(1).tolist()
    result = {
        "single, no mask": {"input_ids": first},
        "single, mask of ones": {"input_ids": first, "attention_mask": torch.ones_like(first)},
        "padded, bool mask": {"input_ids": ids, "attention_mask": mask.bool()},
    }
    if left:
        rolled, rolled_mask = (
            torch.stack([torch.roll(row, len(row) - n) for row, n in zip(x, lengths)]) for x in (ids, mask)
        )
        result["padded on the left"] = {"input_ids": rolled, "attention_mask": rolled_mask}
    if packed:
        row = torch.cat([row[:n] for row, n in zip(ids, lengths)])
        numbers = torch.repeat_interleave(torch.arange(1, len(ids) + 1), torch.tensor(lengths))
        result["packed"] = {"input_ids": row[None], "segment_ids": numbers[None]}
    return result


def encode_sentences(folder: str, texts: list[str], options: dict[str, Any]) -> list[Tensor]:
    """Embeddings of sentence-transformers, computed in fp32: by default it computes in the dtype that is stored.

    One vector a text, or `[tokens, H]` of a model that keeps the vectors of all tokens.
    """
    with torch.inference_mode(False):
        encoder = load_sentence_encoder(folder, options)
        return [torch.as_tensor(vectors).clone() for vectors in encoder.encode(texts)]


def load_sentence_encoder(folder: str, options: dict[str, Any]) -> Any:
    """The encoder of sentence-transformers that a folder is for, in fp32 on the CPU."""
    import sentence_transformers

    file = Path(folder) / "config_sentence_transformers.json"
    several = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == "MultiVectorEncoder"
    kind = sentence_transformers.MultiVectorEncoder if several else sentence_transformers.SentenceTransformer
    return kind(folder, device="cpu", model_kwargs={"dtype": torch.float32}, **options)


def run_onnx(model: Any, batches: list[Any], path: Path) -> list[Tensor]:
    """Logits of onnxruntime for padded batches, from a graph that was traced with a part of the first."""
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    ids, mask = batches[0]["input_ids"], batches[0]["attention_mask"]
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with torch.inference_mode(False), torch.no_grad():
        example = (ids[:2].clone(), mask[:2].clone())
        torch.onnx.export(
            Logits(),
            example,
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [item.name for item in session.get_inputs()]
    results = [session.run(["logits"], {name: batch[name].numpy() for name in inputs})[0] for batch in batches]
    return [torch.from_numpy(logits) for logits in results]


if __name__ == "__main__":
    main(sys.argv[1])
