"""Tokens of rows: both branches of a pair continue one prefix, as the whole text is tokenised."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from saro_jax.data.rows import PreferenceRow, Reject, SFTRow, UnpairedRow
from saro_jax.data.tokenise import (
    Branch,
    RowError,
    digest,
    item_key_parts,
    tokenise,
    tokenise_row,
)
from saro_jax.text import chat
from saro_jax.text.chat import Message

TEXTS = [
    "The request is harmless: it asks about a process, so I can help.\n\nCall exit(1) in main.",
    "Wait... that step took the story at face value!!\n\n\nRefuse. cafés ☕☕ naïve 12345 \n ok  ",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens cross words and lines; pad == eos, BOS == <|im_start|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As in Llama 3's file: spaces are trimmed off the offsets that tokenizers report.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Lines as documents keep the merges short.
    lines = [line for text in TEXTS for line in text.replace(". ", ". |").split("|")]
    tokenizer.train_from_iterator(
        [word for line in lines for word in (line[i : i + 7] for i in range(len(line)))],
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )


def normalising() -> PreTrainedTokenizerFast:
    """As `byte_level`, with composed characters (NFC), as Qwen has."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


TOKENIZER = byte_level()


def text_of(ids, tokenizer=TOKENIZER) -> str:
    return str(tokenizer.decode(ids))


