"""Owns the client of OpenAI-compatible servers: vLLM, SGLang, `transformers serve`, OpenAI.

Each sample is a request of its own. Its reply is on disk before it is used, under a key of all that
it depends on, so that a stopped run pays for nothing twice. The key of the server comes from the
environment, and is written nowhere.
"""

import asyncio
import email.utils
import json
import os
import queue
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saro_jax.config import ServerConfig
from saro_jax.generation import limits, wire
from saro_jax.generation.limits import Budget, Rate, Use
from saro_jax.generation.reply_cache import ReplyCache
from saro_jax.generation.requests import Request, Sample
from saro_jax.generation.wire import Fault, Reply
from saro_jax.models import hub
from saro_jax.records import content_id, sha256, to_json

LONGEST_PAUSE = 60.0  # seconds of backoff at most, where the server asks for no more
LONGEST_ASKED = 3600.0  # a server that asks for a longer pause will not answer today
TOLD = 10.0  # pauses from so many seconds on are told
LOCAL = re.compile(r"https?://(localhost|127\.|\[::1\]|0\.0\.0\.0)")
FILTERED = ("content_filter", "content_policy_violation")  # codes of a request that is not let in


class _Stop:
    """Whether the requests of a call to `replies` are to stop, and the error that made them."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.event.set()


class Api:
    """A Generator behind `url` (with its /v1); one-line ValueErrors for what can not go on.

    The reply of sample i follows from model, `settings.version`, messages, prefix, sampler and i,
    and from the url not at all: a server that moves is not asked again. Close it, or use `with`.
    """

    def __init__(self, url: str, model: str, settings: ServerConfig):
        self.url, self.name, self.settings = url.rstrip("/"), model, settings
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"server {url!r}: expected http://HOST/v1 or https://HOST/v1")
        self.extra = _extra(settings.extra)
        self.sha = content_id("api", model, settings.version, self.extra)
        self._key = os.environ.get(settings.key_env, "")
        if not self._key and not LOCAL.match(url):
            raise ValueError(
                f"server.key_env={settings.key_env}: the environment has no such variable, "
                f"which holds the key of {self.url}"
            )
        self.cache = ReplyCache(
            Path(settings.cache).expanduser()
            if settings.cache
            else hub.cache_folder() / "replies.sqlite"
        )
        self.budget = Budget(settings.max_requests, settings.max_tokens, settings.max_cost)
        self.failures: dict[str, str] = {}  # by request id: why it has no more samples
        self._requests = Rate(settings.requests_per_minute)
        self._tokens = Rate(settings.tokens_per_minute)
        self._count: Counter[str] = Counter()
        self._jitter = random.Random()  # which pause it was shows in no output
        self._asked: dict[str, asyncio.Task[Reply]] = {}
        self._told = 0.0
        self._free_at = 0.0  # a server that asks one request to wait means them all
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections and let the cache go."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None
        self.cache.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """Each request with its samples, in any order; at most `concurrency` run at a time.

        A request that the server refuses comes without samples, its reason in `failures`. An error
        and an interrupt are raised after the requests under way have ended and are kept.
        """
        for request, replies in self.replies(requests):
            yield request, [self._sample(reply) for reply in replies]

    def replies(
        self, requests: Iterable[Request], top_logprobs: int = 0
    ) -> Iterator[tuple[Request, list[Reply]]]:
        """As `generate`, with the log-probs of so many likeliest tokens in each place."""
        loop = self._start()
        stop = _Stop()
        todo = iter(requests)
        running: dict[Future[list[Reply]], Request] = {}
        done: queue.SimpleQueue[Future[list[Reply]]] = queue.SimpleQueue()
        try:
            while True:
                while len(running) < self.settings.concurrency:
                    request = next(todo, None)
                    if request is None:
                        break
                    work = self._all(request, top_logprobs, stop)
                    future = asyncio.run_coroutine_threadsafe(work, loop)
                    running[future] = request
                    future.add_done_callback(done.put)
                if not running:
                    return
                future = done.get()
                yield running.pop(future), future.result()
        except _Stopped:
            assert stop.error is not None
            raise stop.error from None
        except KeyboardInterrupt:
            if running:
                print(
                    f"{self.url}: waits for {len(running)} requests that are under way, and paid "
                    "for; Ctrl-C again drops them",
                    file=sys.stderr,
                )
            raise
        finally:  # after an error, an interrupt, or where nobody wants the rest
            stop.event.set()
            while running:
                future = done.get()
                running.pop(future, None)
                future.exception()

    def report(self) -> dict[str, Any]:
        """What it took: requests, cached replies, retries by reason, tokens, cost, failures."""
        retried = {name: n for name, n in sorted(self._count.items()) if name.startswith("retry: ")}
        return {
            "requests": self._count["requests"],
            "replies": self._count["replies"],
            "cached": self._count["cached"],
            "filtered": self._count["filtered"],
            "retries": {name.removeprefix("retry: "): n for name, n in retried.items()},
            "prompt_tokens": self._count["prompt_tokens"],
            "new_tokens": self._count["new_tokens"],
            "cost": round(self.budget.used.cost, 6),
            "failed": dict(sorted(self.failures.items())),
        }

    # ---- in the thread of the loop ---------------------------------------------------------------

    def _start(self) -> asyncio.AbstractEventLoop:
        """The loop, in a thread of its own: a notebook's own loop is in nobody's way."""
        if self._loop is None:
            import openai  # takes a second

            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
            self._slots = asyncio.Semaphore(self.settings.concurrency)
            self._client = openai.AsyncOpenAI(
                base_url=self.url,
                api_key=self._key or "none",
                max_retries=0,
                timeout=self.settings.timeout,
            )
        return self._loop

    async def _all(self, request: Request, top_logprobs: int, stop: _Stop) -> list[Reply]:
        extra = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        extra |= self.extra
        sent = [wire.body(self.name, request, i, extra) for i in range(request.n)]
        keys = [sha256(to_json([self.settings.version, i, one])) for i, one in enumerate(sent)]

        async def one(key: str, body: dict[str, Any]) -> Reply | _Refused:
            try:
                return await self._reply(key, body, stop)
            except _Refused as refused:
                return refused
            except _Stopped:
                raise
            except BaseException as error:
                stop.fail(error)
                raise

        work = [one(key, body) for key, body in zip(keys, sent, strict=True)]
        found = await asyncio.gather(*work, return_exceptions=True)
        if any(
            isinstance(made, BaseException) and not isinstance(made, _Refused) for made in found
        ):
            raise _Stopped()
        self.failures.pop(request.id, None)
        for made in found:
            if isinstance(made, _Refused):
                self.failures.setdefault(request.id, str(made))
        return [made for made in found if isinstance(made, Reply)]

    async def _reply(self, key: str, sent: dict[str, Any], stop: _Stop) -> Reply:
        """From the cache, from a request under way for the same, or from the server."""
        kept = self.cache.get(key)
        if kept is not None:
            self._count["cached"] += 1
            return self._counted(_revived(kept), sent)
        if key not in self._asked:
            task = asyncio.ensure_future(self._ask(key, sent, stop))
            self._asked[key] = task
            task.add_done_callback(lambda _: self._asked.pop(key))
        return await asyncio.shield(self._asked[key])

    async def _ask(self, key: str, sent: dict[str, Any], stop: _Stop) -> Reply:
        prompt, new = wire.estimated_tokens(sent)
        use = self._use(prompt, new)
        trouble: _Trouble | None = None
        for attempt in range(self.settings.attempts):
            if trouble is not None:
                self._count[f"retry: {trouble.kind}"] += 1
                await self._pause(self._backoff(attempt, trouble.pause), stop)
            async with self._slots:
                await self._turn(use, stop)
                try:
                    reply = wire.read(await self._send(key, sent))
                    return await self._keep(key, reply, sent)
                except _Filtered:
                    return await self._keep(key, Reply("", "filter", 0, 0), sent)
                except Fault as fault:
                    trouble = _Trouble(fault.kind, str(fault))
                except _Trouble as found:
                    trouble = found
                    if found.pause is not None:
                        self._free_at = max(self._free_at, time.monotonic() + found.pause)
                except ValueError as error:
                    stop.fail(error)  # before the slot is free for another to be sent in vain
                    raise
                finally:
                    self.budget.reserved -= use
        reason = f"{self.url}: {self._safe(str(trouble))}, {self.settings.attempts} times"
        if self.settings.give_up == "request":
            raise _Refused(reason)
        raise ValueError(f"{reason}; the same command continues")

    async def _keep(self, key: str, reply: Reply, sent: dict[str, Any]) -> Reply:
        """The reply, once it is on disk."""
        kept = await asyncio.to_thread(self.cache.put, key, asdict(reply))
        self._count["replies"] += 1
        return self._counted(_revived(kept), sent)

    async def _turn(self, use: Use, stop: _Stop) -> None:
        """Wait until pauses, rates and the budget let a request go, and count it."""
        while True:
            await self._pause(0.0, stop)
            delay = max(
                self._free_at - time.monotonic(),
                self._requests.wait(1),
                self._tokens.wait(use.tokens),
            )
            if delay > 0:
                await self._pause(delay, stop)
            elif self.budget.room(use):
                break
            elif (complaint := self.budget.complaint(use)) is not None:
                raise ValueError(complaint)
            else:  # what is under way may take less than was reserved for it
                await self._pause(0.05, stop)
        self._count["requests"] += 1
        self._requests.take(1)
        self._tokens.take(use.tokens)
        self.budget.reserved += use

    async def _send(self, key: str, sent: dict[str, Any]) -> bytes:
        """The body of the server's answer; raises _Trouble, _Filtered, _Refused or ValueError."""
        import openai

        fields = {name: value for name, value in sent.items() if name not in ("messages", "model")}
        if self.settings.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with asyncio.timeout(self.settings.timeout):
                answer = await self._client.chat.completions.with_raw_response.create(
                    messages=sent["messages"],
                    model=sent["model"],
                    extra_body=fields,
                    # Gateways that know it charge a repeated request once.
                    extra_headers={"Idempotency-Key": key},
                )
                return answer.http_response.content
        except (TimeoutError, openai.APITimeoutError):
            raise _Trouble("time-out", f"no reply in {self.settings.timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise _Trouble("connection", cause[:200] or type(error.__cause__).__name__) from None
        except openai.APIStatusError as error:
            raise self._status(error) from None

    def _status(self, error: Any) -> Exception:
        """What an answer with an error status means."""
        status, code = error.status_code, error.code
        about = error.body if error.body is not None else error.response.text
        text = self._safe(wire.error_text(about))
        if code in FILTERED or (status == 403 and "flagged" in text):
            return _Filtered()
        if code == "insufficient_quota" or status in (401, 402, 403, 404, 405):
            return ValueError(f"{self.url}: {status}: {text}")
        if status in (408, 409, 425, 429) or status >= 500:
            pause = _retry_after(error.response.headers)
            if pause is not None and pause > LONGEST_ASKED:
                return ValueError(f"{self.url}: {status}: asks for a pause of {pause:.0f} s")
            kind = "5xx" if status >= 500 else str(status)
            return _Trouble(kind, f"{status} {text}".strip(), pause)
        return _Refused(f"{status}: {text}")

    def _backoff(self, attempt: int, asked: float | None) -> float:
        """Seconds before an attempt: what the server asks for, else twice as long each time."""
        most = min(self.settings.backoff * 2 ** (attempt - 1), LONGEST_PAUSE)
        jitter = self._jitter.uniform(0.5, 1.0) * most
        return jitter if asked is None else asked + 0.1 * jitter

    async def _pause(self, seconds: float, stop: _Stop) -> None:
        """Sleep, but not on after the run was stopped."""
        until = time.monotonic() + seconds
        if seconds >= TOLD and until > self._told + 1:  # once for all that wait
            print(f"{self.url}: waits {seconds:.0f} s", file=sys.stderr)
            self._told = until
        while True:
            if stop.event.is_set():
                raise _Stopped()
            left = until - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, 0.2))

    # ---- what a reply took -----------------------------------------------------------------------

    def _counted(self, reply: Reply, sent: Mapping[str, Any]) -> Reply:
        """The reply with counts, estimated where the server told none, and the budget charged."""
        prompt, _ = wire.estimated_tokens(sent)
        new = len(reply.text.encode("utf-8", "surrogatepass")) // 3 + 1
        reply = Reply(
            reply.text,
            reply.finish,
            prompt if reply.prompt_tokens is None else reply.prompt_tokens,
            new if reply.new_tokens is None else reply.new_tokens,
            reply.tokens,
        )
        assert reply.prompt_tokens is not None and reply.new_tokens is not None
        self.budget.used += self._use(reply.prompt_tokens, reply.new_tokens)
        self._count["prompt_tokens"] += reply.prompt_tokens
        self._count["new_tokens"] += reply.new_tokens
        self._count["filtered"] += reply.finish == "filter"
        return reply

    def _use(self, prompt: int, new: int) -> Use:
        return Use(1, prompt + new, self._cost(prompt, new))

    def _cost(self, prompt: int, new: int) -> float:
        return limits.cost(prompt, new, self.settings.input_price, self.settings.output_price)

    def _sample(self, reply: Reply) -> Sample:
        logprobs = tuple(places[token] for token, places in reply.tokens) or None
        prompt, new = reply.prompt_tokens or 0, reply.new_tokens or 0
        return Sample(
            reply.text,
            reply.finish,
            prompt,
            new,
            logprobs=logprobs,
            cost=self._cost(prompt, new),
        )

    def _safe(self, text: str) -> str:
        """Without the key, which servers like to repeat."""
        return text.replace(self._key, "***") if self._key else text


