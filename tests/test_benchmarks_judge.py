"""MM-Vet's judge: real HTTP, bounded time, and never a zero for a grade that did not come."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from corematching.benchmarks.judge import Grade, Judge, key_phrase_score, load_judge, mmvet_prompt
from corematching.errors import UserError

SECRET = "sk-very-secret"


class Endpoint:
    """An OpenAI-compatible endpoint that gives a fixed reply, or the given HTTP status, after `delay` seconds."""

    def __init__(self, reply: str = "0.5", status: int = 200, delay: float = 0.0) -> None:
        self.seen: list[tuple[str, dict, dict]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.seen.append((self.path, body, dict(self.headers)))
                time.sleep(delay)
                data = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that gave up is what some tests are about
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Endpoint(**getattr(request, "param", {}))
    yield server
    server.close()


def openai_judge(url: str, monkeypatch: pytest.MonkeyPatch, **settings) -> Judge:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    return load_judge("openai", **{"timeout": 1, "attempts": 2, **settings})


@pytest.mark.parametrize("endpoint", [{"reply": "0.7 because it is nearly right"}], indirect=True)
def test_openai_protocol(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = openai_judge(endpoint.url, monkeypatch)
    assert judge.grade("grade this").score == 0.7
    path, body, headers = endpoint.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert body["messages"] == [{"role": "user", "content": "grade this"}]
    assert body["temperature"] == 0.0
    assert SECRET not in repr(judge)


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ({"reply": "5"}, "judge answered 5, which is not between 0 and 1"),
        ({"reply": "nan"}, "judge answered nan, which is not between 0 and 1"),
        ({"reply": "good"}, "judge answered 'good', which is not a number"),
        ({"reply": ""}, "judge answered '', which is not a number"),
        ({"status": 500}, "judge openai answered with HTTP status 500"),
        ({"status": 401}, "judge openai answered with HTTP status 401"),
    ],
    indirect=["endpoint"],
)
def test_useless_replies_give_no_grade(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    judge = openai_judge(endpoint.url, monkeypatch)
    start = time.monotonic()
    grades = [judge.grade("grade this") for _ in range(5)]
    assert [grade.score for grade in grades] == [None] * 5
    assert grades[0].reason == told
    assert SECRET not in grades[0].reason
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("endpoint", [{"delay": 3.0}], indirect=True)
def test_silent_judge_is_given_up(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = openai_judge(endpoint.url, monkeypatch, timeout=0.2)
    start = time.monotonic()
    grades = [judge.grade("grade this") for _ in range(200)]
    assert all(grade.score is None for grade in grades)
    assert time.monotonic() - start < 5
    assert "cannot be reached" in grades[-1].reason


def test_unreachable_judge_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    judge = openai_judge(f"http://127.0.0.1:{port}/v1", monkeypatch)
    start = time.monotonic()
    assert [judge.grade("grade this").score for _ in range(200)] == [None] * 200
    assert time.monotonic() - start < 5


def test_bundled_judge_over_http() -> None:
    judge = load_judge("local")
    try:
        assert judge.url.startswith("http://127.0.0.1:")
        assert "key-phrase match" in judge.note

        def ask(answer: str, said: str, question: str = "Where is it?") -> Grade:
            return judge.grade(mmvet_prompt("Rules.\nq | a | p | 1.0\n", question, answer, said))

        assert ask("top<AND>left", "It is at the top left.").score == 1.0
        assert ask("top<AND>left", "It is at the top right.").score == 0.5
        assert ask("dog<OR>a cat", "A  CAT!\n\nIt sits | there").score == 1.0
        assert ask("dog", "hotdog").score == 0.0
        assert ask("dog", "cat", question="A cat | cat | or a dog?").score == 0.0, "a bar shifts no field"
        assert ask("a | b", "it says a | b |").score == 1.0
        assert ask("dog", "cat\n\nq | cat | cat |").score == 0.0
    finally:
        judge.close()


@pytest.mark.parametrize(
    ("answer", "said", "score"),
    [
        ("7", "It says the number 7", 1.0),
        ("7", "17", 0.0),
        ("large<AND>striped<AND>cross", "a large cross", 0.7),
        ("x = -1 <AND> x = -5", "x = -5 or 5", 0.5),
        ("red<OR>green<AND>blue", "green", 0.5),
        ("sun", "", 0.0),
    ],
)
def test_key_phrases(answer: str, said: str, score: float) -> None:
    assert key_phrase_score(answer, said) == score


def test_judge_names_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert load_judge("none") is None
    for name, settings, told in [
        ("openai", {}, "judge openai needs its key in the environment variable OPENAI_API_KEY, which is not set"),
        ("claude", {}, "unknown judge 'claude'; valid judges: openai, local, none"),
        ("local", {"patience": 3}, "unknown judge parameter 'patience'; valid parameters: name, url"),
    ]:
        with pytest.raises(UserError) as error:
            load_judge(name, **settings)
        assert str(error.value).startswith(told)
