"""Judging by models behind servers: guards with the probability of their verdict, and rubrics."""

import math
from collections.abc import Sequence

from saro_jax.generation.api import Api
from saro_jax.generation.requests import Request
from saro_jax.generation.wire import Reply
from saro_jax.judging import guards, rubrics
from saro_jax.judging.guards import Answer, Guard, Verdict
from saro_jax.records import Sampler

# Characters of a long response that are judged at a time, and their step: about the 1,024 tokens of
# judging.local, for the server's tokenizer is not here.
WINDOW, STRIDE = 4096, 3584
TOP = 20  # likeliest tokens that are asked for, as many as OpenAI and vLLM give
RUBRIC_TOKENS = 512


def ask_guard(api: Api, guard: Guard, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
    """A guard on (prompt, response) pairs; what it does not answer is invalid, with why."""
    sampler = Sampler(temperature=0.0, top_p=1.0, max_new_tokens=guard.new_tokens)
    requests = [
        Request(f"{i}:{w}:{p}", tuple(asked), sampler)
        for i, (prompt, response) in enumerate(pairs)
        for w, part in enumerate(windows(response))
        for p, asked in enumerate(guards.messages(guard, prompt, part))
    ]
    found = {request.id: replies for request, replies in api.replies(requests, TOP)}
    answers = []
    for i, (_, response) in enumerate(pairs):
        by_window, texts, scores = [], [], []
        for w in range(len(windows(response))):
            verdicts = []
            for p in range(len(guard.policies or ("",))):
                name = f"{i}:{w}:{p}"
                reply = found[name][0] if found[name] else None
                if reply is None or reply.finish == "filter":
                    verdicts.append(Verdict("invalid"))
                    texts.append(api.failures.get(name, "withheld"))
                    scores.append(None)
                else:
                    verdicts.append(guards.parse(guard, reply.text))
                    texts.append(reply.text)
                    scores.append(p_unsafe(guard, reply))
            by_window.append(guards.by_policy(guard, verdicts))
        known = [score for score in scores if score is not None]
        worst = max(known) if len(known) == len(scores) else None
        answers.append(Answer(guards.worst(by_window), worst, "\n---\n".join(texts)))
    return answers


def ask_rubric(
    api: Api, rubric: str, pairs: Sequence[tuple[str, str]]
) -> list[tuple[rubrics.Verdict, str]]:
    """A rubric on (prompt, response) pairs: verdict and text; a cut or missing text is invalid."""
    sampler = Sampler(temperature=0.0, top_p=1.0, max_new_tokens=RUBRIC_TOKENS)
    requests = [
        Request(str(i), tuple(rubrics.messages(rubric, *pair)), sampler)
        for i, pair in enumerate(pairs)
    ]
    found = {request.id: replies for request, replies in api.replies(requests)}
    verdicts = []
    for request in requests:
        replies = found[request.id]
        text = replies[0].text if replies else api.failures.get(request.id, "")
        whole = replies and replies[0].finish in ("eos", "stop")
        # What is parsed from nothing is the rubric's invalid verdict.
        verdicts.append((rubrics.parse(rubric, text if whole else ""), text))
    return verdicts


def p_unsafe(guard: Guard, reply: Reply) -> float | None:
    """P(unsafe) against safe where the verdict stands in the guard's text; None: not told.

    A word's mass is that of the tokens which begin it. Tokens beyond the likeliest count nothing.
    """
    before = ""
    for token, places in reply.tokens:
        if guard.lead.match(before) and token.strip():
            mass = {"safe": 0.0, "unsafe": 0.0}
            for text, logprob in places.items():
                for kind, word in (("safe", guard.safe), ("unsafe", guard.unsafe)):
                    if text.strip() and word.startswith(text.strip()):
                        mass[kind] += math.exp(logprob)
            total = mass["safe"] + mass["unsafe"]
            return mass["unsafe"] / total if total else None
        before += token
    return None


def windows(text: str) -> list[str]:
    """A text, or overlapping parts of it of WINDOW characters, where it is longer."""
    if len(text) <= WINDOW:
        return [text]
    return [text[start : start + WINDOW] for start in range(0, len(text) - WINDOW + STRIDE, STRIDE)]
