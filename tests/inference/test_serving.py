"""The server: what clients of OpenAI's API send and get, what is refused, and requests that are computed together."""

import base64
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import SCRIPTS, call
from children import fork, run_program, wait_until
from children import wait_for as wait_for_child
from ports import free_port

from neobert.errors import CallError
from neobert.inference import http_server
from neobert.inference.batcher import Batcher, Closed, Overloaded
from neobert.inference.http_server import ModelServer, serve
from neobert.inference.model import Model
from neobert.inference.service import ServeLimits, Service
from neobert.inference.text_encoder import OwnEncoder
from neobert.objectives.base import VectorSettings

TEXTS = ["the cat sees the mountain.", "a dog", "every river builds a red door."]
SMALL = ServeLimits(max_texts=4, max_tokens=60, max_guesses=50, max_body_bytes=2000)
PROMPTS = (("query", "the question: "),)


def build_encoder(model: Model, pooling: str = "mean") -> OwnEncoder:
    settings = VectorSettings(max_length=model.max_length, pooling=pooling, prompts=PROMPTS)
    return OwnEncoder(model=model, settings=settings)


@contextmanager
def serving(model: Model) -> Iterator[ModelServer]:
    """A server in a thread, which has ended afterwards."""
    with ModelServer("127.0.0.1", 0) as server:
        thread = threading.Thread(target=serve, args=(server, Service(build_encoder(model), "tiny", SMALL)))
        thread.start()
        while not hasattr(server, "service"):
            time.sleep(0.01)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(loaded: Model) -> Iterator[ModelServer]:
    with serving(loaded) as server:
        yield server


