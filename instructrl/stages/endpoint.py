"""Asks an OpenAI-compatible endpoint, retries what may pass, and keeps every reply on the disk.

The address and the key are `OPENAI_BASE_URL` and `OPENAI_API_KEY` of the environment, as OpenAI's own client has them.
The key is in no file and no message. Needs `instructrl[judge]`.
"""

import email.utils
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from instructrl.config import EndpointCalls
from instructrl.errors import StageFailed, UserError

URL, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
PASSING = frozenset({408, 409, 425, 429})  # and all of 500 and above
LONGEST_WAIT = 120.0  # seconds between two tries


class Reply(NamedTuple):
    """What came back: `choice` is `choices[0]` of the chat completion."""

    choice: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False
    """It was on the disk."""


class Passing(Exception):
    """A failure that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


def check() -> None:
    """Raises UserError: the environment lacks the address, or Python lacks httpx."""
    address = os.environ.get(URL, "")
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"eval.judge=endpoint needs the environment variable {URL}, such as http://localhost:8000/v1 "
            f"(and {KEY} where the server wants a key)"
        )
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("eval.judge=endpoint needs httpx: pip install 'instructrl[judge]'") from None


class Cache:
    """Replies on the disk, by what was asked. A kill loses none that was stored; several processes may share it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.guard = threading.Lock()
        self.database = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        self.database.execute("CREATE TABLE IF NOT EXISTS replies (asked TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def get(self, asked: str) -> Reply | None:
        with self.guard:
            found = self.database.execute("SELECT reply FROM replies WHERE asked = ?", (asked,)).fetchone()
        return Reply(*json.loads(found[0])[:3], cached=True) if found else None

    def put(self, asked: str, reply: Reply) -> None:
        with self.guard:
            self.database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (asked, json.dumps(reply[:3])))

    def close(self) -> None:
        self.database.close()


class Endpoint:
    """A chat-completions endpoint. Use it in a `with` block.

    Args:
        cache: a SQLite file; it is made if it is not there.
        settings: `runtime.endpoint`.
    """

    def __init__(self, cache: Path, settings: EndpointCalls) -> None:
        import httpx

        self.settings, self.cache = settings, Cache(cache)
        self.url = os.environ[URL].rstrip("/")
        self.key = os.environ.get(KEY, "")
        self.retried = 0
        self.failed: StageFailed | None = None  # in one thread: the others stop, too
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=settings.at_once)
        self.client = httpx.Client(headers=headers, timeout=settings.timeout, limits=limits)
        self.failures: tuple[type[Exception], ...] = (httpx.TransportError, httpx.DecodingError)

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.cache.close()

    def ask(self, bodies: Sequence[dict[str, Any]]) -> Iterator[Reply]:
        """The replies, in order. At most `at_once` are asked for at a time; each is kept as soon as it is there.

        Raises:
            StageFailed: the endpoint refuses, or still fails after `retries`.
        """
        threads = ThreadPoolExecutor(self.settings.at_once)
        try:
            yield from threads.map(self.kept, bodies)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def kept(self, body: dict[str, Any]) -> Reply:
        """The reply to one body, from the disk if it is there."""
        asked = sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        reply = self.cache.get(asked)
        if not reply:
            try:
                reply = self.tried(body)
            except StageFailed as problem:
                self.failed = problem
                raise
            self.cache.put(asked, reply)
        return reply

    def tried(self, body: dict[str, Any]) -> Reply:
        """The reply to one body, asked for until it comes."""
        tries = 0
        while not self.failed:
            try:
                return self.post(body)
            except Passing as problem:
                if tries == self.settings.retries:
                    raise StageFailed(
                        f"the judge's endpoint still fails after {tries} retries: {problem}. The replies so far are "
                        "kept; the same command goes on from them"
                    ) from None
                time.sleep(self.wait(tries, problem.wait))
            tries += 1
            with self.cache.guard:
                self.retried += 1
        raise self.failed

    def wait(self, tries: int, asked: float | None) -> float:
        """Seconds before the next try: what the server asks for, else twice as long each time, less up to a half."""
        own = self.settings.backoff * 2**tries * random.uniform(0.5, 1)
        return min(LONGEST_WAIT, own if asked is None else max(own, asked))

    def post(self, body: dict[str, Any]) -> Reply:
        """Ask once."""
        try:
            response = self.client.post(f"{self.url}/chat/completions", json=body)
        except self.failures as problem:
            raise Passing(f"{type(problem).__name__} {self.safe(str(problem))}".strip()) from None
        if response.status_code in PASSING or response.status_code >= 500:
            raise Passing(f"HTTP {response.status_code}", retry_after(response.headers.get("Retry-After", "")))
        if response.status_code != 200:
            said = self.safe(" ".join(response.text.split()))
            raise StageFailed(f"the judge's endpoint answers HTTP {response.status_code}: {said or 'nothing'}")
        try:
            found = json.loads(response.text)
            choice, usage = found["choices"][0], found.get("usage") or {}
            content = choice["message"].get("content")
            if content is not None and not isinstance(content, str):
                raise TypeError("content is no text")
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Passing("its reply is no chat completion") from None
        return Reply(choice, *counts)

    def safe(self, text: str) -> str:
        """A server's words, short and without the key."""
        shown = text.replace(self.key, "[key]") if self.key else text
        return shown[:300]


def retry_after(value: str) -> float | None:
    """Seconds, from a number or a date (RFC 9110, 10.2.3); None where there is neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
