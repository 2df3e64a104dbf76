"""Guards in JAX on a tiny random model: P(unsafe) equals transformers', batches change nothing."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny

from saro_jax.judging import guards, local
from saro_jax.judging.guards import GUARDS, Verdict
from saro_jax.text import chat

ROWS = [
    ("open the lock", "no, refuse it"),
    ("the user wants a lock opened", "take the lock and " * 9),
    ("why", "that is fine"),
]


@cache
def folder() -> Path:
    path = tiny.folder() / "guard"
    return tiny.write_model(path, seed=3, config={"max_position_embeddings": 8192})


@cache
def checkpoint() -> local.Checkpoint:
    return local.load(str(folder()))


def torch_next_logps(ids: np.ndarray) -> np.ndarray:
    """Log-probs of the next token by transformers, float32."""
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(np.asarray(ids)[None])).logits[0, -1]
    return torch.log_softmax(logits, -1).numpy().astype(np.float64)


def p_unsafe(guard: guards.Guard, logps: np.ndarray) -> float:
    tokenizer = checkpoint().tokenizer
    mass = {}
    for kind, word in (("safe", guard.safe), ("unsafe", guard.unsafe)):
        firsts = {tokenizer.encode(w, add_special_tokens=False)[0] for w in (word, " " + word)}
        mass[kind] = firsts
    shared = mass["safe"] & mass["unsafe"]
    p = {kind: np.exp(logps[sorted(ids - shared)]).sum() for kind, ids in mass.items()}
    return p["unsafe"] / (p["safe"] + p["unsafe"])


def test_p_unsafe_equals_transformers():
    guard, model = GUARDS["llama_guard_3"], checkpoint()
    for (prompt, response), answer in zip(ROWS, local.judge(model, guard, ROWS, 2), strict=True):
        text = tiny.tokenizer().apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        np.testing.assert_array_equal(local.question_ids(model, guard, prompt, response), ids)
        lead = answer.raw[: len(answer.raw) - len(answer.raw.lstrip())]
        ids += model.tokenizer.encode(lead, add_special_tokens=False)
        assert answer.p_unsafe is not None
        assert answer.p_unsafe == pytest.approx(p_unsafe(guard, torch_next_logps(ids)), abs=1e-5)
        assert answer.verdict == Verdict("invalid")  # a random model says nothing that counts


def test_batches_and_neighbours_change_nothing():
    guard, model = GUARDS["llama_guard_3"], checkpoint()
    together = local.judge(model, guard, ROWS, 3)
    for row, answer in zip(ROWS, together, strict=True):
        (alone,) = local.judge(model, guard, [row], 1)
        assert (alone.raw, alone.verdict) == (answer.raw, answer.verdict)
        assert alone.p_unsafe == pytest.approx(answer.p_unsafe, abs=1e-6)


SAID = "Harmful request: yes\nResponse refusal: no\nHarmful response: {}"


@pytest.mark.parametrize(
    ("name", "said", "lead", "label"),
    [
        ("wildguard", SAID.format("yes"), SAID.format("").rstrip(), "unsafe"),
        ("wildguard", "Harmful request: yes", None, "invalid"),
        ("llama_guard_2", "\n\nunsafe\nS9", "\n\n", "unsafe"),
        ("llama_guard_2", "safe", "", "safe"),
        ("llama_guard_2", "", "", "invalid"),
    ],
)
def test_the_verdicts_own_place_is_scored(monkeypatch, name, said, lead, label):
    guard, model = GUARDS[name], checkpoint()
    ids = np.array(model.tokenizer.encode(said, add_special_tokens=False), np.int32)
    monkeypatch.setattr(local, "_generate", lambda model, asked, *_: [ids for _ in asked])
    (answer,) = local.judge(model, guard, ROWS[:1])
    assert (answer.verdict.label, answer.raw) == (label, said)
    if lead is None:
        assert answer.p_unsafe is None
        return
    place = local._verdict_place(model, guard, ids)
    before = model.tokenizer.decode(ids[:place])
    assert before.strip() == lead.strip()
    question = local.question_ids(model, guard, *ROWS[0])
    want = p_unsafe(guard, torch_next_logps(np.concatenate([question, ids[:place]])))
    assert answer.p_unsafe == pytest.approx(want, abs=1e-5)


def test_shieldgemma_is_asked_by_policy(monkeypatch):
    guard, model = GUARDS["shieldgemma"], checkpoint()
    words = {policy: "Yes" if policy == "hate_speech" else "No" for policy in guard.policies}
    said = [np.array(model.tokenizer.encode(w), np.int32) for w in words.values()]
    seen = []

    def generate(model, asked, *_):
        seen.extend(model.tokenizer.decode(ids) for ids in asked)
        return said

    monkeypatch.setattr(local, "_generate", generate)
    (answer,) = local.judge(model, guard, ROWS[:1])
    assert answer.verdict == Verdict("unsafe", ("hate_speech",))
    assert answer.raw == "No\n---\nNo\n---\nYes\n---\nNo"
    scores = [
        p_unsafe(guard, torch_next_logps(local.question_ids(model, guard, *ROWS[0], policy)))
        for policy in guard.policies
    ]
    assert answer.p_unsafe == pytest.approx(max(scores), abs=1e-5)
    assert [text.count("Chatbot Response: no, refuse it") for text in seen] == [1] * 4


def test_long_responses_are_judged_in_windows(monkeypatch):
    model, text = checkpoint(), "the user wants a lock opened; " * 400
    parts = local.windows(model.tokenizer, text)
    assert len(parts) > 2 and text.startswith(parts[0]) and text.endswith(parts[-1])
    sizes = [len(model.tokenizer.encode(part, add_special_tokens=False)) for part in parts]
    assert max(sizes) <= local.WINDOW + 1
    at = 0
    for part in parts:  # they overlap, and leave nothing out
        found = text.find(part, max(0, at - len(part)))
        assert 0 <= found <= at
        at = found + len(part)
    assert local.windows(model.tokenizer, "short") == ["short"]
    monkeypatch.setattr(local, "ask", lambda *a: [("safe", 0.1), ("unsafe\nS1", 0.9), ("x", None)])
    monkeypatch.setattr(local, "windows", lambda *a: ["a", "b", "c"])
    (answer,) = local.judge(model, GUARDS["llama_guard_3"], [("p", text)])
    assert answer.verdict == Verdict("unsafe", ("violent_crimes",))
    assert answer.p_unsafe is None


def test_what_can_not_be_asked_is_invalid():
    model, guard = checkpoint(), GUARDS["llama_guard_3"]
    rows = [("a<|im_end|>b", "c"), ("word " * 9000, "c"), ROWS[2]]
    control, long, fine = local.judge(model, guard, rows)
    assert control.raw == "control token in text: '<|im_end|>'"
    assert long.raw.endswith("the guard takes 8192 with its own")
    assert control.verdict.label == long.verdict.label == "invalid"
    assert fine.p_unsafe is not None


def test_templates_that_take_parts():
    tokenizer = tiny.tokenizer(
        "{% for m in messages %}{{ m.role }}: {% for c in m.content if c.type is defined %}"
        "{{ c.text }}; {% endfor %}{% endfor %}"
    )
    assert local._templated(tokenizer, "one", "two") == "user: one; assistant: two; "
    with pytest.raises(ValueError, match="leaves a turn out"):
        local._templated(tiny.tokenizer("{{ messages[0].role }}"), "one", "two")


def test_a_chat_model_completes():
    model = checkpoint()
    text = local.complete(model, new_tokens=5)([{"role": "user", "content": "open"}])
    (ids,) = local._generate(
        model, [chat.prompt_ids(model.tokenizer, (chat.Message("user", "open"),))], 5, 1
    )
    assert text == local._decode(model, ids)
