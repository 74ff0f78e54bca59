"""The programs that exported files are for. Each function loads a file and returns a way of asking it about texts."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from neobert.export.forms import ExportError
from neobert.export.heads import choose_class, find_head
from neobert.export.llama_folder import LLAMA_FOLDER
from neobert.export.probe import load_sentence_encoder
from neobert.export.target_rows import Opened, Outputs, Reference

SPEED_TOKENS = 128
"""About how long the longest text is that the speed is measured on."""


def _options(folder: Path) -> dict[str, Any]:
    return {"trust_remote_code": True} if '"auto_map"' in (folder / "config.json").read_text() else {}


def _tokenize(tokenizer: Any, texts: Sequence[str], seconds: Sequence[str] | None) -> tuple[Any, list[list[int]]]:
    """A padded batch, and the ids of each text."""
    batch = tokenizer(
        list(texts),
        None if seconds is None else list(seconds),
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    return batch, [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]


def _unpad(values: Tensor, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of `[B, S, ...]` the slots of tokens; `[B, C]` has a row for each text."""
    if values.ndim == 2:
        return list(values)
    return [row[: len(tokens)] for row, tokens in zip(values, ids)]


def open_transformers(folder: Path, reference: Reference) -> Opened:
    options, head = _options(folder), find_head(reference.weights)
    kind = getattr(transformers, "AutoModel" if head is None else f"AutoModelFor{choose_class(head)}")
    model = kind.from_pretrained(str(folder), dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)

    @torch.inference_mode()
    def run(texts: Sequence[str], seconds: Sequence[str] | None) -> Outputs:
        batch, ids = _tokenize(tokenizer, texts, seconds)
        output = model(**batch)
        if head is None:
            return Outputs(ids, {"states": _unpad(output.last_hidden_state, ids)})
        return Outputs(ids, {"logits": _shape_logits(_unpad(output.logits, ids))})

    return Opened(f"transformers {transformers.__version__}", run)


def _shape_logits(logits: list[Tensor]) -> list[Tensor]:
    """As ours are: `[1, C]` for a text."""
    return [x[None] if x.ndim == 1 else x for x in logits]


def open_sentences(folder: Path, reference: Reference) -> Opened:
    encoder = load_sentence_encoder(str(folder), _options(folder))

    def run(texts: Sequence[str], seconds: Sequence[str] | None) -> Outputs:
        vectors = encoder.encode(list(texts), batch_size=len(texts))
        ids = encoder.tokenizer(list(texts), truncation=True, max_length=encoder.max_seq_length)["input_ids"]
        return Outputs(ids, {"vector": [torch.as_tensor(x).clone().cpu() for x in vectors]})

    return Opened(f"sentence-transformers {version('sentence-transformers')}", run)


def open_onnx(path: str) -> Callable[[Path, Reference], Opened]:
    def open_file(folder: Path, reference: Reference) -> Opened:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / path, options, providers=["CPUExecutionProvider"])
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        names = [output.name for output in session.get_outputs()]

        def run(texts: Sequence[str], seconds: Sequence[str] | None) -> Outputs:
            batch, ids = _tokenize(tokenizer, texts, seconds)
            inputs = {item.name: batch[item.name].numpy() for item in session.get_inputs()}
            found = {name: torch.from_numpy(x) for name, x in zip(names, session.run(names, inputs))}
            if "logits" in found:
                return Outputs(ids, {"logits": _shape_logits(_unpad(found["logits"], ids))})
            (vectors,) = (x for name, x in found.items() if name != "last_hidden_state")
            return Outputs(ids, {"vector": _unpad(vectors, ids)})

        return Opened(f"onnxruntime {onnxruntime.__version__}", run)

    return open_file


def open_llama_cpp(path: str) -> Callable[[Path, Reference], Opened]:
    def open_file(folder: Path, reference: Reference) -> Opened:
        import llama_cpp

        longest = reference.weights.config.max_position_embeddings
        threads = torch.get_num_threads()
        # Attention in both directions needs all tokens of a batch in one physical batch.
        tokens = max(longest, SPEED_TOKENS * 4)
        model = llama_cpp.Llama(
            str(folder / path),
            embedding=True,
            n_ctx=tokens,
            n_batch=tokens,
            n_ubatch=tokens,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        keeps_tokens = reference.sentences.pooling not in ("mean", "cls")

        def run(texts: Sequence[str], seconds: Sequence[str] | None) -> Outputs:
            ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
            # One text a call where tokens keep their vectors: of several, embed takes those of the later ones from the
            # wrong address (its `pos` counts tokens where it should count numbers).
            calls = [[text] for text in texts] if keeps_tokens else [list(texts)]
            found = [torch.tensor(x) for call in calls for x in model.embed(call, normalize=False)]
            return Outputs(ids, {"states" if keeps_tokens else "vector": found})

        return Opened(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", run)

    return open_file


def open_llama_model(folder: Path, reference: Reference) -> Opened:
    """The tensors in the class of the decoder, with a mask that hides nothing: what a server does with this config."""
    where = folder / LLAMA_FOLDER
    tokenizer = AutoTokenizer.from_pretrained(str(where))
    kind: Any = transformers.LlamaModel
    model, info = kind.from_pretrained(str(where), dtype=torch.float32, output_loading_info=True)
    odd = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]]))
    if odd:
        raise ExportError(f"{where}: LlamaModel finds tensors missing or left over: {', '.join(odd)}")

    @torch.inference_mode()
    def run(texts: Sequence[str], seconds: Sequence[str] | None) -> Outputs:
        ids = [tokenizer(text, truncation=True).input_ids for text in texts]
        states = []
        for tokens in ids:
            visible = torch.zeros(1, 1, len(tokens), len(tokens))
            output = model.eval()(input_ids=torch.tensor([tokens]), attention_mask=visible, use_cache=False)
            states.append(output.last_hidden_state[0])
        return Outputs(ids, {"states": states})

    return Opened(f"LlamaModel of transformers {transformers.__version__}, all tokens visible", run)
