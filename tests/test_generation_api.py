"""The client against a server that fails on purpose: nothing lost, doubled or paid twice."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import Server

from saro_jax.config import ServerConfig
from saro_jax.generation.api import Api
from saro_jax.generation.requests import Request, Sample
from saro_jax.records import Sampler

KEY = "sk-do-not-tell-anyone"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


def settings(tmp_path: Path, **given: Any) -> ServerConfig:
    return ServerConfig(cache=str(tmp_path / "replies.sqlite"), backoff=0.01, **given)


def requests(count: int, n: int = 1, **sampler: Any) -> list[Request]:
    return [
        Request(f"r{i}", ({"role": "user", "content": f"Question {i}"},), Sampler(**sampler), n)
        for i in range(count)
    ]


def ask(url: str, asked: list[Request], given: ServerConfig) -> tuple[dict[str, list[Sample]], Api]:
    with Api(url, "tiny", given) as api:
        found = [(request.id, samples) for request, samples in api.generate(asked)]
    assert len({name for name, _ in found}) == len(found)
    return dict(sorted(found)), api


# ---- faults --------------------------------------------------------------------------------------


def test_each_sample_is_asked_for_once_with_a_seed_of_its_own(server: Server, tmp_path: Path):
    found, api = ask(server.url, requests(3, n=2), settings(tmp_path))
    assert [len(samples) for samples in found.values()] == [2, 2, 2]
    assert server.delivered.total() == len(server.delivered) == 6
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == 2 and all(0 <= seed < 2**31 for seed in seeds)
    first = found["r1"][0]
    assert first.text.startswith("You said: Question 1 (") and first.finish == "eos"
    assert (first.prompt_tokens, first.tokens) == (10, 5)
    body = server.bodies[0]
    assert body["model"] == "tiny" and body["max_tokens"] == 1024 and body["top_p"] == 0.95
    assert "stream" not in body and "top_k" not in body
    assert api.report()["requests"] == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [f for f in faults.FAULTS if f not in ("stall", "refuse")])
def test_a_fault_loses_and_doubles_nothing(fault: str, stream: bool, tmp_path: Path):
    clean, _ = ask_clean(tmp_path)
    with Server(plan=lambda sent: [fault] * (int(faults.key(sent), 16) % 2)) as server:
        found, api = ask(server.url, requests(8), settings(tmp_path / "x", stream=stream))
    assert found == clean
    assert set(server.delivered.values()) == {1} and len(server.delivered) == 8
    retried = server.asked.total() - 8
    # A whole reply under a wrong name, or as a stream that nobody asked for, is paid for: taken.
    assert (retried == 0) == (fault in ("text", "unasked"))
    report = api.report()
    assert report["requests"] == server.asked.total()
    assert sum(report["retries"].values()) == retried


def ask_clean(tmp_path: Path) -> tuple[dict[str, list[Sample]], Api]:
    with Server() as server:
        return ask(server.url, requests(8), settings(tmp_path / "clean"))


def test_many_faults_in_a_row_and_all_at_once(tmp_path: Path):
    clean, _ = ask_clean(tmp_path)
    kinds = ["429-ms", "500", "truncated", "cut", "html", "drop"]

    def plan(sent: dict[str, Any]) -> list[str]:
        start = int(faults.key(sent), 16) % len(kinds)
        return (kinds[start:] + kinds[:start])[: start + 1]

    with Server(plan=plan) as server:
        found, _ = ask(server.url, requests(8), settings(tmp_path, concurrency=3))
    assert found == clean and set(server.delivered.values()) == {1}


def test_a_reply_that_takes_too_long_is_asked_for_again(tmp_path: Path):
    with Server(plan=lambda sent: ["stall"]) as server:
        found, api = ask(server.url, requests(1), settings(tmp_path, timeout=0.3))
    assert len(found["r0"]) == 1 and api.report()["retries"] == {"time-out": 1}


def test_retry_after_is_waited_for_by_all(tmp_path: Path):
    with Server(plan=lambda sent: ["429"] * ("Question 0" in str(sent))) as server:
        start = time.monotonic()
        found, api = ask(server.url, requests(2), settings(tmp_path, concurrency=1))
        assert time.monotonic() - start >= 0.3
    assert len(found) == 2 and api.report()["retries"] == {"429": 1}


def test_attempts_run_out_and_the_same_command_goes_on(tmp_path: Path):
    broken = threading.Event()

    def plan(sent: dict[str, Any]) -> list[str]:
        return [] if broken.is_set() else ["500"] * 9 * ("Question 2" in str(sent))

    with Server(plan=plan) as server:
        given = settings(tmp_path, attempts=3, concurrency=2)
        with pytest.raises(ValueError) as error:
            ask(server.url, requests(6), given)
        assert str(error.value) == (
            f"{server.url}: 500 out of order, Bearer ***, 3 times; the same command continues"
        )
        broken.set()
        found, _ = ask(server.url, requests(6), given)
        assert len(found) == 6 and set(server.delivered.values()) == {1}


def test_give_up_on_one_request(tmp_path: Path):
    with Server(plan=lambda sent: ["500"] * 9 * ("Question 2" in str(sent))) as server:
        given = settings(tmp_path, attempts=2, give_up="request")
        found, api = ask(server.url, requests(4), given)
    assert [len(one) for one in found.values()] == [1, 1, 0, 1]
    assert list(api.failures) == ["r2"] and "500 out of order" in api.failures["r2"]


def test_a_request_that_is_refused_is_reported_and_not_sent_again(tmp_path: Path):
    with Server(plan=lambda sent: ["refuse"] * 9 * ("Question 1" in str(sent))) as server:
        found, api = ask(server.url, requests(3), settings(tmp_path))
        assert server.asked.total() == 3
    assert [len(one) for one in found.values()] == [1, 0, 1]
    assert api.report()["failed"] == {"r1": "400: context is too long"}


def test_what_a_filter_holds_back_is_no_answer(tmp_path: Path):
    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        made = faults.echo(sent)
        made["choices"][0]["finish_reason"] = "content_filter"
        return made

    plan = lambda sent: ["filtered"] * 9 * ("Question 1" in str(sent))  # noqa: E731
    with Server(plan=plan, answer=answer) as server:
        found, api = ask(server.url, requests(2), settings(tmp_path))
        assert [one[0].finish for one in found.values()] == ["filter", "filter"]
        assert api.report()["filtered"] == 2
        ask(server.url, requests(2), settings(tmp_path))
        assert server.asked.total() == 2  # kept as any reply is


def test_a_wrong_key_ends_the_run_and_is_told_nowhere(tmp_path: Path, capfd):
    with Server(plan=lambda sent: ["key"] * 9) as server:
        with pytest.raises(ValueError) as error:
            ask(server.url, requests(20), settings(tmp_path, concurrency=2))
        assert str(error.value) == f"{server.url}: 401: wrong key Bearer ***"
        assert server.asked.total() <= 2
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in "".join(capfd.readouterr())


def test_nothing_is_sent_after_an_error_that_ends_the_run(tmp_path: Path):
    with Server(plan=lambda sent: ["key"] * 9) as server:
        with pytest.raises(ValueError, match="401"):
            ask(server.url, requests(6, n=8), settings(tmp_path, concurrency=3))
        assert server.asked.total() <= 3


def test_the_key_is_in_no_file(tmp_path: Path):
    with Server(plan=lambda sent: ["500"]) as server:
        ask(server.url, requests(3), settings(tmp_path))
    assert list(tmp_path.iterdir())
    assert not [file for file in tmp_path.iterdir() if KEY.encode() in file.read_bytes()]


def test_nobody_listens(tmp_path: Path):
    with Server() as server:
        url = server.url
    with pytest.raises(ValueError, match=r"127.0.0.1:\d+/v1: .*, 2 times; the same command"):
        ask(url, requests(1), settings(tmp_path, attempts=2))


# ---- the cache -----------------------------------------------------------------------------------


def test_nothing_is_asked_twice(server: Server, tmp_path: Path):
    first, _ = ask(server.url, requests(4, n=2), settings(tmp_path))
    again, api = ask(server.url, requests(4, n=2), settings(tmp_path))
    assert again == first and server.asked.total() == 8
    assert api.report()["requests"] == 0 and api.report()["cached"] == 8
    more, _ = ask(server.url, requests(4, n=3), settings(tmp_path))
    assert server.asked.total() == 12
    assert {name: samples[:2] for name, samples in more.items()} == first
    same = [Request(f"s{i}", one.messages, one.sampler) for i, one in enumerate(requests(1) * 5)]
    ask(server.url, same, settings(tmp_path / "other"))
    assert server.asked.total() == 13  # five of the same at a time are one


@pytest.mark.parametrize("change", [{"version": "2"}, {"extra": '{"top_k": 5}'}])
def test_what_a_reply_depends_on_is_in_its_key(change: dict[str, str], server, tmp_path: Path):
    _, before = ask(server.url, requests(1), settings(tmp_path))
    _, after = ask(server.url, requests(1), settings(tmp_path, **change))
    assert server.asked.total() == 2 and before.sha != after.sha
    ask(server.url, requests(1, temperature=0.1), settings(tmp_path))
    ask(server.url, requests(1, seed=1), settings(tmp_path))
    assert server.asked.total() == 4


def test_another_place_is_not_another_model(server: Server, tmp_path: Path):
    first, _ = ask(server.url, requests(2), settings(tmp_path))
    with Server() as other:
        second, _ = ask(other.url, requests(2), settings(tmp_path, stream=True, concurrency=1))
        assert second == first and not other.asked


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_generation_api import requests, settings
from saro_jax.generation.api import Api
with Api(sys.argv[1], "tiny", settings(Path(sys.argv[2]), concurrency=4, stream=True)) as api:
    for request, samples in api.generate(requests(6, n=2)):
        print(request.id, [one.text for one in samples], flush=True)
"""


