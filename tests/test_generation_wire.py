"""Replies as servers send them, whole, cut at every byte, and in wrong shapes."""

import json
from typing import Any

import faults
import pytest

from saro_jax.generation import wire
from saro_jax.generation.requests import Request
from saro_jax.generation.wire import Fault, Reply
from saro_jax.records import Sampler

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def made(message: dict[str, Any], finish: Any = "stop", **choice: Any) -> dict[str, Any]:
    one = {"index": 0, "message": message, "finish_reason": finish, **choice}
    return {"choices": [one], "usage": USAGE}


def data(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("message", "finish", "choice", "expected"),
    [
        ({"content": "Yes."}, "stop", {}, Reply("Yes.", "eos", 7, 3)),
        ({"content": "Yes."}, "stop", {"stop_reason": "\n"}, Reply("Yes.", "stop", 7, 3)),
        ({"content": "Yes."}, "stop", {"stop_reason": 128009}, Reply("Yes.", "eos", 7, 3)),
        ({"content": "Yes"}, "length", {}, Reply("Yes", "length", 7, 3)),
        ({"content": ""}, "content_filter", {}, Reply("", "filter", 7, 3)),
        ({"content": None, "refusal": "No."}, "stop", {}, Reply("No.", "eos", 7, 3)),
        ({"content": [{"type": "text", "text": "a"}, {"text": "b"}]}, "stop", {}, "ab"),
        ({"content": "B", "reasoning_content": " A "}, "stop", {}, "<think>\nA\n</think>\n\nB"),
        ({"content": "\nB", "reasoning": "A"}, "stop", {}, "<think>\nA\n</think>\n\nB"),
        ({"content": "ß\u2028 data: x"}, "stop", {}, "ß\u2028 data: x"),
    ],
)
def test_replies(message, finish, choice, expected):
    if isinstance(expected, str):
        expected = Reply(expected, "eos", 7, 3)
    assert wire.read(data(made(message, finish, **choice))) == expected
    if "reasoning" not in str(message) and isinstance(message["content"], str):
        assert wire.read(faults.events(made(message, finish, **choice))) == expected


def test_streamed_reasoning_and_no_usage():
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "A, "}}]},
        {"choices": [{"delta": {"reasoning_content": "B"}}]},
        {"choices": [{"delta": {"content": "C"}}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
    ]
    lines = [f"event: message\ndata: {json.dumps(one)}\r\n\r\n" for one in chunks]
    reply = wire.read("".join(lines).encode())
    assert reply == Reply("<think>\nA, B\n</think>\n\nC", "length", None, None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_is_cut_anywhere_is_no_reply(stream: bool):
    one = made({"content": "An answer, ünd more."})
    whole = faults.events(one) if stream else data(one)
    expected = wire.read(whole)
    for end in range(len(whole)):
        try:
            found = wire.read(whole[:end])
        except Fault:
            continue
        # Only what comes after the reply may be missing: the end mark, or what it took.
        assert stream and (found.text, found.finish) == (expected.text, expected.finish)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", "no reply"),
        (b"<html>502</html>", "no reply"),
        (b'"text"', "no reply"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"choices": [', "cut off"),
        (data({"choices": []}), "malformed"),
        (data({"choices": "x"}), "malformed"),
        (data({"choices": [{"message": None, "finish_reason": "stop"}]}), "malformed"),
        (data(made({"content": 3})), "malformed"),
        (data(made({"content": "x"}, None)), "cut off"),
        (data(made({"content": "x"}, "tool_calls")), "malformed"),
        (data(made({"content": "x"}, logprobs={"content": [{"token": "x"}]})), "malformed"),
        (data({"error": {"message": "busy"}}), "error in reply"),
        (b'data: {"error": "busy"}\n\n', "error in reply"),
        (b"data: [DONE]\n\n", "cut off"),
        (b"data: [1]\n\n", "malformed"),
    ],
)
def test_what_is_no_reply(raw: bytes, kind: str):
    with pytest.raises(Fault) as fault:
        wire.read(raw)
    assert fault.value.kind == kind


def test_estimates_and_error_texts():
    request = Request("x", ({"role": "user", "content": "ä" * 9},), Sampler(max_new_tokens=5))
    body = wire.body("m", request, 0, {})
    assert wire.estimated_tokens(body) == (6 + 8, 5)
    assert wire.error_text({"error": {"message": "a\n b"}}) == "a b"
    assert wire.error_text("x" * 300) == "x" * 200
    assert wire.error_text({"detail": [1]}) == "{'detail': [1]}"
