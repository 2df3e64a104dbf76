"""Owns a server that fails on purpose: by itself for the tests, or in front of a real server.

    python tests/faults.py --upstream=http://127.0.0.1:8000 --port=8001 --faults=429,500,cut

It answers chat completions, whole or as a stream as the request asks, and gives the first attempts
at each request the faults that its plan lists; the next attempt succeeds. It counts the replies
that it delivered whole.
"""

import argparse
import hashlib
import json
import signal
import socket
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    *("429", "429-date", "429-ms", "500", "503", "stall", "truncated", "cut", "html", "refuse"),
    *("drop", "empty", "error", "no-finish", "text", "unasked"),
)

Plan = Callable[[dict[str, Any]], Sequence[str]]
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def key(sent: dict[str, Any]) -> str:
    """What makes two requests the same: all of the body but whether it is a stream."""
    rest = {k: v for k, v in sent.items() if k not in ("stream", "stream_options")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]


def echo(sent: dict[str, Any]) -> dict[str, Any]:
    """A reply that follows from the request alone."""
    text = f"You said: {sent['messages'][-1]['content']} ({sent.get('seed')})"
    return {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


class Server(ThreadingHTTPServer):
    """`plan` gives the faults of a request's first attempts, `answer` the reply after them.

    `asked` and `delivered` count by `key`; `hold`, where set, keeps further replies waiting once so
    many were begun; faults pass.
    """

    daemon_threads = True

    def __init__(
        self,
        plan: Plan = lambda sent: (),
        answer: Answer = echo,
        port: int = 0,
        hold: int | None = None,
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.plan, self.answer, self.hold = plan, answer, hold
        self.asked: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.begun = self.running = self.most = 0
        self.lock, self.go = threading.Condition(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    """One request: its fault, or its reply."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, server = key(sent), self.server
        faults = list(server.plan(sent))
        with server.lock:
            attempt = server.asked[name]
            server.asked[name] += 1
            server.bodies.append(sent)
            server.headers.append({k.lower(): v for k, v in self.headers.items()})
            most = server.hold
            fault = faults[attempt] if attempt < len(faults) else None
            if most is not None and fault is None and not server.go.is_set():
                server.lock.wait_for(lambda: server.go.is_set() or server.begun < most)
                if self._gone():
                    self.close_connection = True
                    return
            server.begun += fault is None
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            made = None if fault in BEFORE else server.answer(sent)
            if self._give(fault, made, bool(sent.get("stream"))):
                with server.lock:
                    server.delivered[name] += 1
        finally:
            with server.lock:
                server.running -= 1
                server.lock.notify_all()

    def _gone(self) -> bool:
        """Whether the client closed the connection while it waited."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _give(self, fault: str | None, made: dict[str, Any] | None, stream: bool) -> bool:
        """Send it; whether it went out whole."""
        if fault in ("429", "429-date", "429-ms"):
            how = {
                "429": ("Retry-After", "0.3"),
                "429-date": ("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),
                "429-ms": ("retry-after-ms", "20"),
            }[fault]
            self._send(429, error("slow down", "rate_limit_exceeded"), headers=[how])
        elif fault in ("500", "503"):
            told = self.headers.get("Authorization", "")  # as careless servers do
            self._send(int(fault), error(f"out of order, {told}"))
        elif fault == "stall":
            self.server.go.wait(30)
            self.close_connection = True
        elif fault == "html":
            self._send(200, b"<html>Bad gateway</html>", "text/html")
        elif fault == "refuse":
            self._send(400, error("context is too long", "context_length_exceeded"))
        elif fault == "filtered":
            self._send(400, error("against the rules", "content_filter"))
        elif fault == "key":
            self._send(401, error(f"wrong key {self.headers.get('Authorization', '')}"))
        elif fault == "drop":
            self.close_connection = True
        elif fault == "empty":
            self._send(200, b"")
        elif fault == "error":
            self._send(200, error("overloaded"))
        else:
            assert made is not None
            return self._reply(fault, made, stream)
        return False

    def _reply(self, fault: str | None, made: dict[str, Any], stream: bool) -> bool:
        if fault == "unasked":  # a stream that nobody asked for, or the reverse; a whole reply
            stream = not stream
        if fault == "no-finish":
            made = json.loads(json.dumps(made))
            made["choices"][0]["finish_reason"] = None
        data, kind = json.dumps(made).encode(), "application/json"
        if stream:
            data, kind = events(made), "text/event-stream"
        if fault == "text":  # a whole reply under a wrong name
            kind = "text/plain"
        if fault == "truncated":  # its length says that this is all
            self._send(200, data[: len(data) // 2], kind)
            return False
        if fault == "cut":  # the connection ends in the middle
            self._send(200, data[: len(data) // 2], kind, length=len(data))
            self.close_connection = True
            return False
        self._send(200, data, kind)
        return fault != "no-finish"

    def _send(
        self,
        status: int,
        data: bytes,
        kind: str = "application/json",
        headers: Sequence[tuple[str, str]] = (),
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


# Faults for which no reply is made.
BEFORE = {
    *("429", "429-date", "429-ms", "500", "503", "stall", "html", "refuse", "filtered", "key"),
    *("drop", "empty", "error"),
}


def error(message: str, code: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "code": code, "type": "x"}}).encode()


def events(made: dict[str, Any]) -> bytes:
    """A reply as server-sent events, its text in pieces of seven characters."""
    chunks: list[dict[str, Any]] = []
    choice = made["choices"][0]
    text = choice["message"]["content"] or ""
    for start in range(0, len(text), 7):
        delta = {"content": text[start : start + 7]}
        chunks.append({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    last = {k: v for k, v in choice.items() if k not in ("message", "index")}
    chunks.append({"choices": [{"index": 0, "delta": {}, **last}]})
    if made.get("usage"):
        chunks.append({"choices": [], "usage": made["usage"]})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"]).encode()


def forward(upstream: str) -> Answer:
    """Replies of a real server, which is asked once for the same."""
    known: dict[str, dict[str, Any]] = {}

    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        if key(sent) not in known:
            known[key(sent)] = ask(sent)
        return known[key(sent)]

    def ask(sent: dict[str, Any]) -> dict[str, Any]:
        plain = {k: v for k, v in sent.items() if k not in ("stream", "stream_options")}
        request = urllib.request.Request(
            f"{upstream}/v1/chat/completions",
            json.dumps(plain | {"stream": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as found:
            return json.loads(found.read())

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--faults", default="429,500,truncated,cut,html,drop")
    args = parser.parse_args()
    faults = args.faults.split(",")

    def plan(sent: dict[str, Any]) -> list[str]:
        return [faults[int(key(sent), 16) % len(faults)]]  # one each, by content

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with Server(plan, forward(args.upstream), args.port) as server:
        print(server.url, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        twice = sum(n > 1 for n in server.delivered.values())
        print(
            f"{server.asked.total()} attempts at {len(server.asked)} requests, "
            f"{server.delivered.total()} replies delivered, {twice} requests more than once"
        )


if __name__ == "__main__":
    main()