def replies(folder: Path) -> int:
    """How many replies the cache of `settings` holds."""
    with contextlib.closing(sqlite3.connect(folder / "replies.sqlite")) as db:
        return db.execute("SELECT count(*) FROM replies").fetchone()[0]


def test_kill_minus_nine_pays_for_nothing_twice(tmp_path: Path):
    here = str(Path(__file__).parent)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}

    def start(url: str) -> subprocess.Popen:
        arguments = [sys.executable, "-c", WORKER, url, str(tmp_path), here]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)

    def plan(sent: dict[str, Any]) -> list[str]:
        return [["truncated"], ["500"], []][int(faults.key(sent), 16) % 3]

    with Server(plan=plan, hold=9) as server:
        process = start(server.url)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        # A reply that is on its way when the client dies cannot but be asked for again.
        deadline = time.monotonic() + 60
        while replies(tmp_path) < 9 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        process.stdout.close()
        paid = server.delivered.total()
        assert paid == replies(tmp_path) == 9
        server.go.set()
        second = start(server.url)
        said, _ = second.communicate(timeout=120)
        assert second.returncode == 0
        assert set(server.delivered.values()) == {1} and server.delivered.total() == 12
    after = said.splitlines()
    assert len(after) == 6 and {line.strip() for line in lines} <= set(after)