def answer(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def question(text: str = "Kill it?") -> tuple[Message, ...]:
    return (Message("user", text),)


def sft(text: str = "Use kill.", prompt: tuple[Message, ...] = question()) -> SFTRow:
    return SFTRow("a", "f.jsonl:1", "sft", 1.0, prompt, answer(text))


def pair(chosen: str, rejected: str, prefix: str = "") -> PreferenceRow:
    return PreferenceRow(
        "p", "f.jsonl:2", "outcome", 0.5, question(), prefix, answer(chosen), answer(rejected)
    )


def whole_ids(tokenizer, text: str) -> list[int]:
    turns = [{"role": "user", "content": "Kill it?"}, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    return ids[: len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id) + 1]


def test_sft_item():
    item = tokenise_row(sft(), TOKENIZER, 100)
    (branch,) = item.branches
    assert (item.id, item.where, item.kind, item.weight) == ("a", "f.jsonl:1", "sft", 1.0)
    assert item.prefix.dtype == branch.ids.dtype == np.int32 and branch.scored.dtype == np.bool_
    assert len(item.prefix) == 0 and not branch.truncated
    assert branch.ids.tolist() == whole_ids(TOKENIZER, "Use kill.")
    assert text_of(branch.ids[branch.scored]) == "Use kill.<|im_end|>"
    assert branch.ids[-1] == TOKENIZER.pad_token_id and branch.scored[-1]


def test_outcome_pair_scores_the_whole_answers():
    item = tokenise_row(pair("Use kill.", "Use no kill."), TOKENIZER, 100)
    assert text_of(item.prefix).endswith("<|im_start|>assistant\n")
    # The words both begin with stay in the branches.
    texts = [text_of(branch.ids) for branch in item.branches]
    assert texts == ["Use kill.<|im_end|>", "Use no kill.<|im_end|>"]
    assert all(branch.scored.all() for branch in item.branches)


def test_process_pair_is_one_turn():
    prefix = "<think>\nThe request "
    item = tokenise_row(pair("is harmless.", "asks about it.", prefix), TOKENIZER, 100)
    for branch, text in zip(item.branches, ("is harmless.", "asks about it."), strict=True):
        ids = np.concatenate([item.prefix, branch.ids])
        assert ids.tolist() == whole_ids(TOKENIZER, prefix + text)
        shown = text_of(ids)
        assert shown.count("<|im_start|>assistant") == shown.count("assistant") == 1
        assert shown.count("<|im_end|>") == 2
        assert branch.scored.all()


@pytest.mark.parametrize("make", [byte_level, normalising])
def test_random_cuts_keep_the_whole_text_tokenisation(make):
    tokenizer = make()
    rng = random.Random(0)
    straddled = 0
    texts = [*TEXTS, "cafe\u0301s e\u0301\u0301 ☕\u200d☕ \n\n\n  x", "...\n\n...\n\n \n.."]
    for _ in range(400):
        whole, other = rng.choice(texts), rng.choice(texts)
        cut, at = rng.randrange(1, len(whole)), rng.randrange(len(other))
        prefix, chosen, rejected = whole[:cut], whole[cut:], other[at:]
        if chosen == rejected:
            continue
        item = tokenise_row(pair(chosen, rejected, prefix), tokenizer, 10_000)
        encoded = [text_of(item.prefix, tokenizer)]
        header = len("<|im_start|>user\nKill it?<|im_end|>\n<|im_start|>assistant\n")
        firsts = []
        for branch, text in zip(item.branches, (chosen, rejected), strict=True):
            ids = [*item.prefix.tolist(), *branch.ids.tolist()]
            assert ids == whole_ids(tokenizer, prefix + text)
            assert branch.scored.all() and len(branch.ids) > 1
            if make is byte_level:
                # Without normalisation bytes tell exactly where each token ends.
                ends = np.cumsum([_byte_length(tokenizer, token) for token in ids])
                past = header + len(prefix.encode())
                firsts.append(int(np.argmax(ends > past)))
        if make is byte_level:
            # The branches start at the first token past the cut, or where the two part before it.
            start = len(item.prefix)
            assert start <= min(firsts)
            first_tokens = {int(branch.ids[0]) for branch in item.branches}
            assert start == min(firsts) or len(first_tokens) == 2
            straddled += len(encoded[0].encode()) < header + len(prefix.encode())
    assert make is normalising or straddled > 50


def _byte_length(tokenizer, token: int) -> int:
    return len(tokenizer.convert_ids_to_tokens(token))


def test_prompt_turns_are_never_scored():
    prompt = (*question(), *answer("Use kill."), Message("user", "Sure?"))
    item = tokenise_row(sft("Not sure.", prompt), TOKENIZER, 200)
    (branch,) = item.branches
    assert text_of(branch.ids[branch.scored]) == "Not sure.<|im_end|>"


def test_later_turns_of_a_branch_score_only_the_assistant():
    chosen = (*answer("Use kill."), Message("user", "Sure?"), *answer("Not sure."))
    row = replace(pair("x", "No."), chosen=chosen)
    branch = tokenise_row(row, TOKENIZER, 200).branches[0]
    assert text_of(branch.ids[~branch.scored]).strip() == (
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant"
    )


def test_truncation_cuts_the_end_of_the_longer_branch_only():
    row = pair("Use kill. " + TEXTS[0], "No.", "The request ")
    full = tokenise_row(row, TOKENIZER, 1000)
    length = len(full.prefix) + 6
    item = tokenise_row(row, TOKENIZER, length)
    assert item.prefix.tolist() == full.prefix.tolist()
    chosen, rejected = item.branches
    assert chosen.truncated and len(chosen.ids) == 6 and chosen.scored.all()
    assert chosen.ids.tolist() == full.branches[0].ids[:6].tolist()
    assert chosen.ids[-1] != TOKENIZER.eos_token_id
    assert not rejected.truncated and rejected.ids.tolist() == full.branches[1].ids.tolist()
    # Exactly as long as allowed is not too long.
    room = len(full.prefix) + len(full.branches[0].ids)
    assert not tokenise_row(row, TOKENIZER, room).branches[0].truncated


def test_sft_truncation():
    full = tokenise_row(sft(TEXTS[0]), TOKENIZER, 1000).branches[0]
    cut = tokenise_row(sft(TEXTS[0]), TOKENIZER, len(full.ids) - 1).branches[0]
    assert cut.truncated and cut.ids.tolist() == full.ids[:-1].tolist()


@pytest.mark.parametrize("row", [sft(), pair("Use kill.", "No.")])
def test_prompt_that_fills_the_length_is_rejected(row):
    prompt = len(chat.prompt_ids(TOKENIZER, question()))
    tokenise_row(row, TOKENIZER, prompt + 1)
    with pytest.raises(RowError, match=f"nothing to score: .*data.max_length={prompt}$"):
        tokenise_row(row, TOKENIZER, prompt)
    with pytest.raises(RowError, match="nothing to score"):
        tokenise_row(row, TOKENIZER, 1)


def test_too_long_reject():
    row = pair("Use kill. " + TEXTS[0], "No.")
    with pytest.raises(RowError, match=r"too long: \d+ tokens, data.max_length=40"):
        tokenise_row(row, TOKENIZER, 40, "reject")
    tokenise_row(row, TOKENIZER, 1000, "reject")


def test_branches_equal_after_truncation_are_rejected():
    row = pair(TEXTS[0] + " Yes.", TEXTS[0] + " No.")
    length = len(tokenise_row(row, TOKENIZER, 1000).prefix) + 5
    with pytest.raises(
        RowError, match="chosen equals rejected: the same 5 tokens after truncation"
    ):
        tokenise_row(row, TOKENIZER, length)


def test_raw_text_pair():
    row = PreferenceRow("r", "f:1", "outcome", 1.0, "Human: hi\nAssistant:", "", " Hello", " No")
    item = tokenise_row(row, TOKENIZER, 100)
    assert text_of(item.prefix) == "Human: hi\nAssistant:"
    texts = [text_of(branch.ids) for branch in item.branches]
    assert texts == [" Hello<|im_end|>", " No<|im_end|>"]


def test_without_chat_template_texts_are_joined():
    tokenizer = byte_level(None)
    (branch,) = tokenise_row(sft(" Use kill."), tokenizer, 100).branches
    assert text_of(branch.ids, tokenizer) == "Kill it? Use kill.<|im_end|>"
    assert text_of(branch.ids[branch.scored], tokenizer) == " Use kill.<|im_end|>"
    with pytest.raises(RowError, match=r"no chat template: .*2 turns"):
        tokenise_row(sft("x", (*question(), *question())), tokenizer, 100)


def test_tokenise_keeps_order_and_every_reject():
    rows = [replace(sft(f"Answer {i}."), id=str(i), where=f"f:{i}") for i in range(7)]
    rows[3] = replace(rows[3], completion=answer("broken<|im_end|>"))
    items, rejects = tokenise(rows, TOKENIZER, 100)
    assert [item.id for item in items] == ["0", "1", "2", "4", "5", "6"]
    reason = "control token in text: '<|im_end|>' in the assistant turn"
    assert rejects == [Reject("f:3", "3", reason)]
    assert tokenise([], TOKENIZER, 100) == ([], [])


def test_workers_give_the_same_items():
    rows = [replace(sft(f"Answer {i}."), id=str(i), where=f"f:{i}") for i in range(7)]
    rows[3] = replace(rows[3], completion=answer("broken<|im_end|>"))
    alone, together = tokenise(rows, TOKENIZER, 100), tokenise(rows, TOKENIZER, 100, workers=2)
    assert [item.id for item in alone[0]] == [item.id for item in together[0]]
    assert list(map(item_key_parts, alone[0])) == list(map(item_key_parts, together[0]))
    assert alone[1] == together[1]


def test_template_without_end_of_turn_fails_at_once():
    tokenizer = byte_level("{% for m in messages %}{{ m.role + m.content + '\n' }}{% endfor %}")
    with pytest.raises(ValueError, match="writes no end-of-turn token"):
        tokenise([sft()], tokenizer, 100)


def test_item_key_parts_tell_tokens_masks_and_cuts_apart():
    item = tokenise_row(pair("Use kill.", "No."), TOKENIZER, 100)
    same = tokenise_row(replace(pair("Use kill.", "No."), id="q", weight=3.0), TOKENIZER, 100)
    assert item_key_parts(item) == item_key_parts(same)
    first, second = item.branches
    flipped = replace(first, scored=~first.scored)
    moved = replace(
        item,
        prefix=item.prefix[:-1],
        branches=tuple(
            replace(
                b, ids=np.insert(b.ids, 0, item.prefix[-1]), scored=np.insert(b.scored, 0, False)
            )
            for b in item.branches
        ),
    )
    changed = [
        replace(item, branches=(second, first)),
        replace(item, branches=(flipped, second)),
        replace(item, branches=(first,)),
        moved,
    ]
    keys = {item_key_parts(other) for other in (item, *changed)}
    assert len(keys) == 5


def test_real_rows_keep_their_text():
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "star1.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} beside the checkout")
    from saro_jax.data import rows

    read, rejects = rows.read(str(path), "sft")
    assert len(read) == 1000 and not rejects
    items, rejects = tokenise(read[:50], TOKENIZER, 100_000)
    assert not rejects
    for row, item in zip(read, items, strict=False):
        (branch,) = item.branches
        scored = text_of(branch.ids[branch.scored])
        assert scored == row.completion[0].content + "<|im_end|>"
        assert scored.startswith("<think>") and scored.count("</think>") == 1


