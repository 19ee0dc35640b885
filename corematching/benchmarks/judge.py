"""MM-Vet's judge: any OpenAI-compatible endpoint, or the bundled one.

A judge that cannot be reached, or that answers something else than a number between 0 and 1, yields no grade. It never
yields 0, and it never takes longer than its time-outs allow: after two answers in a row that got no reply, the
judge is given up for the rest of the run.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from corematching.benchmarks.spec import CONF_DIR
from corematching.errors import UserError

JUDGES = ("openai", "local", "none")
_GIVE_UP_AFTER = 2  # answers in a row for which no reply came
#: What a request raises when no usable reply comes: transport, HTTP status, or a body of another shape.
_NO_REPLY = (OSError, ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True)
class Grade:
    """A grade between 0 and 1, or None with the reason why there is none."""

    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One answer to grade.

    Parameters
    ----------
    instructions
        lmms-eval's text with examples.
    question, answer, prediction
        Of the benchmark, and what the model said.
    """

    instructions: str
    question: str
    answer: str
    prediction: str

    def __str__(self) -> str:
        """The request as MM-Vet's authors word it, for judges that read."""
        answer = self.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return f"{self.instructions}\n{self.question} | {answer} | {self.prediction} |"

    def as_json(self) -> str:
        """The fields apart, for the bundled judge, which does not read: a bar in a text cannot shift them."""
        return json.dumps({"question": self.question, "answer": self.answer, "prediction": self.prediction})


@dataclass
class Judge:
    """A client for one judge.

    Parameters
    ----------
    name, model, note
        What results say about the judge.
    url
        Base address, up to and including ``/v1``.
    key
        Bearer token; sent, never shown.
    timeout
        Seconds per request.
    attempts
        Requests per answer.
    """

    name: str
    url: str
    model: str
    note: str
    timeout: float = 30.0
    attempts: int = 3
    key: str | None = field(default=None, repr=False)
    server: KeyPhraseServer | None = field(default=None, repr=False)
    _lost: int = field(default=0, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def grade(self, row: Row | str) -> Grade:
        """Ask for a grade of a row, or with a request in your own words; safe to call from several threads."""
        if self._lost >= _GIVE_UP_AFTER:
            return Grade(None, f"judge {self.name} cannot be reached")
        grade, replied = Grade(None, f"judge {self.name} was not asked"), False
        for attempt in range(self.attempts):
            try:
                reply = self._ask(row.as_json() if self.server and isinstance(row, Row) else str(row))
            except _NO_REPLY as error:
                grade = Grade(None, f"judge {self.name} {_failure(error)}")
                if attempt + 1 < self.attempts:
                    time.sleep(min(1.0, self.timeout / 10))
                continue
            self._count_lost(reset=True)
            grade, replied = _parse_grade(reply), True
            if grade.score is not None:
                return grade
        if not replied:
            self._count_lost()
        return grade

    def _count_lost(self, reset: bool = False) -> None:
        with self._lock:
            self._lost = 0 if reset else self._lost + 1

    def close(self) -> None:
        """Stop the bundled server, if this judge runs one."""
        if self.server is not None:
            self.server.close()

    def _ask(self, prompt: str) -> str:
        payload = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 128,
            "temperature": 0.0,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(payload).encode(), headers, method="POST"
        )
        # The bundled judge is on this machine: no proxy may come between.
        handlers = [urllib.request.ProxyHandler({})] if self.server is not None else []
        with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as reply:
            return json.loads(reply.read())["choices"][0]["message"]["content"]


def _failure(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"answered with HTTP status {error.code}"
    return f"cannot be reached ({type(error).__name__})"


def _parse_grade(reply: str) -> Grade:
    first = reply.split()[0] if reply.split() else ""
    try:
        score = float(first)
    except ValueError:
        return Grade(None, f"judge answered {reply[:40]!r}, which is not a number")
    if not 0.0 <= score <= 1.0:
        return Grade(None, f"judge answered {first}, which is not between 0 and 1")
    return Grade(score)


def load_judge(name: str | None, **settings: Any) -> Judge | None:
    """Build the judge of ``conf/judge/<name>.yaml``, with `settings` on top; None for ``"none"``.

    Raises
    ------
    UserError
        As `judge_values` does.
    """
    values = judge_values(name, **settings)
    if values is None:
        return None
    if values["url"] is None:
        values["server"] = KeyPhraseServer()
        values["url"] = values["server"].url
    return Judge(**values)


def judge_values(name: str | None, **settings: Any) -> dict[str, Any] | None:
    """What `Judge` is built from, with the key and the address that the environment gives; nothing is started.

    Raises
    ------
    UserError
        If the name or a setting is unknown, or the environment variable with the key is not set.
    """
    if name is None or name == "none":
        return None
    if name not in JUDGES:
        raise UserError(f"unknown judge {name!r}; valid judges: {', '.join(JUDGES)}")
    values = yaml.safe_load((CONF_DIR / "judge" / f"{name}.yaml").read_text(encoding="utf-8"))
    if unknown := sorted(set(settings) - set(values)):
        raise UserError(f"unknown judge parameter {unknown[0]!r}; valid parameters: {', '.join(values)}")
    values.update(settings)
    key_env, url_env = values.pop("key_env"), values.pop("url_env")
    key = os.environ.get(key_env) if key_env else None
    if key_env and not key:
        raise UserError(f"judge {name} needs its key in the environment variable {key_env}, which is not set")
    url = (os.environ.get(url_env) if url_env else None) or values["url"]
    return {**values, "url": url, "key": key, "note": values["note"].format(model=values["model"])}


def mmvet_prompt(instructions: str, question: str, answer: str, prediction: str) -> Row:
    """What MM-Vet's judge is asked: `instructions` (lmms-eval's text with examples), then the row to grade."""
    return Row(instructions, question, answer, prediction)


def key_phrase_score(answer: str, prediction: str) -> float:
    """Share of the reference's key phrases that the prediction contains.

    ``<AND>`` separates phrases that are all needed, ``<OR>`` alternatives (it binds less tightly). Case and punctuation
    are ignored; a phrase counts where its words occur in a row.
    """
    said = f" {_words(prediction)} "
    alternatives = [[_words(phrase) for phrase in part.split("<AND>")] for part in answer.split("<OR>")]
    shares = [sum(f" {phrase} " in said for phrase in phrases) / len(phrases) for phrases in alternatives]
    return round(max(shares), 1)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


class KeyPhraseServer:
    """The bundled judge: an HTTP server on 127.0.0.1 that speaks the chat-completions protocol."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _KeyPhraseHandler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True, name="key-phrase-judge").start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()


class _KeyPhraseHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # the name is http.server's
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            row = json.loads(request["messages"][-1]["content"])
            content = str(key_phrase_score(row["answer"], row["prediction"]))
        except (ValueError, LookupError, TypeError, AttributeError):
            self.send_error(400, "not a grading request")
            return
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        reply = {
            "id": "grade",
            "object": "chat.completion",
            "created": 0,
            "model": request.get("model", ""),
            "choices": [message],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: requests hold answers, not news."""