# ---- limits --------------------------------------------------------------------------------------


def test_concurrency_bounds_what_runs(tmp_path: Path):
    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.02)
        return faults.echo(sent)

    for concurrency in (1, 3):
        with Server(answer=answer) as server:
            given = settings(tmp_path / str(concurrency), concurrency=concurrency)
            ask(server.url, requests(6, n=2), given)
            assert server.most == concurrency


def test_budgets_are_held_and_a_larger_one_continues(server: Server, tmp_path: Path):
    prices = {"input_price": 100.0, "output_price": 1000.0}  # a reply: 0.001 + 0.005
    asked = requests(8, max_new_tokens=5)
    limits = [{"max_requests": 3}, {"max_tokens": 100}, {"max_cost": 0.03, **prices}]
    for i, limit in enumerate(limits):
        for _ in range(2):  # what the cache holds counts: the budget is that of the work
            with pytest.raises(ValueError, match=rf"server\.{next(iter(limit))}=.*continues"):
                ask(server.url, asked, settings(tmp_path / str(i), **limit))
        assert server.delivered.total() == (3, 6, 4)[i]
        server.delivered.clear()
    found, api = ask(server.url, asked, settings(tmp_path / "2", max_cost=0.05, **prices))
    assert len(found) == 8 and server.delivered.total() == 4
    assert api.report()["cost"] == pytest.approx(0.048)
    assert sum(one[0].cost for one in found.values()) == pytest.approx(0.048)


def test_rates_are_kept(server: Server, tmp_path: Path):
    with Api(server.url, "tiny", settings(tmp_path, requests_per_minute=3)) as api:
        api._requests.period = 0.4
        start = time.monotonic()
        assert len(list(api.generate(requests(7)))) == 7
        assert time.monotonic() - start >= 0.8


def test_an_interrupt_keeps_what_runs(tmp_path: Path):
    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.2)
        return faults.echo(sent)

    with Server(answer=answer) as server:
        given = settings(tmp_path, concurrency=2)
        with Api(server.url, "tiny", given) as api:
            running: Any = api.generate(requests(10))
            next(running)
            running.close()  # as an error of the consumer does
        paid = server.delivered.total()
        assert 1 <= paid <= 4
        found, _ = ask(server.url, requests(10), given)
        assert len(found) == 10 and set(server.delivered.values()) == {1}