def ask(server: ModelServer, path: str, body: Any = None, *, method: str | None = None) -> tuple[int, Any]:
    """Status and JSON of the response; a body of bytes is sent as it is."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method or ("GET" if body is None else "POST"), path, content)
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/json"
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def embed(server: ModelServer, body: dict[str, Any]) -> np.ndarray:
    status, found = ask(server, "/v1/embeddings", body)
    assert status == 200, found
    assert [item["index"] for item in found["data"]] == list(range(len(found["data"])))
    return np.array([item["embedding"] for item in found["data"]], dtype=np.float32)


# ---- what is answered ----


def test_embeddings_of_texts(server: ModelServer, loaded: Model) -> None:
    status, found = ask(server, "/v1/embeddings", {"model": "tiny", "input": TEXTS, "user": "somebody"})
    assert (status, found["object"], found["model"]) == (200, "list", "tiny")
    assert [item["object"] for item in found["data"]] == ["embedding"] * 3
    vectors = np.array([item["embedding"] for item in found["data"]], dtype=np.float32)
    np.testing.assert_allclose(vectors, loaded.embed(TEXTS, normalize=True).numpy(), atol=1e-6)
    num_tokens = sum(map(len, loaded.encode(TEXTS).documents))
    assert found["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_one_text_tokens_and_base64_are_the_same(server: ModelServer, loaded: Model) -> None:
    (plain,) = embed(server, {"input": TEXTS[0]})
    tokens = loaded.tokenizer.encode_batch([TEXTS[0]])[0].tolist()
    whole = loaded.encode([TEXTS[0]]).documents[0].tolist()
    np.testing.assert_allclose(embed(server, {"input": tokens})[0], plain, atol=1e-6)
    np.testing.assert_allclose(embed(server, {"input": [tokens, whole]}), [plain, plain], atol=1e-6)
    _, found = ask(server, "/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64", "dimensions": 32})
    decoded = np.frombuffer(base64.b64decode(found["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(decoded, plain, atol=1e-6)
    assert np.linalg.norm(decoded) == pytest.approx(1, abs=1e-5)
    (short,) = embed(server, {"input": TEXTS[0], "dimensions": 8})
    np.testing.assert_allclose(short, plain[:8] / np.linalg.norm(plain[:8]), atol=1e-6)


def test_a_prompt_of_training_is_put_before_the_texts(server: ModelServer) -> None:
    named = embed(server, {"input": TEXTS[1], "prompt_name": "query"})
    np.testing.assert_allclose(named, embed(server, {"input": PROMPTS[0][1] + TEXTS[1]}), atol=1e-6)


def test_masks_are_filled(server: ModelServer, loaded: Model) -> None:
    text = "the [MASK] sees a [MASK]"
    status, found = ask(server, "/v1/fill-mask", {"input": text, "top_k": 2})
    (expected,) = loaded.fill_mask([text], top_k=2)
    (item,) = found["data"]
    assert (status, item["text"], item["index"]) == (200, text, 0)
    tokens = [[guess["token"] for guess in guesses] for guesses in item["masks"]]
    assert tokens == [[guess.token for guess in guesses] for guesses in expected.masks]
    assert item["masks"][0][0]["probability"] == pytest.approx(expected.masks[0][0].probability, rel=1e-4)
    assert found["usage"]["total_tokens"] > 0


def test_health_and_the_list_of_models(server: ModelServer) -> None:
    assert ask(server, "/health") == (200, {"status": "ok", "model": "tiny", "waiting": 0})
    _, models = ask(server, "/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_a_connection_is_used_again(server: ModelServer) -> None:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    for body, status in (({"input": "a dog"}, 200), ({"input": 5}, 400), ({"input": "a dog"}, 200)):
        connection.request("POST", "/v1/embeddings", json.dumps(body))
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (status, True)
        port = connection.sock.getsockname()[1]
    connection.request("GET", "/health")
    connection.getresponse().read()
    assert connection.sock.getsockname()[1] == port
    connection.close()


# ---- what is refused ----

LONG = "the cat sees the mountain and " * 30
EMBEDDINGS: list[tuple[Any, int, str | None, str]] = [
    ({"input": []}, 400, "input", "input: write a text, a list of texts, or token ids"),
    ({}, 400, "input", "input: write a text"),
    ({"input": ["a", ""]}, 400, "input", "input[1] is empty; leave it out"),
    ({"input": ["a", 3.5]}, 400, "input", "input[1]: write a text, or a list of token ids"),
    ({"input": [[1, True]]}, 400, "input", "input[0]: write a text, or a list of token ids"),
    ({"input": [[7, 100_000]]}, 400, "input", "input[0]: token ids of this model are 0 to 359"),
    ({"input": ["\ud800"]}, 400, "input", "input[0] has half of a surrogate pair"),
    ({"input": LONG}, 400, "input", "[CLS] and [SEP] included, and the model takes 40; shorten it, or start the"),
    ({"input": ["a"] * 5}, 413, "input", "input: 5 texts, and a request may have 4; send several"),
    ({"input": [[7] * 30] * 2}, 413, "input", "input: 64 tokens, and a request may have 60; send several"),
    ({"input": "a", "model": "gpt"}, 404, "model", "model: 'gpt' is not served here; write 'tiny'"),
    ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "'int8' is unknown; write float or base64"),
    ({"input": "a", "encoding_format": ["float"]}, 400, "encoding_format", "['float'] is unknown"),
    ({"input": "a", "dimensions": 33}, 400, "dimensions", "dimensions: 33; write a number from 1 to 32"),
    ({"input": "a", "dimensions": "8"}, 400, "dimensions", "dimensions: '8'; write a number from 1 to 32"),
    ({"input": "a", "prompt_name": "x"}, 400, "prompt_name", "prompt_name: 'x' is unknown; this model has query"),
    ({"input": "a", "temperature": 1}, 400, "temperature", "temperature: unknown field; known are model, input"),
    ([1], 400, None, "the body is JSON of a list; send one object"),
    (b"{", 400, None, "the body is no JSON"),
    (b"[" * 1900, 400, None, "the body is no JSON"),
    (b" " * 3000, 413, None, "the body has 3000 bytes, and a request may have 2000"),
    # More than sockets hold: the client still sends while it is refused.
    (b" " * 8_000_000, 413, None, "the body has 8000000 bytes, and a request may have 2000"),
]


@pytest.mark.parametrize(("body", "status", "param", "said"), EMBEDDINGS, ids=range(len(EMBEDDINGS)))
def test_a_wrong_request_for_embeddings(
    server: ModelServer, body: Any, status: int, param: str | None, said: str
) -> None:
    found, answer = ask(server, "/v1/embeddings", body)
    assert (found, answer["error"]["param"]) == (status, param), answer
    assert said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "method", "status", "said"),
    [
        ("/v1/fill-mask", {"input": "no mask"}, "POST", 400, "'no mask' has no mask; write [MASK]"),
        ("/v1/fill-mask", {"input": [[1, 2]]}, "POST", 400, "input: write a text with [MASK], or a list of them"),
        ("/v1/fill-mask", {"input": "a [MASK]", "top_k": 0}, "POST", 400, "top_k: 0 is outside the vocabulary"),
        ("/v1/fill-mask", {"input": "a [MASK]", "top_k": "5"}, "POST", 400, "top_k: '5'; write a number"),
        (
            "/v1/fill-mask",
            {"input": ["a [MASK] [MASK]", "[MASK]"], "top_k": 20},
            "POST",
            413,
            "20 tokens for each mask are 60",
        ),
        ("/v1/completions", {}, "POST", 404, "/v1/completions: there is no such path; known are /health"),
        ("/v1/embeddings", None, "GET", 405, "/v1/embeddings: GET is not answered; use POST"),
        ("/health", {}, "POST", 405, "/health: POST is not answered; use GET"),
        ("/health", None, "DELETE", 501, "Unsupported method ('DELETE')"),
    ],
)
def test_a_wrong_call(server: ModelServer, path: str, body: Any, method: str, status: int, said: str) -> None:
    found, answer = ask(server, path, body, method=method)
    assert (found, said in answer["error"]["message"]) == (status, True), answer


def test_a_client_may_ask_before_it_sends(server: ModelServer) -> None:
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"input": "a"}')
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_one_connection_too_many_is_closed(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_MOST_CONNECTIONS", 1)
    with serving(loaded) as server, socket.create_connection(server.server_address[:2], timeout=20) as first:
        first.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200 ")
        with socket.create_connection(server.server_address[:2], timeout=20) as second:
            assert second.recv(100) == b""


def test_a_request_is_answered_before_the_server_ends(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, closing, written = threading.Event(), threading.Event(), list[str]()
    answer, close = http_server._Handler._answer, Service.close

    def answer_late(handler: http_server._Handler, method: str) -> None:
        begun.set()
        assert closing.wait(20)
        time.sleep(0.2)
        answer(handler, method)
        written.append(method)

    def note_and_close(service: Service) -> None:
        closing.set()
        close(service)

    monkeypatch.setattr(http_server._Handler, "_answer", answer_late)
    monkeypatch.setattr(Service, "close", note_and_close)
    with serving(loaded) as server:
        client = threading.Thread(target=ask, args=(server, "/health"))
        client.start()
        assert begun.wait(20)
    assert written == ["GET"]
    client.join()


def test_a_body_without_its_length(server: ModelServer) -> None:
    with socket.create_connection(server.server_address[:2], timeout=60) as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, response.headers["Connection"]) == (411, "close")
        assert "Content-Length: missing" in json.loads(response.read())["error"]["message"]


def test_what_fails_by_our_fault_is_said_without_details(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(Service, "_embed", fail)
    status, answer = ask(server, "/v1/embeddings", {"input": "a"})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer["error"]["message"]


def test_long_texts_are_cut_where_that_is_asked_for(loaded: Model) -> None:
    service = Service(build_encoder(loaded), "tiny", ServeLimits(truncate=True))
    answer = service.embeddings({"input": LONG})
    service.close()
    assert answer["usage"]["total_tokens"] == loaded.max_length
    with pytest.raises(ValueError, match=r"--pooling: this model keeps the vectors of all tokens"):
        Service(build_encoder(loaded, "tokens"), "tiny", SMALL)
    with pytest.raises(ValueError, match="--max-waiting: 0; write a positive number"):
        ServeLimits(max_waiting=0)


# ---- together ----


class Gate:
    """Work that records its calls and waits in the first until it is opened."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[Any]]] = []
        self.started, self.open = threading.Event(), threading.Event()

    def __call__(self, kind: Any, items: Sequence[Any]) -> list[Any]:
        self.calls.append((kind, list(items)))
        self.started.set()
        assert self.open.wait(60)
        if "bad" in items:
            raise ValueError("bad")
        return [f"{kind}{item}" for item in items]


