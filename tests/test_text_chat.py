"""Chat templates: ids equal the template's own, masks cover the answer and its end of turn."""

import json

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from saro_jax.text import chat
from saro_jax.text.chat import Message

TEXTS = [
    "How do I terminate a C program? Call exit(1), or return from main.\n\nThat is all.",
    "<think>\nThe request is harmless: it asks about a process.\n</think>\n\nUse kill. Not sure?",
    "user assistant system You are a helpful assistant. 12 * 2 = 24 cafés ☕ \n\n\n   indented",
]
REASONED = "<think>\nThe request is harmless.\n</think>\n\nUse kill."

# Written after the structure of the published templates, with what makes each of them hard.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=messages|length - 1, open=true) %}"
    "{%- for m in messages[::-1] %}{%- if ns.open and m.role == 'user' %}"
    "{%- set ns.open = false %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}"
    "{%- endfor %}{%- for m in messages %}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n') %}"
    "{%- set thought = thought.split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if no_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# The system turn goes into the last user turn, if that is the last turn at all.
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
    "{%- endif %}{{- bos_token }}{%- for m in loop_messages %}{%- if m.role == 'user' %}"
    "{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_level(
    template: str | None, special: list[str], bos: str | None, eos: str, words: str | None = None
) -> PreTrainedTokenizerFast:
    """A small byte-level BPE, splitting as GPT-2 or by `words` (Qwen, Llama 3); pad == eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words is not None:
        split = pre_tokenizers.Split(Regex(words), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special),
    )
    after: list = [processors.ByteLevel(trim_offsets=True)]
    if bos is not None and not bos.startswith("<|im"):
        special_ids = [(bos, tokenizer.token_to_id(bos))]
        after.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special_ids))
    tokenizer.post_processor = processors.Sequence(after)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=template,
    )


def sentencepiece(template: str | None, special: list[str], eos: str) -> PreTrainedTokenizerFast:
    """A small BPE as of Llama 2: a space is put before a text, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    # Only for training: pieces do not cross words, but at run time nothing holds words apart.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(
        TEXTS[:2], trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *special, *pieces])
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    # The trainer marks the byte pieces as special tokens: they are ordinary in the published files.
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in pieces]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=eos,
        pad_token=eos,
        unk_token="<unk>",
        chat_template=template,
    )


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
BARS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "chatml": byte_level(CHATML, IM, "<|im_start|>", "<|im_end|>"),
        "qwen2.5": byte_level(CHATML, IM, None, "<|im_end|>", WORDS),
        "qwen3": byte_level(QWEN3, IM, None, "<|im_end|>", WORDS),
        "llama2": sentencepiece(LLAMA2, ["<s>", "</s>"], "</s>"),
        "llama3": byte_level(LLAMA3, HEADERS, "<|begin_of_text|>", "<|eot_id|>", WORDS),
        "mistral": sentencepiece(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>"),
        # Its end of turn is not its eos.
        "gemma": sentencepiece(GEMMA, TURNS, "<eos>"),
        "deepseek": byte_level(DEEPSEEK, BARS, BARS[0], BARS[1]),
    }


NAMES = ["chatml", "qwen2.5", "qwen3", "llama2", "llama3", "mistral", "gemma", "deepseek"]
ENDS = {
    **dict.fromkeys(("chatml", "qwen2.5", "qwen3"), "<|im_end|>"),
    **dict.fromkeys(("llama2", "mistral"), "</s>"),
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "deepseek": BARS[1],
}
BOS = {
    "llama2": "<s>",
    "mistral": "<s>",
    "llama3": HEADERS[0],
    "gemma": "<bos>",
    "deepseek": BARS[0],
}


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def own_ids(tokenizer, messages) -> list[int]:
    """The template's own ids, up to the last end-of-turn token."""
    plain = [{"role": message.role, "content": message.content} for message in messages]
    ids = tokenizer.apply_chat_template(plain, return_dict=False, **chat.TEMPLATE_OPTIONS)
    last = max(i for i, token in enumerate(ids) if token == chat.end_of_turn(tokenizer))
    return ids[: last + 1]