# ---- what is sent --------------------------------------------------------------------------------


def test_extra_fields_and_prefix(server: Server, tmp_path: Path):
    extra = '{"max_tokens": null, "max_completion_tokens": 9}'
    sampler = Sampler(top_k=4, min_p=0.5, stop=("END",))
    begun = [Request("p", ({"role": "user", "content": "Go"},), sampler, prefix="<think>")]
    ask(server.url, begun, settings(tmp_path, extra=extra, stream=True))
    (body,) = server.bodies
    assert body["max_completion_tokens"] == 9 and "max_tokens" not in body and body["top_k"] == 4
    assert body["min_p"] == 0.5 and body["stop"] == ["END"]
    assert body["messages"][-1] == {"role": "assistant", "content": "<think>"}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}


def test_budget_forcing_is_not_for_servers(server: Server, tmp_path: Path):
    with pytest.raises(ValueError, match="r0: think_tokens=5: no server takes it"):
        ask(server.url, requests(1, think_tokens=5), settings(tmp_path))


def test_log_probs_are_asked_for_and_kept(tmp_path: Path):
    place = {"token": "safe", "logprob": -0.1, "top_logprobs": [{"token": "un", "logprob": -2.0}]}

    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        made = faults.echo(sent)
        made["choices"][0]["logprobs"] = {"content": [place]} if sent.get("logprobs") else None
        return made

    for stream in (False, True):
        with Server(answer=answer) as server:
            given = settings(tmp_path / str(stream), stream=stream)
            for _ in range(2):
                with Api(server.url, "tiny", given) as api:
                    ((_, (reply,)),) = api.replies(requests(1), top_logprobs=5)
                assert reply.tokens == (("safe", {"un": -2.0, "safe": -0.1}),)
            assert server.bodies[0]["top_logprobs"] == 5 and server.asked.total() == 1


def test_wrong_settings_are_refused_in_one_line(tmp_path: Path, monkeypatch):
    given = settings(tmp_path)
    with pytest.raises(ValueError, match="expected http://HOST/v1"):
        Api("127.0.0.1:8000", "tiny", given)
    with pytest.raises(ValueError, match=r"server.extra=\[1\]: expected a JSON object"):
        Api("http://127.0.0.1:1/v1", "tiny", settings(tmp_path, extra="[1]"))
    with pytest.raises(ValueError, match=r"server.extra={: not JSON"):
        Api("http://127.0.0.1:1/v1", "tiny", settings(tmp_path, extra="{"))
    with pytest.raises(ValueError, match=r"server.key_env=NO_SUCH_KEY: the environment has no"):
        Api("https://example.com/v1", "tiny", settings(tmp_path, key_env="NO_SUCH_KEY"))
    Api("http://127.0.0.1:1/v1", "tiny", settings(tmp_path, key_env="NO_SUCH_KEY")).close()
    (tmp_path / "bad.sqlite").write_text("no database, but some text that is long enough")
    with pytest.raises(ValueError, match=r"bad.sqlite: file is not a database"):
        Api("http://127.0.0.1:1/v1", "tiny", ServerConfig(cache=str(tmp_path / "bad.sqlite")))


USED = {  # tests above that show what each setting changes
    *("concurrency", "requests_per_minute", "max_requests", "max_tokens", "max_cost", "timeout"),
    *("input_price", "output_price", "attempts", "give_up", "stream", "extra", "version", "cache"),
    *("key_env", "backoff", "tokens_per_minute"),
}


def test_every_setting_has_its_test():
    assert set(ServerConfig.model_fields) == USED


def test_backoff_and_tokens_per_minute(tmp_path: Path):
    with Server(plan=lambda sent: ["500"]) as server:
        given = settings(tmp_path).model_copy(update={"backoff": 0.6})
        start = time.monotonic()
        ask(server.url, requests(1), given)
        assert time.monotonic() - start >= 0.3
    with (
        Server() as server,
        Api(server.url, "tiny", settings(tmp_path, tokens_per_minute=2200)) as api,
    ):
        api._tokens.period = 0.4  # two requests of 1,024 and their prompts
        start = time.monotonic()
        assert len(list(api.generate(requests(6)[1:]))) == 5
        assert time.monotonic() - start >= 0.8
        assert json.dumps(api.report())
