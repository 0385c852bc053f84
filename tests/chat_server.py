"""A real server on 127.0.0.1 that speaks the chat-completions protocol, and fails where a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[str, str, str], str | dict | bytes | int | float | None]
"""(prompt, first answer, second answer) -> what to reply: text, a message, bytes for the whole body, a status, seconds
to keep silent; None: the connection is cut."""


class ChatServer(ThreadingHTTPServer):
    """Counts what it was asked. `failures` are replied first, one a request; nothing is replied before as many as
    `together` have waited at once."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.failures, self.together = answer, [], 1
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.headers: dict[str, str] = {}
        self.guard = threading.Lock()
        self.at_once = self.most_at_once = self.failed = 0
        self.met, self.stopped = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        """Cut connections are meant."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            server.asked.append(body)
            server.keys.append(self.headers["Authorization"])
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            reply = server.failures.pop(0) if server.failures else server.answer(*parts(body))
            server.failed += isinstance(reply, int)
            if server.at_once >= server.together:
                server.met.set()
        if not server.met.wait(30):  # they never meet: the test that waits for it fails, and not once a request
            server.met.set()
        try:
            self.reply(reply if self.path == "/v1/chat/completions" else 404)
        finally:
            with server.guard:
                server.at_once -= 1

    def reply(self, reply: str | dict | bytes | int | float | None) -> None:
        status = 200
        if reply is None:
            self.close_connection = True
            return
        if isinstance(reply, float):
            self.server.stopped.wait(reply)
            reply = "Verdict: A"
        if isinstance(reply, int):
            status, reply = reply, json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}}).encode()
        if isinstance(reply, str):
            reply = {"content": reply}
        if isinstance(reply, dict):
            finish = reply.pop("finish_reason", "stop")
            choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant"} | reply}
            usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
            reply = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
        self.send_response(status)
        for name, value in self.server.headers.items() if status != 200 else ():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        """Silent."""


def parts(body: dict) -> list[str]:
    """The prompt and both answers of a request."""
    asked = body["messages"][1]["content"]
    tag = asked.partition("<prompt_")[2].partition(">")[0]
    names = ("prompt", "answer_A", "answer_B")
    return [asked.partition(f"<{name}_{tag}>\n")[2].partition(f"\n</{name}_{tag}>")[0] for name in names]


@contextmanager
def serving(answer: Answer) -> Iterator[ChatServer]:
    """The server, in a thread."""
    server = ChatServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