def wait_for(batcher: Batcher, num_waiting: int) -> None:
    while batcher.num_waiting < num_waiting:
        time.sleep(0.001)


def test_what_waits_is_computed_together() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_tokens=10, max_waiting=9)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(batcher.compute, "a", [0], 1)
        assert gate.started.wait(60)
        later = []
        for kind, item, num_tokens in (("a", 1, 4), ("b", 2, 1), ("a", 3, 5), ("a", 4, 5), ("a", 5, 1)):
            later.append(threads.submit(batcher.compute, kind, [item, -item], num_tokens))
            wait_for(batcher, len(later))
        gate.open.set()
        assert first.result(60) == ["a0"]
        assert [x.result(60) for x in later] == [[f"{k}{i}", f"{k}{-i}"] for k, i in zip("abaaa", (1, 2, 3, 4, 5))]
    assert gate.calls == [("a", [0]), ("a", [1, -1, 3, -3, 5, -5]), ("b", [2, -2]), ("a", [4, -4])]
    batcher.close()
    with pytest.raises(Closed):
        batcher.compute("a", [1], 1)


def test_a_request_that_fails_fails_alone_and_one_too_many_is_refused() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_tokens=10, max_waiting=3)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(batcher.compute, "a", [0], 1)
        assert gate.started.wait(60)
        later = []
        for item in ("good", "bad", "fine"):
            later.append(threads.submit(batcher.compute, "a", [item], 1))
            wait_for(batcher, len(later))
        with pytest.raises(Overloaded):
            batcher.compute("a", ["more"], 1)
        gate.open.set()
        assert (first.result(60), later[0].result(60), later[2].result(60)) == (["a0"], ["agood"], ["afine"])
        with pytest.raises(ValueError, match="bad"):
            later[1].result(60)
    batcher.close()