def scored_runs(rendered: chat.Rendered) -> list[str]:
    """The text under each run of scored tokens."""
    starts = np.concatenate([[0], rendered.ends[:-1]])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.scored.astype(int), [0]])))
    return [
        rendered.text[starts[a] : rendered.ends[b - 1]]
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_templates_own_and_the_mask_is_the_answer(tokenizers, name):
    tokenizer = tokenizers[name]
    prompt, completion = turns("How do I kill a process?"), (Message("assistant", "Use kill. ☕"),)
    rendered = chat.render(tokenizer, prompt, completion)
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    # Without reasoning Qwen3 writes an empty block, which is left out here.
    if name != "qwen3":
        assert rendered.ids.tolist() == own_ids(tokenizer, prompt + completion)
    assert chat.end_of_turn(tokenizer) == end == rendered.ids[-1]
    assert rendered.scored[-1]
    (run,) = scored_runs(rendered)
    assert run.strip() == f"Use kill. ☕{' ' if name == 'llama2' else ''}{ENDS[name]}"
    assert tokenizer.decode(rendered.ids[rendered.scored]).strip() == run.strip()
    bos = tokenizer.convert_tokens_to_ids(BOS.get(name, "<|endoftext|>"))
    assert rendered.ids.tolist().count(bos) == (name in BOS)


@pytest.mark.parametrize("name", NAMES)
def test_ids_continue_the_generation_prompt(tokenizers, name):
    tokenizer = tokenizers[name]
    prompt = turns("Hi", REASONED, "How do I kill a process?")
    answer = REASONED if name == "deepseek" else "Use kill."
    ids = chat.prompt_ids(tokenizer, prompt)
    rendered = chat.render(tokenizer, prompt, (Message("assistant", answer),))
    assert ids.tolist() == rendered.ids[: len(ids)].tolist()
    # "<think>\n" opened by the generation prompt is the first text of the row, scored with it.
    opened = tokenizer.decode(rendered.ids[: len(ids)][rendered.scored[: len(ids)]])
    assert (
        opened == chat.generation_prefill(tokenizer) == ("<think>\n" if name == "deepseek" else "")
    )
    assert rendered.scored[len(ids) :].all()


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_is_kept_exactly_once(tokenizers, name):
    tokenizer = tokenizers[name]
    rendered = chat.render(tokenizer, turns("Kill it?"), (Message("assistant", REASONED),))
    (run,) = scored_runs(rendered)
    assert run.strip().removesuffix(ENDS[name]).strip() == REASONED
    assert rendered.text.count("<think>") == rendered.text.count("</think>") == 1
    if name == "qwen3":
        assert rendered.ids.tolist() == own_ids(tokenizer, turns("Kill it?", REASONED))


def test_no_empty_block_before_an_answer_without_reasoning(tokenizers):
    tokenizer = tokenizers["qwen3"]
    shown = chat.render(tokenizer, turns("Kill it?"), (Message("assistant", "Use kill."),)).text
    assert shown.endswith("<|im_start|>assistant\nUse kill.<|im_end|>")


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("Use kill.", "<think>\n\n</think>\n\nUse kill."),
        (REASONED, REASONED),
    ],
)
def test_closed_block_of_the_generation_prompt_stays(answer, shown):
    template = QWEN3.replace("{%- if no_thinking %}", "{%- if true %}")
    tokenizer = byte_level(template, IM, None, "<|im_end|>")
    rendered = chat.render(tokenizer, turns("Kill it?"), (Message("assistant", answer),))
    assert rendered.text.endswith(f"assistant\n{shown}<|im_end|>")
    assert scored_runs(rendered) == [f"{answer}<|im_end|>"]
    assert chat.generation_prefill(tokenizer) == ""


def test_text_that_only_closes_the_reasoning_gets_the_opened_block(tokenizers):
    rendered = chat.render(
        tokenizers["deepseek"], turns("Hi"), (Message("assistant", "Fine.\n</think>\n\nHello"),)
    )
    assert rendered.text.endswith(f"<｜Assistant｜><think>\nFine.\n</think>\n\nHello{BARS[1]}")
    assert scored_runs(rendered) == [f"Fine.\n</think>\n\nHello{BARS[1]}"]


@pytest.mark.parametrize("name", NAMES)
def test_every_assistant_turn_of_the_completion_is_scored_and_none_of_the_prompt(tokenizers, name):
    tokenizer = tokenizers[name]
    conversation = turns("Hi", "Hello", "Kill it?", REASONED, "Sure?", "Not sure.")
    rendered = chat.render(tokenizer, conversation[:3], conversation[3:])
    runs = [run.strip().removesuffix(ENDS[name]).strip() for run in scored_runs(rendered)]
    assert runs == [REASONED, "Not sure."]
    if name in ("chatml", "qwen2.5", "llama2", "llama3", "mistral", "gemma"):
        assert rendered.ids.tolist() == own_ids(tokenizer, conversation)


@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma"])
def test_outer_spaces_that_the_template_trims_are_kept(tokenizers, name):
    rendered = chat.render(tokenizers[name], turns("Hi"), (Message("assistant", "\n Hello \n"),))
    (run,) = scored_runs(rendered)
    assert "\n Hello \n" in run and run.endswith(ENDS[name])


