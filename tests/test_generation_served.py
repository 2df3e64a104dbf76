"""A policy behind a server: what it forces on an answer, and servers that do not go on from it."""

from pathlib import Path
from typing import Any

import faults
import pairing
import pytest
import tiny
from faults import Server

from saro_jax.config import ModelConfig, ServerConfig
from saro_jax.generation import served
from saro_jax.generation.api import Api
from saro_jax.generation.requests import Request
from saro_jax.generation.served import Served
from saro_jax.records import Sampler

PREFIX = "<think>\nThe user asks about a lock here.\n\n"


def asked(count: int = 3, prefix: str = PREFIX) -> list[Request]:
    texts = [f"How do I open lock {i}?" for i in range(count)]
    return [
        Request(f"r{i}", ({"role": "user", "content": text},), Sampler(), prefix=prefix)
        for i, text in enumerate(texts)
    ]


def behind(server: Server, tmp_path: Path, tokenizer: Any = None, **given: Any) -> Served:
    settings = ServerConfig(cache=str(tmp_path / "replies.sqlite"), backoff=0.01, **given)
    return Served(Api(server.url, "tiny", settings), tokenizer)


def test_begun_answers_go_on_and_the_server_is_checked_once(tmp_path: Path):
    with Server(answer=pairing.answer) as server:
        for _ in range(2):
            policy = behind(server, tmp_path, tiny.tokenizer())
            found = {one.id: samples for one, samples in policy.generate(asked())}
            assert all(samples[0].text for samples in found.values()) and len(found) == 3
            assert not any("Decision" not in samples[0].text for samples in found.values())
            policy.close()
    assert server.delivered.total() == 3 + 2
    begun = [body for body in server.bodies if body.get("continue_final_message")]
    assert len(begun) == 4 and all(b["messages"][-1]["role"] == "assistant" for b in begun)


def test_without_a_prefix_nothing_is_checked_and_no_tokenizer_needed(tmp_path: Path):
    with Server(answer=pairing.answer) as server:
        policy = behind(server, tmp_path)
        assert len(list(policy.generate(asked(2, prefix="")))) == 2
        policy.close()
    assert server.delivered.total() == 2
    assert policy.count("a lock") is None and policy.prefill == ""


def ignoring(sent: dict[str, Any]) -> dict[str, Any]:
    """A server that takes the begun answer for a whole turn, and begins another."""
    made = pairing.answer(sent)
    made["usage"]["prompt_tokens"] += 4 * bool(sent.get("continue_final_message"))
    return made


def refusing(sent: dict[str, Any]) -> list[str]:
    return ["refuse"] if sent.get("continue_final_message") else []


@pytest.mark.parametrize(
    ("made", "tokenizer", "message"),
    [
        ({"answer": ignoring}, True, "tokens longer instead of"),
        ({"plan": refusing, "answer": pairing.answer}, True, "does not go on from text"),
        ({"answer": pairing.answer}, False, "need model.path"),
    ],
)
def test_a_server_that_does_not_go_on_is_refused(made, tokenizer, message, tmp_path: Path):
    with Server(**made) as server:
        policy = behind(server, tmp_path, tiny.tokenizer() if tokenizer else None)
        with pytest.raises(ValueError, match=message) as error:
            list(policy.generate(asked()))
        policy.close()
    assert server.url in str(error.value) and "\n" not in str(error.value)
    assert not any("lock" in str(body) for body in server.bodies)  # before anything is paid for


def test_a_thought_that_a_server_opens_again_is_opened_once(tmp_path: Path):
    def parsed(sent: dict[str, Any]) -> dict[str, Any]:
        made = pairing.answer(sent)
        made["choices"][0]["message"] = {"content": "Sure.", "reasoning_content": "It is theft."}
        return made

    with Server(answer=parsed) as server:
        policy = behind(server, tmp_path, tiny.tokenizer())
        ((_, (begun,)),) = policy.generate(asked(1))
        ((_, (plain,)),) = policy.generate(asked(1, prefix=""))
        policy.close()
    assert begun.text == "It is theft.\n</think>\n\nSure."
    assert plain.text == "<think>\n" + begun.text


def test_its_name_and_what_its_answers_depend_on(tmp_path: Path, monkeypatch):
    server = ServerConfig(cache=str(tmp_path / "replies.sqlite"))
    path = str(tiny.folder() / "model")
    url = "http://127.0.0.1:9/v1"
    first = served.opened(url, None, ModelConfig(path=path), server)
    moved = served.opened("http://localhost:8/v1", None, ModelConfig(path=path), server)
    other = served.opened(url, "policy", ModelConfig(path=path), server)
    bare = served.opened(url, "policy", ModelConfig(), server)
    assert first.name == path and first.sha == moved.sha != other.sha != bare.sha
    assert (other.name, bare.tokenizer_sha) == ("policy", None) and first.tokenizer_sha
    assert first.count("open the lock") == len(tiny.tokenizer().encode("open the lock"))
    for one in (first, moved, other, bare):
        one.close()


def test_the_fake_policy_behind_a_server_fails_as_any(tmp_path: Path):
    with Server(lambda sent: ["429-ms", "cut"], pairing.answer) as server:
        policy = behind(server, tmp_path, tiny.tokenizer())
        found = dict((one.id, samples) for one, samples in policy.generate(asked()))
        policy.close()
    assert len(found) == 3 and set(server.delivered.values()) == {1}
    assert set(map(faults.key, server.bodies)) == set(server.delivered)
