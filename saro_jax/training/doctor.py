"""The doctor before a run: what the rows, the tokenizer and the settings will do to it.

Pure functions, on the host, before a weight is read. `watch` goes on with the metrics.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from saro_jax.config import Config
from saro_jax.data import pipeline, rows
from saro_jax.data.packing import Shape, blocks, laid_out_length
from saro_jax.data.rows import Reject
from saro_jax.data.tokenise import Branch, Item
from saro_jax.models.architecture import Architecture
from saro_jax.text import chat
from saro_jax.training.finding import LEVELS, Finding, percent
from saro_jax.training.memory import device_memory, memory, parameters

LOOKED_AT = 32  # steps that are packed to see how full rows are
NEAR = 0.05  # a pair that differs in a smaller share of its tokens is nearly identical
SMALL_PAIR_BATCH, SMALL_BATCH_TOKENS = 8, 2048


def before(
    config: Config,
    stage: str,
    arch: Architecture,
    tokenizer: Any,
    shape: Shape,
    mesh: Mesh,
    *,
    items: Sequence[Item],
    rejects: Sequence[Reject],
    total: int,
    evaluation: Sequence[Item],
    steps: int,
) -> list[Finding]:
    """Everything that can be told without weights, the gravest first."""
    findings = [
        *template(tokenizer, arch),
        *vocabulary(items, tokenizer, arch),
        *lost(rejects, total, config),
        *ends(items, tokenizer, config),
        *pairs(items, rejects),
        *length_bias(items),
        *prompts(items, evaluation, tokenizer, config),
        *labels(items),
        *kinds(items),
        *hyperparameters(config, stage, arch, items, steps),
        *packing(config, items, shape, steps),
        *memory(config, stage, arch, shape, mesh, device_memory()),
    ]
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))


# ---- tokenizer and rows --------------------------------------------------------------------------


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
    highest = max((int(ids.max()) for item in items for ids in _parts(item) if len(ids)), default=0)
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
    repeated = len(items) - len({tuple(_digest(ids) for ids in _parts(item)) for item in items})
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
        scored[item.kind] += _scored(*item.branches)
    number = Counter(item.kind for item in items)
    whole = max(1, sum(scored.values()))
    listed = ", ".join(
        f"{kind} {tokens} in {number[kind]} rows ({percent(tokens / whole)})"
        for kind, tokens in scored.most_common(6)
    )
    return [Finding("ok", "kinds", f"scored tokens: {listed}")]


# ---- pairs ---------------------------------------------------------------------------------------


def _pairs(items: Sequence[Item]) -> Iterator[tuple[Item, Branch, Branch]]:
    """Each item's first branch against each further one."""
    for item in items:
        for other in item.branches[1:]:
            yield item, item.branches[0], other


def pairs(items: Sequence[Item], rejects: Sequence[Reject]) -> list[Finding]:
    """How far the branches of a pair differ at all."""
    same = [r for r in rejects if r.reason.startswith("chosen equals rejected")]
    if not same and not any(True for _ in _pairs(items)):
        return []
    findings = []
    if same:
        cut = sum(r.reason.endswith("after truncation") for r in same)
        after = f" ({cut} of them only after the cut at data.max_length)" if cut else ""
        findings.append(
            Finding(
                "warning",
                "identical",
                f"{len(same)} pairs have identical branches{after} and are left out, first "
                f"{same[0].where}: their loss would stay at ln 2 without a gradient",
                "raise data.max_length"
                if cut == len(same)
                else "remove them, or mend how they were made",
            )
        )
    number, near, within, equal, tokens = 0, [], 0, 0, 0
    for item, a, b in _pairs(items):
        number += 1
        shorter = min(len(a.ids), len(b.ids))
        head = _equal_run(a.ids[:shorter], b.ids[:shorter])
        tail = _equal_run(a.ids[::-1][: shorter - head], b.ids[::-1][: shorter - head])
        # Tokens of the two that stand in no shared beginning or end.
        if len(a.ids) + len(b.ids) - 2 * (head + tail) <= NEAR * (len(a.ids) + len(b.ids)):
            near.append(item)
        within += head == shorter
        equal += 2 * int((a.scored[:head] & b.scored[:head]).sum())
        tokens += _scored(a, b)
    if not number:
        return findings
    if near:
        findings.append(
            Finding(
                "warning" if len(near) > 0.05 * number else "note",
                "nearly_identical",
                f"{len(near)} of {number} pairs differ in at most {percent(NEAR)} of their "
                f"tokens, first {near[0].where}: hardly any gradient, most of it on few tokens",
                "look at them (python -m saro_jax.data.inspect) and remove what is no real "
                "preference",
            )
        )
    if within:
        findings.append(
            Finding(
                "warning" if within > 0.05 * number else "note",
                "contained",
                f"in {within} of {number} pairs one answer is the beginning of the other: all its "
                "tokens are shared, and only the rest of the longer one has a gradient",
                "often both were cut: raise data.max_length",
            )
        )
    share = equal / max(tokens, 1)
    found = f"the two answers of a pair begin alike for {percent(share)} of their scored tokens"
    if share > 0.1:
        findings.append(
            Finding(
                "warning" if share > 0.5 else "note",
                "shared_beginning",
                f"{found}: these are computed twice and have no gradient",
                "move the shared beginning into the column prefix (a process pair)",
            )
        )
    else:
        findings.append(Finding("ok", "shared_beginning", found))
    return findings


