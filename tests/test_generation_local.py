"""The local generator: samples are their request's own, stops, forced thoughts, adapters."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from saro_jax.config import LoRAConfig
from saro_jax.generation import local, programs
from saro_jax.generation.local import Local
from saro_jax.generation.requests import Request, Sample
from saro_jax.models import huggingface, lora, peft
from saro_jax.records import Sampler
from saro_jax.text import chat

QUESTIONS = ["open the lock", "why", "the user wants a lock opened; " * 12, "no, refuse it", "a"]


@cache
def folder() -> Path:
    return tiny.write_model(tiny.folder() / "sampled", seed=5)


@cache
def model(slots: int = 4) -> Local:
    return local.load(str(folder()), slots=slots)


def request(i: int, n: int = 1, prefix: str = "", **sampler: Any) -> Request:
    options = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "seed": i} | sampler
    messages = ({"role": "user", "content": QUESTIONS[i]},)
    return Request(f"r{i}", messages, Sampler(**options), n, prefix)


def answers(generator: Local, requests: list[Request]) -> dict[str, list[Sample]]:
    return {one.id: samples for one, samples in generator.generate(iter(requests))}


def mixed() -> list[Request]:
    """Requests that ask for everything at once, of lengths that differ."""
    return [
        request(0, n=3),
        request(1, n=2, temperature=0.0, max_new_tokens=7),
        request(2, n=4, top_p=0.9, max_new_tokens=70),
        request(3, n=1, top_k=9, prefix="<think>\n", think_tokens=6),
        request(4, n=5, min_p=0.02, temperature=1.3, max_new_tokens=3),
    ]


def ids(samples: list[Sample]) -> list[tuple[int, ...] | None]:
    return [sample.ids for sample in samples]


def test_a_sample_depends_on_its_request_and_number_alone():
    together = answers(model(), mixed())
    assert list(map(len, (together[f"r{i}"] for i in range(5)))) == [3, 2, 4, 1, 5]
    assert len(set(ids(together["r0"]))) == 3
    assert answers(model(), mixed()[::-1]) == together  # to the last bit of the log-probs
    assert answers(model(), mixed()[2:])["r2"] == together["r2"]
    for generator, asked in ((model(3), mixed()[2:] + mixed()[:2]), (model(16), mixed())):
        other = answers(generator, asked)
        assert {k: ids(v) for k, v in other.items()} == {k: ids(v) for k, v in together.items()}
        for name, samples in other.items():
            for a, b in zip(samples, together[name], strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)
    (alone,) = answers(model(), [mixed()[2]]).values()
    assert ids(alone) == ids(together["r2"])
    # Fewer samples are the first ones of more.
    (fewer,) = answers(model(), [request(0, n=2)]).values()
    assert ids(fewer) == ids(together["r0"])[:2]


def test_nothing_compiles_for_a_request():
    answers(model(), mixed())
    compiled: list[Any] = [programs.prefill, programs.burst, programs.place, programs.resize]
    before = [program._cache_size() for program in compiled]
    requests = [
        request(0, n=2, temperature=0.3, top_p=0.7, top_k=3, min_p=0.1, max_new_tokens=11, seed=99),
        request(3, n=3, stop=("zz",), seed=2**40),
        request(1, n=1, prefix="<think>\nno", think_tokens=3),
        request(2, n=6, max_new_tokens=64),
    ]
    answers(model(), requests)
    assert [program._cache_size() for program in compiled] == before


def test_log_probs_are_the_models_own():
    found = answers(model(), mixed())
    params = huggingface.load_params(folder(), tiny.ARCH, np.float32)
    tree = jax.tree.map(np.asarray, params)
    for one in mixed():
        prompt = model().job(one).prompt
        for sample in found[one.id]:
            assert sample.ids is not None and sample.logprobs is not None
            assert sample.prompt_tokens == len(prompt) and sample.tokens == len(sample.ids)
            want = tiny.logps(tree, np.concatenate([prompt, sample.ids]))[len(prompt) - 1 :]
            np.testing.assert_allclose(sample.logprobs, want, atol=1e-4)


def test_a_stop_text_ends_a_sample_before_it():
    (free,) = answers(model(), [request(2, max_new_tokens=60)])["r2"]
    stop = next(free.text[i : i + 2] for i in range(12, 40) if free.text[i : i + 2].isalnum())
    first = free.text.find(stop)
    (cut,) = answers(model(), [request(2, max_new_tokens=60, stop=("none", stop))])["r2"]
    assert (cut.text, cut.finish) == (free.text[:first], "stop")
    assert cut.ids is not None and free.ids is not None and cut.logprobs is not None
    assert cut.ids == free.ids[: len(cut.ids)] and len(cut.ids) == len(cut.logprobs) == cut.tokens
    whole, less = model().text(cut.ids), model().text(cut.ids[:-1])
    assert stop in whole and stop not in less
    (beyond,) = answers(model(), [request(2, max_new_tokens=len(cut.ids) - 1, stop=(stop,))])["r2"]
    assert (beyond.finish, beyond.ids) == ("length", cut.ids[:-1])


@pytest.mark.parametrize("prefix", ["<think>\nIt asks", "<think>"])
def test_an_unfinished_thought_is_closed(prefix: str):
    closing = tuple(model().tokenizer.encode("\n</think>\n\n", add_special_tokens=False))
    options: dict[str, Any] = {"n": 2, "prefix": prefix, "max_new_tokens": 40}
    free = answers(model(), [request(1, **options)])["r1"]
    forced = answers(model(), [request(1, **options, think_tokens=10)])["r1"]
    for before, after in zip(free, forced, strict=True):
        assert before.ids is not None and after.ids is not None
        assert after.ids[:10] == before.ids[:10]
        assert after.ids[10 : 10 + len(closing)] == closing
        assert after.forced and not before.forced
        assert "\n</think>\n\n" in after.text
        assert after.finish == "eos" or len(after.ids) == 40


def test_what_is_closed_or_no_thought_is_left_alone():
    for prefix in ("", "It asks", "<think>\nIt asks.\n</think>\n\nYes"):
        free = answers(model(), [request(1, prefix=prefix)])["r1"]
        assert answers(model(), [request(1, prefix=prefix, think_tokens=10)])["r1"] == free


def test_a_turn_that_ends_inside_its_thought_goes_on(monkeypatch):
    generator = model()
    (free,) = answers(generator, [request(1, prefix="<think>\n", max_new_tokens=30)])["r1"]
    assert free.ids is not None
    stop = free.ids[4]
    at = free.ids.index(stop)
    stops = generator.engine.stops_V.copy()
    stops[stop] = True
    monkeypatch.setattr(generator.engine, "stops_V", stops)
    (found,) = answers(
        generator, [request(1, prefix="<think>\n", max_new_tokens=30, think_tokens=20)]
    )["r1"]
    closing = tuple(generator.tokenizer.encode("\n</think>\n\n", add_special_tokens=False))
    assert found.ids is not None and found.forced
    assert found.ids[: at + len(closing)] == (*free.ids[:at], *closing)


def test_prefix_and_template():
    one = request(0, prefix="<think>\nIt")
    prompt = model().job(one).prompt
    text = model().text(prompt)
    assert text.endswith("assistant\n<think>\nIt") and QUESTIONS[0] in text
    messages = (chat.Message("user", QUESTIONS[0]),)
    np.testing.assert_array_equal(
        model().job(request(0)).prompt, chat.prompt_ids(model().tokenizer, messages)
    )


def test_adapters_are_added(tmp_path):
    base, arch = str(folder()), tiny.ARCH
    config = LoRAConfig(rank=4, alpha=8.0, rslora=True)
    params = huggingface.load_params(folder(), arch, np.float32)
    tree = lora.init(lora.abstract(config, arch, params, np.float32), 0)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), tree)
    adapters = lora.bind(config, jax.tree.map(jnp.asarray, tree))
    assert adapters is not None
    huggingface.save_peft(adapters, lora.peft_config(config, base, None), tmp_path / "peft")
    huggingface.save(params, arch, folder(), tmp_path / "merged", adapters=adapters)
    found, adapter = peft.resolve(str(tmp_path / "peft"))
    assert (found, adapter) == (folder(), tmp_path / "peft")
    ours = peft.load_params(found, adapter, arch, np.float32)
    theirs = huggingface.load_params(tmp_path / "merged", arch, np.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
    changed = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 1e-3), ours, params)
    assert sum(jax.tree.leaves(changed)) == len(list(lora.matrices(tree)))
    generator = local.load(str(tmp_path / "peft"))
    assert generator.sha not in (model().sha, local.load(str(tmp_path / "merged")).sha)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: True; allowed: False"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'; allowed: 'LORA'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: None; expected a model"),
        ({"r": None}, "r: None, lora_alpha: 8; need numbers"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, change: dict, message: str):
    import json

    config = LoRAConfig(rank=4, alpha=8.0)
    settings = lora.peft_config(config, str(folder()), None) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as error:
        peft.load_params(*peft.resolve(str(tmp_path)), tiny.ARCH, np.float32)
    assert str(error.value) == f"{tmp_path / 'adapter_config.json'}: {message}"


def test_what_can_not_be_asked_is_named():
    with pytest.raises(ValueError, match=r"^r0: .*exceed the model's 512 positions"):
        answers(model(), [request(0, max_new_tokens=512)])
    bad = Request("x", ({"role": "user", "content": "a<|im_end|>"},), Sampler())
    with pytest.raises(ValueError, match=r"^x: control token in text"):
        answers(model(), [bad])
