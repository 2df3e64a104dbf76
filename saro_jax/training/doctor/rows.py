"""What the tokenizer, the chat template and the rows will do to a run."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from saro_jax.config import Config
from saro_jax.data import rows
from saro_jax.data.rows import Reject
from saro_jax.data.tokenise import Item
from saro_jax.models.architecture import Architecture
from saro_jax.text import chat
from saro_jax.training.doctor.items import digest, parts, scored_tokens
from saro_jax.training.finding import Finding, percent


def template(tokenizer: Any, arch: Architecture) -> list[Finding]:
    """Whether the chat template ends a turn, with a token that stops generation, and opens one."""
    other = "another chat template: model.chat_template=FILE.jinja"
    try:
        end = chat.end_of_turn(tokenizer)
    except ValueError as error:
        return [Finding("error", "template", f"{error}: no answer could learn to end", other)]
    token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.chat_template is None:
        found = f"the tokenizer has no chat template: texts are trained raw and end with {token}"
        remedy = f"right for a base model; else {other}"
        return [Finding("note", "template", found, remedy)]
    findings = []
    stops = {*arch.eos_token_ids, tokenizer.eos_token_id} - {None}
    if end not in stops:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stops))) or "no token"
        findings.append(
            Finding(
                "warning",
                "stop_token",
                f"answers learn to end with {token}, but the model's files stop generation at "
                f"{names}",
                f"when you generate, stop at {token} too, or use {other}",
            )
        )
    rendered = chat.render(
        tokenizer, (chat.Message("user", "x"),), (chat.Message("assistant", "y"),)
    )
    header = rendered.ids[rendered.scored & (rendered.ends <= rendered.start)]
    written = [i for i in header.tolist() if i in tokenizer.all_special_ids]
    if written:
        findings.append(
            Finding(
                "warning",
                "template",
                f"the generation prompt does not open the assistant's turn, so that its header "
                f"({tokenizer.decode(header)!r}) is scored in every row",
                f"let it write the header where add_generation_prompt is true, or use {other}",
            )
        )
    return findings or [Finding("ok", "template", f"turns end with {token}")]


def vocabulary(items: Sequence[Item], tokenizer: Any, arch: Architecture) -> list[Finding]:
    """Ids that the model's table does not have; a beginning-of-sequence token that stands twice."""
    highest = max((int(ids.max()) for item in items for ids in parts(item) if len(ids)), default=0)
    if highest >= arch.vocab_size:
        return [
            Finding(
                "error",
                "vocabulary",
                f"the rows have token id {highest}, the model {arch.vocab_size} embeddings",
                "take the tokenizer that belongs to the model: model.path",
            )
        ]
    findings = []
    if len(tokenizer) > arch.vocab_size:
        findings.append(
            Finding(
                "warning",
                "vocabulary",
                f"the tokenizer has {len(tokenizer)} tokens, the model {arch.vocab_size} "
                f"embeddings (the rows use ids to {highest} only)",
                "take the tokenizer that belongs to the model: model.path",
            )
        )
    bos = tokenizer.bos_token_id
    heads = [np.concatenate([item.prefix[:2], item.branches[0].ids[:2]])[:2] for item in items]
    twice = sum(bos is not None and len(ids) == 2 and (ids == bos).all() for ids in heads)
    if twice:
        findings.append(
            Finding(
                "warning",
                "bos",
                f"{twice} of {len(items)} rows begin with {tokenizer.bos_token} twice",
                "the chat template writes it and so does the text: take it out of the rows (or "
                "of model.chat_template)",
            )
        )
    ok = f"ids to {highest} of {arch.vocab_size}"
    return findings or [Finding("ok", "vocabulary", ok)]


def lost(rejects: Sequence[Reject], total: int, config: Config) -> list[Finding]:
    """Rows that are not used, by reason."""
    if not rejects:
        return [Finding("ok", "rejected", f"all {total} rows are used")]
    share, allowed = len(rejects) / total, config.data.max_reject_share
    reasons = rows.most_frequent(rejects)
    first = {reject.reason.split(":")[0]: reject for reject in reversed(rejects)}
    listed = ", ".join(f"{count} {name} (first {first[name].where})" for name, count in reasons[:4])
    remedies = []
    if any(name.startswith(("too long", "nothing to score")) for name, _ in reasons):
        remedies.append(f"raise data.max_length={config.data.max_length}")
    if any(name == "too long for a packed row" for name, _ in reasons):
        remedies.append("raise data.row_length")
    remedies.append("mend or remove the others" if remedies else "mend or remove them")
    remedy = f"{'; '.join(remedies)} (a run lists them in OUT/rejects.jsonl)"
    found = f"{len(rejects)} of {total} rows ({percent(share)}) are left out: {listed}"
    if len(rejects) == total:
        return [Finding("error", "rejected", found, remedy)]
    if share > allowed:
        found += f"; data.max_reject_share={allowed:g} allows {percent(allowed)}"
        return [Finding("error", "rejected", found, remedy)]
    return [Finding("warning", "rejected", found, remedy)]