class _Trouble(Exception):
    """What may pass: 429, 5xx, time-outs, connections, replies that are cut off."""

    def __init__(self, kind: str, detail: str, pause: float | None = None):
        super().__init__(detail)
        self.kind, self.pause = kind, pause


class _Refused(Exception):
    """The server will never answer this request: a context that is too long, say."""


class _Filtered(Exception):
    """The server's content filter does not let this request through."""


class _Stopped(Exception):
    """Another request's error, or an interrupt, ended the run."""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of Retry-After (a number or a date) or of OpenAI's retry-after-ms; None: not told."""
    if (given := headers.get("retry-after-ms")) is not None:
        return _seconds(given, 1e-3)
    given = headers.get("retry-after")
    if given is None:
        return None
    if (seconds := _seconds(given)) is not None:
        return seconds
    try:
        at = email.utils.parsedate_to_datetime(given)
    except ValueError:
        return None
    return max(at.timestamp() - time.time(), 0.0)


def _seconds(text: str, unit: float = 1.0) -> float | None:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", text)
    return float(found[1]) * unit if found else None


def _revived(kept: Mapping[str, Any]) -> Reply:
    tokens = tuple((token, dict(places)) for token, places in kept["tokens"])
    return Reply(**{**kept, "tokens": tokens})


def _extra(text: str | None) -> dict[str, Any]:
    try:
        extra = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"server.extra={text}: not JSON: {error.msg}") from None
    if not isinstance(extra, dict):
        raise ValueError(f"server.extra={text}: expected a JSON object")
    return extra