def test_the_trailing_newline_is_not_part_of_the_ids(tokenizers):
    tokenizer = tokenizers["chatml"]
    assert (
        chat.render(tokenizer, turns("Hi"), turns("", "Hello")[1:]).ids[-1]
        == tokenizer.pad_token_id
    )


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "llama2", "llama3", "mistral"])
def test_prefix_continues_the_same_turn(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = chat.prompt_ids(tokenizer, turns("Hi"), prefix="<think>\nThe request")
    rendered = chat.render(tokenizer, turns("Hi"), (Message("assistant", REASONED),))
    assert ids.tolist() == rendered.ids[: len(ids)].tolist()


def test_date_of_the_template_does_not_move(tokenizers):
    tokenizer = tokenizers["llama3"]
    assert "Today: 26 Jul 2024" in tokenizer.decode(chat.prompt_ids(tokenizer, turns("Hi")))


def test_text_equal_to_a_mark_is_kept(tokenizers):
    text = "SCORED0TURN0END and SCORED1TURN0END"
    rendered = chat.render(tokenizers["chatml"], turns(text), (Message("assistant", text),))
    assert scored_runs(rendered) == [f"{text}<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        (
            "gemma",
            (Message("system", "Be kind."), *turns("Hi", "Hello")),
            "System role not supported",
        ),
        ("llama2", turns("Hi", "Hello")[:1] + turns("Hi", "Hello"), "Roles must alternate"),
        (
            "mistral",
            (Message("system", "Be kind."), *turns("Hi", "Hello")),
            "renders another prompt",
        ),
        (
            "chatml",
            turns("Hi", "Hello<|im_end|>"),
            "control token in text: '<|im_end|>' in the assistant",
        ),
        ("chatml", turns("<|im_start|>system", "Hello"), "control token in text: '<|im_start|>'"),
        ("chatml", turns("Hi") + turns("Hello"), "no assistant turn"),
    ],
)
def test_refused_in_one_line(tokenizers, name, messages, reason):
    with pytest.raises(ValueError, match=reason.replace("|", r"\|")) as error:
        chat.render(tokenizers[name], messages[:-1], messages[-1:])
    assert "\n" not in str(error.value)


def test_template_without_end_of_turn_is_named():
    tokenizer = byte_level(NO_END, IM, None, "<|im_end|>")
    tokenizer.name_or_path = "my-model"
    with pytest.raises(ValueError, match="chat template of my-model writes no end-of-turn token"):
        chat.end_of_turn(tokenizer)


@pytest.mark.parametrize(
    ("content", "end", "reason"),
    [
        ("m.content + m.content", "'<|im_end|>'", "drops or repeats an assistant turn"),
        ("m.content[:3]", "'<|im_end|>'", "drops or repeats an assistant turn"),
        (
            "m.content",
            "('<|im_end|>' if loop.index > 2 else '<|endoftext|>')",
            "writes no end-of-turn token after an assistant turn, found '<|im_end|>'",
        ),
    ],
)
def test_templates_that_change_or_end_turns_in_two_ways_are_refused(content, end, reason):
    turn = f"'<|im_start|>' + m.role + ':' + {content} + {end}"
    template = f"{{% for m in messages %}}{{{{ {turn} }}}}{{% endfor %}}"
    tokenizer = byte_level(template, IM, None, "<|im_end|>")
    with pytest.raises(ValueError, match=reason.replace("|", r"\|")):
        chat.render(tokenizer, turns("Yo"), turns("", "Hello", "Hi", "Hello")[1:])


def test_raw_text_gets_bos_by_habit_and_one_scored_eos():
    tokenizer = sentencepiece(None, ["<s>", "</s>"], "</s>")
    rendered = chat.render_raw(tokenizer, "How do I", " kill it?")
    assert rendered.ids.tolist() == [*tokenizer("How do I kill it?")["input_ids"], rendered.ids[-1]]
    assert tokenizer.convert_ids_to_tokens(rendered.ids[[0, -1]].tolist()) == ["<s>", "</s>"]
    assert tokenizer.decode(rendered.ids[rendered.scored]) == "kill it?</s>"
    again = chat.render_raw(tokenizer, "<s>How do I", " kill it?</s>")
    assert again.ids.tolist() == rendered.ids.tolist()
    prompt = chat.prompt_ids(tokenizer, turns("How do I"))
    assert prompt.tolist() == rendered.ids[: len(prompt)].tolist()
    assert chat.end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_raw_text_without_bos_habit_gets_none():
    tokenizer = byte_level(None, IM, "<|im_start|>", "<|im_end|>")
    rendered = chat.render_raw(tokenizer, "Kill", " it")
    assert tokenizer.decode(rendered.ids) == "Kill it<|im_end|>"
    with pytest.raises(ValueError, match="no chat template"):
        chat.prompt_ids(tokenizer, turns("Hi", "Hello", "Kill"))


def test_load_tokenizer(tokenizers, tmp_path):
    tokenizers["chatml"].save_pretrained(tmp_path / "model")
    loaded = chat.load_tokenizer(tmp_path / "model")
    turn = turns("Hi"), (Message("assistant", REASONED),)
    want = chat.render(tokenizers["chatml"], *turn)
    assert chat.render(loaded, *turn).ids.tolist() == want.ids.tolist()
    (tmp_path / "other.jinja").write_text(CHATML.replace("You are", "Be"))
    replaced = chat.load_tokenizer(tmp_path / "model", tmp_path / "other.jinja")
    assert "Be a helpful" in chat.render(replaced, *turn).text
    with pytest.raises(ValueError, match="no such model folder"):
        chat.load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="no usable tokenizer"):
        chat.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"model.chat_template: .*missing.jinja"):
        chat.load_tokenizer(tmp_path / "model", tmp_path / "missing.jinja")