def test_requests_of_many_clients(server: ModelServer, loaded: Model) -> None:
    """Each gets its own vectors, whatever was computed with them."""
    texts = [f"{TEXTS[number % 3]} {'a dog ' * (number % 4)}" for number in range(24)]
    expected = loaded.embed(texts, normalize=True).numpy()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda text: embed(server, {"input": text})[0], texts))
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-6)


# ---- the command ----


def test_a_port_in_use_is_said_before_the_model_is_loaded(
    run_folder: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("neobert.inference.text_encoder.load_text_encoder", lambda *a, **k: pytest.fail("loaded"))
    port = server.server_address[1]
    assert call("serve.py", run_folder, "--port", port) == 2
    said = capsys.readouterr().err
    assert f"--port: cannot listen on 127.0.0.1 port {port} (Address already in use); choose another one" in said
    with pytest.raises(CallError, match="--port: 70000; write a number from 0"):
        ModelServer("127.0.0.1", 70_000)


def test_the_command_answers_until_ctrl_c(run_folder: Path, tmp_path: Path) -> None:
    port, log, errors = free_port(), tmp_path / "log.txt", tmp_path / "errors.txt"
    words = [str(SCRIPTS / "serve.py"), str(run_folder), "--port", str(port), "--name", "mine"]
    child = fork(lambda: run_program(words), log, errors=errors)
    try:
        wait_until(lambda: errors.exists() and "\n" in errors.read_text(), child, errors)
        first = errors.read_text().splitlines()[0]
        assert first == f"mine at http://127.0.0.1:{port}/v1: mean pooling, texts of up to 40 tokens; Ctrl-C stops it"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/embeddings", json.dumps({"input": "a dog", "model": "mine"}))
        assert connection.getresponse().status == 200
    finally:
        os.kill(child, signal.SIGINT)  # The connection is open still.
        code = wait_for_child(child)
    assert code == 0, errors.read_text()
    assert "Traceback" not in errors.read_text()
    connection.close()