def ends(items: Sequence[Item], tokenizer: Any, config: Config) -> list[Finding]:
    """Answers without an end-of-turn token: cut at max_length, or never written."""
    try:
        end = chat.end_of_turn(tokenizer)
    except ValueError:
        return []  # `template` says it
    findings = []
    count = max((len(item.branches) for item in items), default=1)
    cut = [sum(item.branches[k].truncated for item in items if k < len(item.branches))
           for k in range(count)]  # fmt: skip
    if any(cut):
        rows_cut = sum(any(branch.truncated for branch in item.branches) for item in items)
        where = ""
        if count > 1:
            where = f" (chosen {cut[0]}, rejected {sum(cut[1:])})"
        share = percent(rows_cut / len(items))
        found = (
            f"{rows_cut} of {len(items)} rows, {share}{where}, are cut at "
            f"data.max_length={config.data.max_length}: what is cut has no end-of-turn token to "
            "learn"
        )
        if count > 1 and abs(cut[0] - sum(cut[1:])) > 0.05 * len(items):
            found += "; where only one branch is cut, ending itself becomes the preference"
        remedy = "raise data.max_length, or leave such rows out with data.too_long=reject"
        findings.append(Finding("warning", "truncated", found, remedy))
    whole = [branch for item in items for branch in item.branches if not branch.truncated]
    open_ended = sum(int(branch.ids[-1]) != end or not branch.scored[-1] for branch in whole)
    if open_ended:
        token = tokenizer.convert_ids_to_tokens(end)
        findings.append(
            Finding(
                "warning",
                "end_of_turn",
                f"{open_ended} of {len(whole)} whole answers do not end with a scored {token}: "
                "the model does not learn to stop",
                "mend the chat template (model.chat_template) or the rows",
            )
        )
    if findings or not items:
        return findings
    return [Finding("ok", "end_of_turn", f"all {len(whole)} answers end with their token")]


def prompts(
    items: Sequence[Item], evaluation: Sequence[Item], tokenizer: Any, config: Config
) -> list[Finding]:
    """Prompts that come again, within the training rows and in data.eval; whole rows that do."""
    if not items:
        return []
    findings = []
    texts = _prompt_texts(items, tokenizer)
    count = Counter(texts)
    repeated = len(items) - len({tuple(digest(ids) for ids in parts(item)) for item in items})
    if repeated:
        findings.append(
            Finding(
                "warning",
                "repeated",
                f"{repeated} of {len(items)} rows repeat another row exactly and count twice",
                "remove them, or say what you mean with a row's weight",
            )
        )
    if len(count) < len(items):
        most = count.most_common(1)[0][1]
        found = f"{len(items)} rows have {len(count)} different prompts, one of them {most} times"
        findings.append(
            Finding(
                "note",
                "prompts",
                found + " (case, spaces and punctuation aside)",
                "as meant where several answers to a prompt are trained; keep all rows of a "
                "prompt in one split",
            )
        )
    else:
        findings.append(Finding("ok", "prompts", f"{len(items)} different prompts"))
    if evaluation:
        first: dict[str, str] = {}
        for text, item in zip(texts, items, strict=True):
            first.setdefault(text, item.where)
        shared = [
            (first[text], item.where)
            for text, item in zip(_prompt_texts(evaluation, tokenizer), evaluation, strict=True)
            if text in first
        ]
        if shared:
            findings.append(
                Finding(
                    "warning",
                    "eval_overlap",
                    f"{len(shared)} of {len(evaluation)} rows of data.eval have a prompt that is "
                    f"trained on, first {shared[0][1]} = {shared[0][0]} (case, spaces and "
                    "punctuation aside): eval_loss looks better than it is",
                    "remove these prompts from data.train or data.eval",
                )
            )
        else:
            ok = f"none of {len(evaluation)} prompts of data.eval is trained on"
            findings.append(Finding("ok", "eval_overlap", ok))
    return findings


def kinds(items: Sequence[Item]) -> list[Finding]:
    """Scored tokens by kind of row."""
    if not items:
        return []
    scored: Counter[str] = Counter()
    for item in items:
        scored[item.kind] += scored_tokens(*item.branches)
    number = Counter(item.kind for item in items)
    whole = max(1, sum(scored.values()))
    listed = ", ".join(
        f"{kind} {tokens} in {number[kind]} rows ({percent(tokens / whole)})"
        for kind, tokens in scored.most_common(6)
    )
    return [Finding("ok", "kinds", f"scored tokens: {listed}")]


def _prompt_texts(items: Sequence[Item], tokenizer: Any) -> list[str]:
    """What each row asks: case, spaces, punctuation and the assistant's header left out."""
    ids = [_given(item).tolist() for item in items]
    texts = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    header = _header(tokenizer)
    asked = (text[: text.rfind(header)] if header and header in text else text for text in texts)
    return ["".join(c for c in text.casefold() if c.isalnum()) for text in asked]


def _given(item: Item) -> np.ndarray:
    """Ids of an item before its first scored token."""
    branch = item.branches[0]
    first = int(np.argmax(branch.scored)) if branch.scored.any() else len(branch.ids)
    return np.concatenate([item.prefix, branch.ids[:first]])


def _header(tokenizer: Any) -> str:
    """What the template writes between the last prompt and the answer, spaces aside."""
    if tokenizer.chat_template is None:
        return ""
    mark = "WHERETHEPROMPTENDS"
    text = tokenizer.decode(chat.prompt_ids(tokenizer, (chat.Message("user", mark),)))
    return chat.THINK_TAIL.sub("", text.rpartition(mark)[2]).strip()
