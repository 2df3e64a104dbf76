"""Owns what an OpenAI-compatible server is sent and how its replies are read, whole or not at all.

The body of a reply decides how it is read, not its content type: servers and proxies name it
wrongly, and a reply that is there was paid for. What is cut off anywhere is a Fault.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from saro_jax.generation.requests import Request
from saro_jax.records import sha256

Finish = Literal["eos", "length", "stop", "filter"]
# vLLM, SGLang, OpenAI and transformers say stop and length; TGI has words of its own.
FINISHES: dict[str, Finish] = {
    "stop": "eos",
    "eos": "eos",
    "eos_token": "eos",
    "stop_sequence": "stop",
    "length": "length",
    "content_filter": "filter",
}


class Fault(Exception):
    """A reply that can not be used; `kind` is what the report counts it as."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class Reply:
    """One reply. Token counts are None where the server does not tell them.

    finish: as of a Sample. `tokens`: where log-probs were asked for, each token's text with the
    log-probs (nats) of the likeliest tokens in its place, its own among them.
    """

    text: str
    finish: Finish
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    tokens: tuple[tuple[str, dict[str, float]], ...] = ()


def body(model: str, request: Request, i: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent for sample i of a request; `extra` adds fields, and takes out those it nulls.

    Each sample is a request of its own with a seed of its own, so that it depends on nothing else.
    """
    sampler = request.sampler
    if sampler.think_tokens is not None:
        raise ValueError(f"{request.id}: think_tokens={sampler.think_tokens}: no server takes it")
    made: dict[str, Any] = {
        "model": model,
        "messages": [dict(one) for one in request.messages],
        "max_tokens": sampler.max_new_tokens,
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        # 31 bits, which every server takes.
        "seed": int(sha256(f"{sampler.seed}:{i}")[:8], 16) >> 1,
    }
    # Fields that OpenAI does not have go only where they say something.
    if sampler.top_k:
        made["top_k"] = sampler.top_k
    if sampler.min_p:
        made["min_p"] = sampler.min_p
    if sampler.stop:
        made["stop"] = list(sampler.stop)
    if request.prefix:  # vLLM's and SGLang's way to go on with a turn that has begun
        made["messages"].append({"role": "assistant", "content": request.prefix})
        made |= {"continue_final_message": True, "add_generation_prompt": False}
    made |= extra
    return {name: value for name, value in made.items() if value is not None}


def estimated_tokens(sent: Mapping[str, Any]) -> tuple[int, int]:
    """(prompt, new) tokens that a body may take, before a server has counted: 3 bytes a token."""
    texts = [str(one.get("content") or "") for one in sent["messages"]]
    prompt = sum(-(-len(text.encode("utf-8", "surrogatepass")) // 3) + 8 for text in texts)
    new = sent.get("max_tokens") or sent.get("max_completion_tokens") or 0
    return prompt, int(new)


def read(raw: bytes) -> Reply:
    """The reply in the body of an answer, JSON or a stream of events; Fault where it is cut off."""
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise Fault("not UTF-8") from None
    if text.startswith("{"):
        return _whole(_object(text))
    if text.startswith(("data:", "event:", "id:", "retry:", ":")):
        return _streamed(_events(text))
    raise Fault("no reply", repr(text[:60]))


def _whole(made: Mapping[str, Any]) -> Reply:
    choice = _choice(made)
    if choice is None:
        raise Fault("malformed", "no choices")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Fault("malformed", f"message {message!r}")
    text = _joined(_thought(message), _text(message))
    return _reply(choice, text, _tokens(choice), made.get("usage"))


def _streamed(events: Iterable[Mapping[str, Any]]) -> Reply:
    last: dict[str, Any] = {}
    usage: Any = None
    thoughts, texts = "", ""
    tokens: list[tuple[str, dict[str, float]]] = []
    for event in events:
        usage = event.get("usage") or usage
        choice = _choice(event)
        if choice is None:  # the chunk that only tells usage
            continue
        delta = choice.get("delta") or {}
        thoughts += _thought(delta)
        texts += _text(delta)
        tokens += _tokens(choice)
        last |= {k: v for k, v in choice.items() if v is not None}
    return _reply(last, _joined(thoughts, texts), tokens, usage)


def _reply(choice: Mapping[str, Any], text: str, tokens: Any, usage: Any) -> Reply:
    said = choice.get("finish_reason")
    if said is None:
        raise Fault("cut off", "no finish_reason")
    if said not in FINISHES:
        raise Fault("malformed", f"finish_reason {said!r}")
    finish = FINISHES[said]
    if finish == "eos" and isinstance(choice.get("stop_reason"), str):  # vLLM: a stop string
        finish = "stop"
    counts = usage if isinstance(usage, dict) else {}
    prompt, new = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(text, finish, prompt, new, tuple(tokens))


def _choice(made: Mapping[str, Any]) -> dict[str, Any] | None:
    if made.get("error"):
        raise Fault("error in reply", error_text(made))
    choices = made.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise Fault("malformed", f"choices {choices!r}"[:80])
    return choices[0]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):  # parts
        content = "".join(str(one.get("text") or "") for one in content if isinstance(one, dict))
    if not isinstance(content, str | None):
        raise Fault("malformed", f"content {content!r}"[:80])
    return content or message.get("refusal") or ""


def _thought(message: Mapping[str, Any]) -> str:
    """Reasoning that a server's own parser took out of the text."""
    found = message.get("reasoning_content") or message.get("reasoning") or ""
    return found if isinstance(found, str) else ""


def _joined(thought: str, text: str) -> str:
    return f"<think>\n{thought.strip()}\n</think>\n\n{text.lstrip()}" if thought.strip() else text


def _tokens(choice: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    listed = (choice.get("logprobs") or {}).get("content") or []
    try:
        return [
            (
                one["token"],
                {alt["token"]: float(alt["logprob"]) for alt in one.get("top_logprobs") or ()}
                | {one["token"]: float(one["logprob"])},
            )
            for one in listed
        ]
    except (KeyError, TypeError, ValueError):
        raise Fault("malformed", "logprobs") from None


def _events(text: str) -> Iterable[dict[str, Any]]:
    """The JSON of each event up to [DONE]; a cut one is a Fault."""
    for line in text.splitlines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield _object(data)


def _object(text: str) -> dict[str, Any]:
    try:
        made = json.loads(text)
    except json.JSONDecodeError:
        raise Fault("cut off", "JSON without its end") from None
    if not isinstance(made, dict):
        raise Fault("malformed", f"{type(made).__name__} instead of an object")
    return made


def error_text(made: Any) -> str:
    """The message of a server's error body, in one line of at most 200 characters."""
    error = made.get("error", made) if isinstance(made, dict) else made
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:200]
