"""The view of tokenised rows: what is scored, cut and rejected can be read off it."""

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saro_jax.data import inspect

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAIR = {
    "id": "p",
    "prompt": "Kill it?",
    "prefix": "<think>\n[b]Oh ",
    "chosen": "yes.",
    "rejected": "no.",
}


@pytest.fixture
def model(tmp_path) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<|im_start|>", "<|im_end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    ).save_pretrained(tmp_path / "model")
    # A model folder is told by its config.
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(tmp_path / "model")


def shown(tmp_path, capsys, model, records, *options) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    inspect.main([str(path), "--model", model, *options])
    return capsys.readouterr().out


def test_conversation(tmp_path, capsys, model):
    out = shown(tmp_path, capsys, model, [{"id": "a", "prompt": "Hi", "completion": "[red]Hello"}])
    assert "<|im_start|>assistant\n⟦[red]Hello<|im_end|>⟧\n" in out
    assert f"a  {tmp_path}/rows.jsonl:1  sft  weight 1" in out
    assert "scored tokens:        11 to 11, median 11, 11 in all" in out


def test_pair_with_prefix_cuts_and_rejects(tmp_path, capsys, model):
    given = len("_user\nKill it?_\n_assistant\n<think>\n[b]Oh ")
    records = [
        PAIR,
        {**PAIR, "id": "q", "chosen": "x" * 9},
        {**PAIR, "id": "r", "rejected": "yes."},
    ]
    out = shown(tmp_path, capsys, model, records, "--max-length", str(given + 7))
    assert f"prefix: {given} tokens\n" in out and "<think>\n[b]Oh " in out
    assert "chosen: 5 tokens, 5 scored\n⟦yes.<|im_end|>⟧\n" in out
    assert "rejected: 4 tokens, 4 scored\n⟦no.<|im_end|>⟧\n" in out
    assert "⟦xxxxxxx⟧ … [truncated: no end of turn]" in out
    assert "3 rows: 2 used, 1 rejected" in out
    assert "truncated:            1 rows" in out
    assert "kinds:                process 2" in out
    assert re.search(r"rejected 1: chosen equals rejected, first .*rows.jsonl:3: chosen", out)


def test_number_of_examples_and_kind(tmp_path, capsys, model):
    out = shown(tmp_path, capsys, model, [PAIR, {**PAIR, "id": "q"}], "--n", "1")
    assert "\np  " in out.replace("─ ", "\n") and "q  " not in out
    out = shown(tmp_path, capsys, model, [PAIR], "--kind", "sft")
    assert "1 rows: 0 used, 1 rejected" in out


def test_colours_in_a_terminal(tmp_path, capsys, model, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = shown(tmp_path, capsys, model, [PAIR])
    assert "\x1b[1;32myes.<|im_end|>" in out and "⟦" not in out
    out = shown(tmp_path, capsys, model, [PAIR], "--no-color")
    assert "⟦yes.<|im_end|>⟧" in out and "32m" not in out


def test_errors_are_one_line(tmp_path, capsys, model):
    with pytest.raises(SystemExit) as error:
        inspect.main([str(tmp_path / "rws.jsonl"), "--model", model])
    assert str(error.value).startswith("error: ") and "no such file" in str(error.value)
    assert "\n" not in str(error.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        inspect.main(["--help"])
    assert done.value.code == 0 and "--max-length" in capsys.readouterr().out