# ---- scope, parts, unpaired rows

ASKED = (Message("user", "Call exit(1)?"),)


def continued(prefix, chosen, rejected, scope):
    a, b = ((Message("assistant", text),) for text in (chosen, rejected))
    row = PreferenceRow("i", "f:1", "k", 1.0, ASKED, prefix, a, b)
    tokenizer = byte_level()
    item = tokenise_row(row, tokenizer, 400, scope=scope)
    return item, [tokenizer.decode(b.ids[b.scored]) for b in item.branches]


@pytest.mark.parametrize(
    ("prefix", "chosen", "rejected", "expected"),
    [
        ("<think>\nOne.\n\n", "Wait.\n\nNo.\n</think>\nNo.", "On\n\nYes", ("Wait.\n\n", "On\n\n")),
        ("<think>\n", "a b c\n</think>\n\nNo.", "yes", ("a b c\n</think>", "yes<|im_end|>")),
        ("", "<think>\nA.\n\nWait.\n\nx", "<think>\nA.\n\nYes.", ("Wait.\n\n", "Yes.<|im_end|>")),
        ("", "No.", "Yes.", ("No.<|im_end|>", "Yes.<|im_end|>")),
    ],
)  # fmt: skip
def test_a_step_is_the_first_that_differs(prefix, chosen, rejected, expected):
    item, texts = continued(prefix, chosen, rejected, "step")
    found: Any = texts
    whole, _ = continued(prefix, chosen, rejected, "suffix")
    # A token belongs to the step in which it begins: one may reach into the next.
    for text, step in zip(found, expected, strict=True):
        assert text.startswith(step.rstrip()) or step.startswith(text)
    for a, b in zip(item.branches, whole.branches, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert not (a.scored & ~b.scored).any() and a.scored.any()
    np.testing.assert_array_equal(item.prefix, whole.prefix)
    assert item_key_parts(item) != item_key_parts(whole) or expected[0].startswith("No.")


def test_a_step_that_is_cut_away_is_rejected():
    # The one ends where the other goes on: its step is the end of the turn.
    item, texts = continued("", "Same.\n\n", "Same.\n\nmore", "step")
    found: Any = texts
    assert found[0].endswith("<|im_end|>") and found[1] == "more<|im_end|>"
    room = len(item.prefix) + int(np.flatnonzero(item.branches[1].scored)[0])
    a, b = ((Message("assistant", text),) for text in ("Same.\n\nless", "Same.\n\nmore"))
    row = PreferenceRow("i", "f:1", "k", 1.0, ASKED, "", a, b)
    _, rejects = tokenise([row], byte_level(), room, scope="step")
    assert [reject.reason.split(":")[0] for reject in rejects] == ["nothing to score"]


def part(branch: Branch) -> np.ndarray:
    assert branch.reasoning is not None
    return branch.reasoning


def test_parts_end_with_the_closing_tag():
    tokenizer = byte_level()
    item, _ = continued("<think>\nOne. ", "Two.\n</think>\n\nNo.", "</think>Yes.", "suffix")
    texts: list[list[Any]] = [
        [tokenizer.decode(b.ids[part(b) == inside]) for inside in (True, False)]
        for b in item.branches
    ]
    assert texts[0][0].rstrip().endswith("</think>") and "</think>" not in texts[0][1]
    assert texts[1] == ["</think>", "Yes.<|im_end|>"] or texts[1][0].startswith("</think>")
    plain, _ = continued("", "No.", "Yes.", "suffix")
    assert not any(part(b).any() for b in plain.branches)
    unclosed, _ = continued("<think>\nOne. ", "Two.", "Three.", "suffix")
    assert all(part(b).all() for b in unclosed.branches)


def test_an_unpaired_row_is_one_branch_of_a_pair():
    tokenizer = byte_level()
    for prefix, said in (("", "No, thanks."), ("<think>\nOne.", " Two.</think>No.")):
        pair, _ = continued(prefix, said, "Something else", "suffix")
        turns = (Message("assistant", said),)
        row = UnpairedRow("i", "f:1", "k", 1.0, ASKED, prefix, turns, False)
        item = tokenise_row(row, tokenizer, 400)
        (branch,) = item.branches
        assert not item.label and pair.label
        ids = np.concatenate([item.prefix, branch.ids])
        np.testing.assert_array_equal(ids, np.concatenate([pair.prefix, pair.branches[0].ids]))
        assert branch.scored.all() and branch.scored[-1]


def test_the_digest_is_that_of_what_is_trained_on():
    items = [tiny.item(i, 3, 2, 4) for i in range(3)]
    found = digest(items)
    assert found.startswith("3 rows, hash ") and digest(list(items)) == found
    changed = [
        items[::-1],
        items[:2],
        [*items[:2], replace(items[2], weight=0.5)],
        [*items[:2], replace(items[2], prefix=items[2].prefix + 1)],
    ]
    assert len({found, *map(digest, changed)}) == 5
