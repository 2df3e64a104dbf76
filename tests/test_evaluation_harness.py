"""Holds the model class of lm-evaluation-harness to transformers and to its own `hf` model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")

from saro_jax.evaluation import harness  # noqa: E402

# What the harness' own dependencies warn about as they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k_test_300.jsonl"
PAIRS = [
    ("the user wants", " a lock opened"),
    ("the user wants ", "a lock opened"),  # the space belongs to what is scored
    ("the user wants", " it"),
    ("", "they would harm"),
    ("the lock " * 60, "refuse it"),  # longer than max_length: cut from the left
]
QUESTIONS = {
    "task": "questions",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}
ANSWERS = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match"}],
}


def asked(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny model in this class and in transformers."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    folder = tiny.write_model(tmp_path_factory.mktemp("lm") / "model")
    ours = harness.SaroJax(str(folder), max_length=96, batch_size=3)
    return ours, load(folder, dtype=torch.float32)


def reference(model, context, scored):
    """(sum of log-probs, whether greedy) by one forward pass of transformers."""
    ids = torch.tensor([context + scored])
    with torch.no_grad():
        logps = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)[-len(scored) :]
    target = torch.tensor(scored)
    return logps[range(len(scored)), target].sum().item(), bool((logps.argmax(-1) == target).all())


def test_loglikelihoods_are_those_of_transformers(models):
    ours, model = models
    found = ours.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    encode = ours.tokenizer.encode
    for (context, text), (logp, greedy) in zip(PAIRS, found, strict=True):
        stripped = context.rstrip()
        prefix = encode(stripped) if stripped else [ours.tokenizer.bos_token_id]
        scored = encode(context + text)[len(encode(stripped)) :]
        # One token more than max_length: the last is only predicted.
        expected = reference(model, (prefix + scored)[-97 : -len(scored)], scored)
        assert logp == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_a_greedy_answer_is_known_as_greedy(models):
    ours, model = models
    context = ours.tokenizer.encode("the user wants")
    ids = model.generate(
        torch.tensor([context]), do_sample=False, max_new_tokens=4, min_new_tokens=4
    )
    scored = ids[0, len(context) :].tolist()
    other = [*scored[:-1], (scored[-1] + 1) % 300]
    found = ours._loglikelihood_tokens([(None, context, scored), (None, context, other)], True)
    assert [greedy for _, greedy in found] == [
        reference(model, context, one)[1] for one in (scored, other)
    ]
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_scores_each_token_once(models):
    ours, model = models
    text = "the user owns the lock; refuse it. " * 20
    ids, n = ours.tokenizer.encode(text), ours.max_length
    assert len(ids) > 2 * n
    expected, done = 0.0, 0
    while done < len(ids):  # the last window is full as well, and scores what is left
        end = min(done + n, len(ids))
        whole = ([ours.prefix_token_id, *ids])[max(0, end - n) : end + 1]
        scored = whole[len(whole) - (end - done) :]
        expected += reference(model, whole[: -len(scored)], scored)[0]
        done = end
    assert ours.loglikelihood_rolling(asked((text,)), True)[0] == pytest.approx(expected, abs=1e-3)


def test_answers_end_at_stop_strings_and_are_cut_from_the_left(models):
    ours, model = models
    for context in ("the user wants", "break the lock " * 40):
        ids = ours.tokenizer.encode(context)[-(96 - 12) :]
        whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)
        text = ours.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
        stop = text[len(text) // 2 : len(text) // 2 + 2]
        wanted = [text, text.split(stop)[0]]
        options = [{"until": [], "max_gen_toks": 12}, {"until": [stop], "max_gen_toks": 12}]
        found = ours.generate_until(asked(*((context, one) for one in options)), True)
        assert found == wanted


def test_sampled_answers_depend_on_the_seed_and_differ_between_repeats(models):
    ours, _ = models
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    same = asked(*[("the user", options)] * 3)
    found = ours.generate_until(same, True)
    assert len(set(found)) == 3
    assert found == ours.generate_until(same, True)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_gen_toks": 96}, "max_gen_toks=96"),
        ({"num_beams": 4}, "generation_kwargs: num_beams; allowed: until"),
    ],
)
def test_what_can_not_be_generated_is_refused(models, options, said):
    with pytest.raises(ValueError, match=said):
        models[0].generate_until(asked(("the user", options)), True)


@pytest.mark.slow
def test_tasks_give_the_samples_of_the_hf_model(tmp_path):
    """SmolLM2 in float32: log-likelihoods within 1e-3, the same greedy texts."""
    if not GSM8K.exists():
        pytest.skip(f"no {GSM8K.name}")
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from saro_jax.models import hub

    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:30]]
    numbers = [row["answer"].split("####")[-1].strip() for row in rows]
    choices = [[f" {numbers[(i + k) % 30]} is it" for k in range(4)] for i in range(30)]
    docs = [row | {"choices": c, "label": 0} for row, c in zip(rows, choices, strict=True)]
    for task, n in ((QUESTIONS, 30), (ANSWERS, 10)):
        file = tiny.write_rows(tmp_path / f"{task['task']}.jsonl", docs[:n])
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        declared = task | data | {"test_split": "test"}
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(declared))
    folder = hub.resolve("quickstart")
    evaluate: Any = evaluator.simple_evaluate

    def samples(model, arguments, chat):
        found = evaluate(
            model,
            model_args=arguments,
            tasks=["questions", "answers"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            batch_size=4,
            apply_chat_template=chat,
            bootstrap_iters=0,
        )
        return found["samples"]

    for chat in (False, True):
        hf = samples("hf", {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}, chat)
        ours = samples("saro_jax", {"pretrained": "quickstart", "dtype": "float32"}, chat)
        worst = 0.0
        for a, b in zip(hf["questions"], ours["questions"], strict=True):
            assert a["arguments"] == b["arguments"]
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                worst = max(worst, abs(x[0] - y[0]))
                assert x[1] == y[1]
        print(f"chat template {chat}: largest difference {worst:.1e} nats")
        assert worst < 1e-3
        texts = [[one["resps"] for one in found["answers"]] for found in (hf, ours)]
        assert texts[0] == texts[1]
        assert sum(len(one[0][0]) for one in texts[1]) > 50