def length_bias(items: Sequence[Item]) -> list[Finding]:
    """Whether length alone tells the chosen answer from the rejected one."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for item, chosen, rejected in _pairs(items):
        by_kind[item.kind].append(_scored(chosen) - _scored(rejected))
    gaps = np.array([gap for some in by_kind.values() for gap in some])
    if not len(gaps):
        return []
    shorter, unequal = int((gaps < 0).sum()), int((gaps != 0).sum())
    low, high = wilson(shorter, unequal)
    rule, right = ("shorter", shorter) if 2 * shorter >= unequal else ("longer", unequal - shorter)
    if rule == "longer":
        low, high = 1 - high, 1 - low
    side = "longer" if gaps.mean() >= 0 else "shorter"
    found = (
        f"the chosen answer is {abs(gaps.mean()):.0f} tokens {side} on average (median "
        f"{np.median(gaps):.0f})"
    )
    if len(by_kind) > 1:
        means = ", ".join(f"{kind} {np.mean(some):+.0f}" for kind, some in by_kind.items())
        found += f", by kind: {means}"
    if unequal:
        found += (
            f"; 'the {rule} one is chosen' is right in {percent(right / unequal)} of {unequal} "
            f"pairs (95 % interval {percent(low)} to {percent(high)})"
        )
    if unequal and low > 0.6:
        remedy = (
            "balance lengths between chosen and rejected or set srpo.length=mean or desensitised; "
            "else length is learnt"
        )
        return [Finding("warning", "length_bias", found, remedy)]
    return [Finding("note" if unequal and low > 0.5 else "ok", "length_bias", found)]


def labels(items: Sequence[Item]) -> list[Finding]:
    """Pairs that contradict each other, and the noise that the rows state."""
    findings = []
    first: dict[tuple[bytes, bytes], str] = {}  # where (chosen, rejected) stands
    for item, chosen, rejected in _pairs(items):
        first.setdefault((_digest(item.prefix, chosen.ids), _digest(item.prefix, rejected.ids)),
                         item.where)  # fmt: skip
    swapped = [((w, r), (r, w)) for w, r in first if w < r and (r, w) in first]
    both = {chosen for chosen, _ in first} & {rejected for _, rejected in first}
    both -= {text for pair, _ in swapped for text in pair}
    number = sum(1 for _ in _pairs(items))
    robust = "srpo.loss=robust with srpo.label_smoothing=that share, or a row's noise"
    if swapped:
        findings.append(
            Finding(
                "warning",
                "contradictions",
                f"{len(swapped)} pairs come twice with chosen and rejected swapped, first "
                f"{first[swapped[0][0]]} and {first[swapped[0][1]]}: at least "
                f"{percent(len(swapped) / number)} of {number} labels are wrong",
                f"decide or remove them; labels like these are noisy elsewhere too: {robust}",
            )
        )
    if both:
        findings.append(
            Finding(
                "note",
                "ranked",
                f"{len(both)} answers are chosen in one row and rejected in another "
                "of the same prompt",
                "right for ranked answers (best > middle > worst); else remove one of the rows",
            )
        )
    noise = [value for item in items if (value := item.noise) is not None]
    if noise:
        mean = float(np.mean(noise))
        findings.append(
            Finding(
                "warning" if mean > 0.3 else "note",
                "noise",
                f"{len(noise)} rows state a label noise, {percent(mean)} on average",
                "rows near 50 % teach nothing: remove them",
            )
        )
    if number and not findings:
        findings.append(Finding("ok", "labels", f"no contradiction among {number} pairs"))
    return findings


# ---- settings ------------------------------------------------------------------------------------


def plausible_rates(size: int, stage: str, lora: bool) -> tuple[float, float]:
    """Peak AdamW rates outside of which a run mostly learns nothing or breaks.

    A rule of thumb, no law: the usual rate of an 8B model (1e-5 for SFT, 5e-7 for DPO), larger for
    smaller models by the square root, ten times that for LoRA; a thirtieth to ten times of it.
    """
    usual = (1e-5 if stage == "rw" else 5e-7) * math.sqrt(8e9 / size) * (10 if lora else 1)
    return usual / 30, usual * 10


def hyperparameters(
    config: Config, stage: str, arch: Architecture, items: Sequence[Item], steps: int
) -> list[Finding]:
    """Rate, warm-up, epochs and batch."""
    if not items:
        return []
    findings = []
    optimizer, batch = config.optimizer, config.train.batch_rows
    size = parameters(arch)
    low, high = plausible_rates(size, stage, config.lora.rank > 0)
    rate = f"optimizer.learning_rate={optimizer.learning_rate:g}"
    what = f"{size / 1e6:.0f}M parameters{' with LoRA' if config.lora.rank else ''} ({stage})"
    usual = f"usual for {what}: {low:.0e} to {high:.0e}"
    if optimizer.name == "adamw" and not low <= optimizer.learning_rate <= high:
        side = "low: little will be learnt" if optimizer.learning_rate < low else "high: expect "
        side += "" if optimizer.learning_rate < low else "a loss that jumps and text that decays"
        remedy = f"{usual}; begin near {math.sqrt(low * high):.0e}"
        findings.append(Finding("warning", "learning_rate", f"{rate} is very {side}", remedy))
    elif optimizer.name == "adamw":
        findings.append(Finding("ok", "learning_rate", f"{rate}; {usual}"))
    warmup = round(optimizer.warmup_ratio * steps)
    if optimizer.warmup_ratio and warmup >= max(2, 0.5 * steps):
        findings.append(
            Finding(
                "warning",
                "warmup",
                f"{warmup} of {steps} steps warm up: the full learning rate is hardly used",
                "lower optimizer.warmup_ratio (0.03 to 0.1 is usual) or train longer",
            )
        )
    epochs = steps * batch / len(items)
    usual_epochs = 2 if stage == "srpo" else 5
    if epochs > usual_epochs + batch / len(items):  # the last step may reach into the next pass
        why = (
            "margins then grow by memorising, while log-probs of chosen answers fall"
            if stage == "srpo"
            else "rows are then memorised"
        )
        findings.append(
            Finding(
                "warning" if stage == "srpo" else "note",
                "epochs",
                f"{epochs:.1f} passes over {len(items)} rows: {why}",
                f"train.epochs of at most {usual_epochs}, or more rows; data.eval shows when it "
                "stops helping",
            )
        )
    tokens = sum(_scored(*item.branches) for item in items) / len(items) * batch
    if stage == "srpo" and batch < SMALL_PAIR_BATCH:
        findings.append(
            Finding(
                "note",
                "batch",
                f"{batch} pairs a step: the direction of a step is mostly noise",
                "train.batch_rows of 16 to 128; memory does not depend on it",
            )
        )
    elif stage == "rw" and tokens < SMALL_BATCH_TOKENS:
        findings.append(
            Finding(
                "note",
                "batch",
                f"{tokens:.0f} scored tokens a step: the direction of a step is mostly noise",
                "raise train.batch_rows; memory does not depend on it",
            )
        )
    else:
        findings.append(Finding("ok", "batch", f"{batch} rows, {tokens:.0f} scored tokens a step"))
    if steps < 10:
        found = f"the run has {steps} steps: the optimizer hardly gets going"
        remedy = "more rows, a smaller train.batch_rows or more train.epochs"
        findings.append(Finding("note", "steps", found, remedy))
    return findings


def packing(config: Config, items: Sequence[Item], shape: Shape, steps: int) -> list[Finding]:
    """How full the packed rows are, and which shapes are compiled."""
    if not items:
        return []
    rows_of = pipeline.plan(
        items,
        batch_rows=config.train.batch_rows,
        shape=shape,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.pack_window,
    )
    epoch = math.ceil(len(items) / config.train.batch_rows)
    looked = min(steps, epoch, LOOKED_AT)
    real, computed, shapes = 0, 0, Counter()
    for k in range(looked):
        step = rows_of(k)
        real += sum(laid_out_length(items[i], shape.layout) for row in step for i in row)
        for block in blocks(items, step, shape, own=np.zeros(shape.rows, np.bool_)):
            computed += block.tokens.size
            shapes[block.tokens.shape] += 1
    full = real / max(computed, 1)
    found = (
        f"{percent(full)} of the computed tokens are no padding, "
        f"{shapes.total() / looked:.1f} passes a step (first {looked} steps)"
    )
    findings = [Finding("ok", "packing", found)]
    if full < 0.75:
        smaller = "train.micro_rows=1, " if shape.rows > 1 else ""
        findings = [
            Finding(
                "note" if full > 0.5 else "warning",
                "packing",
                found,
                f"{smaller}more data.row_buckets, a longer data.row_length or a larger "
                "train.batch_rows fill rows better",
            )
        ]
    listed = ", ".join(f"{b} x {t}" for b, t in sorted(shapes))
    found = f"programs for {len(shapes)} shapes (rows x tokens): {listed}"
    findings.append(Finding("ok", "compile", found))
    return findings


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right of `of`; (0, 1) where there is nothing."""
    if of == 0:
        return 0.0, 1.0
    share = right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


# ---- small things --------------------------------------------------------------------------------


def _parts(item: Item) -> list[np.ndarray]:
    return [item.prefix, *(branch.ids for branch in item.branches)]


def _scored(*branches: Branch) -> int:
    return sum(int(branch.scored.sum()) for branch in branches)


def _digest(*ids: np.ndarray) -> bytes:
    return hashlib.blake2b(b"".join(part.tobytes() for part in ids), digest_size=16).digest()


def _equal_run(a: np.ndarray, b: np.ndarray) -> int:
    """How many first entries two arrays of one length share."""
    parted = np.flatnonzero(a != b)
    return int(parted[0]) if len(parted) else len(a)


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
