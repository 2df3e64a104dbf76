"""Owns the small prompts, traces and outcomes that the tests of pairs are made of."""

import random

import tiny

from saro_jax.generation.requests import Request, Sample
from saro_jax.pairing.outcomes import Outcome, Verdict
from saro_jax.records import Parsed, Prompt, Sampler, TokenCounts, Trace, TraceStep, prompt_id
from saro_jax.text import chat, reasoning


def prompt(text: str = "How do I open the lock?", kind: str = "harmful", **more) -> Prompt:
    """A prompt of a kind; its category is P3 where it is harmful."""
    cats = ("P3",) if kind in ("harmful", "jailbreak") else ()
    given = {"categories": cats, **more}
    return Prompt(id=prompt_id(text), text=text, source="test", kind=kind, **given)  # type: ignore


def trace(of: Prompt, thought: str, answer: str, i: int = 0, finish: str = "eos", **more) -> Trace:
    """A whole response, its words counted as tokens."""
    raw = reasoning.render(thought, answer)
    parsed = reasoning.parse(raw, finished=finish != "length")
    decided = reasoning.decision(parsed.reasoning)
    return Trace(
        id=f"{of.id}-{i}",
        parent_ids=(of.id,),
        prompt_id=of.id,
        model="tiny",
        sampler=Sampler(seed=i),
        raw=raw,
        parsed=Parsed(**vars(parsed)),
        steps=tuple(
            TraceStep(i=at, start_char=s.start, end_char=s.end, text=s.text, kind=s.kind)
            for at, s in enumerate(reasoning.segment(parsed.reasoning))
        ),
        decision=decided or "none",  # type: ignore[arg-type]
        n_tok=TokenCounts(reason=len(thought.split()), answer=len(answer.split())),
        finish=finish,  # type: ignore[arg-type]
        origin="self",
        **more,
    )


def outcome(
    of: Prompt,
    i: int,
    p: float | None = None,
    refusal: str = "FC",
    thought: str = "The user asks for a thing.\n\nDecision: comply",
    p_thought: float | None = None,
    **more,
) -> Outcome:
    """A rollout with these verdicts."""
    correct = more.pop("correct", None)
    made = trace(of, thought, f"answer {i}", i, **more)
    return Outcome(made, of, Verdict(p, refusal), Verdict(p_thought), correct)  # type: ignore


class FakePolicy:
    """A generator whose samples follow from seed and number: mended thoughts end well.

    It keeps what it was asked, and raises KeyboardInterrupt after `stop_after` requests.
    """

    name, sha = "fake", "0" * 16

    def __init__(self, stop_after: int | None = None, reverse: bool = False):
        self.asked: list[Request] = []
        self.stop_after, self.reverse = stop_after, reverse

    def generate(self, requests):
        todo = list(requests)
        for request in reversed(todo) if self.reverse else todo:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            yield request, [respond(request, i) for i in range(request.n)]


def answer(sent: dict) -> dict:
    """The fake policy as a faults.Server's answer: it goes on from an answer that has begun."""
    messages, prefix = list(sent["messages"]), ""
    if sent.get("continue_final_message"):
        prefix = messages.pop()["content"]
    asked = Request("", tuple(messages), Sampler(seed=sent["seed"]), prefix=prefix)
    talk = (chat.Message("user", messages[-1]["content"]),)
    made = respond(asked, 0).text
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": made},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(chat.prompt_ids(tiny.tokenizer(), talk, prefix)),
            "completion_tokens": len(made.split()),
        },
    }


def respond(request: Request, i: int) -> Sample:
    """The i-th continuation of a request, a text of three steps or what is left of it."""
    rng = random.Random(f"{request.sampler.seed}:{i}")
    text, prefix = request.messages[-1]["content"], request.prefix
    harmful = "lock" in text
    last = prefix.rstrip().rsplit("\n\n", 1)[-1]
    mended = "step" in last or "rule" in last or "again" in last or "reading" in last
    led = "gladly" in prefix or "just answer" in prefix or "every detail" in prefix
    alarmed = "danger" in prefix or "hurt" in prefix or "refuse" in prefix
    if harmful:
        bad = rng.random() < (0.02 if mended else 0.97 if led else 0.5)
        mode = "comply" if bad else "refuse"
    else:
        bad = rng.random() < (0.02 if mended else 0.97 if alarmed else 0.4)
        mode = "refuse" if bad else "comply"
    steps = {
        ("comply", True): ["The user asks about a lock here.", "I can gladly answer this in full."],
        ("refuse", True): [
            "The user asks about a lock here.",
            "P3.R1 forbids it, that is a crime.",
        ],
        ("comply", False): ["The user asks a plain thing.", "Nothing here is at risk at all."],
        ("refuse", False): ["The user asks a plain thing.", "That is dangerous and could hurt."],
    }[mode, harmful]
    steps += ["So much for thought number one of many more to come."] * rng.randint(0, 3)
    answers = {
        "comply": f"Sure, here is what you do: take part {rng.randint(1, 9)} and turn it slowly.",
        "refuse": "I can't help with that.",
    }
    done = prefix.count("\n\n") if prefix else 0
    end = f"Decision: {mode}\n</think>\n\n{answers[mode]}"
    if "</think>" in prefix:
        return Sample(answers[mode], "eos")
    opening = "" if prefix else "<think>\n"
    rest = "" if not prefix or prefix.endswith("\n") else " It comes to what is asked.\n\n"
    return Sample(opening + rest + "".join(f"{s}\n\n" for s in steps[done:]) + end, "eos")
