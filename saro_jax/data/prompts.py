"""The prompt pool: requests of four kinds, labelled, wrapped, split and decontaminated."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro_jax.data import decontamination
from saro_jax.data.shares import allotted
from saro_jax.data.sources import raw_records
from saro_jax.records import KINDS, Attack, Input, Prompt, Reject, prompt_id, sha256, to_json
from saro_jax.text import reasoning, wrappers
from saro_jax.text.policy import NO_CATEGORY, Policy, from_label

# Fields of a prompt that a column can give, and the columns looked for, in this order.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "instruction", "problem", "text", "goal"),
    "kind": ("kind",),
    "categories": ("categories", "cats", "category"),
    "answer": ("answer", "response", "completion", "solution", "output"),
    "base_id": ("base_id",),
    "id": ("id",),
    "license": ("license",),
    "lang": ("lang",),
}
HARMFUL = ("harmful", "jailbreak")


@dataclass(frozen=True)
class Source:
    """A source of prompts; `kind` is that of all its rows, None where they say it themselves.

    `limit` is how many of its prompts are drawn, None all.
    """

    kind: str | None
    name: str
    limit: int | None = None


def sources(given: Sequence[str], option: str) -> list[Source]:
    """Sources of texts like "prompts.jsonl", "benign=gsm8k.jsonl" or "benign=gsm8k.jsonl@200"."""
    found = []
    for text in given:
        whole, at, rows = text.rpartition("@")
        limit = int(rows) if at and rows.isdecimal() else None
        if limit == 0:
            raise ValueError(f"{option}={text}: expected at least 1 row after @")
        kind, equals, name = (text if limit is None else whole).partition("=")
        if equals and kind in KINDS:
            found.append(Source(kind, name, limit))
        elif equals and re.fullmatch(r"\w+", kind):
            raise ValueError(
                f"{option}={text}: expected {' or '.join(KINDS)} before =, got {kind!r}"
            )
        else:
            found.append(Source(None, text if limit is None else whole, limit))
    return found


def column_map(given: Sequence[str], option: str) -> dict[str, tuple[str, ...]]:
    """COLUMNS with those of texts like "prompt=question" in their place."""
    found = dict(COLUMNS)
    for text in given:
        field, equals, column = text.partition("=")
        if not equals or field not in COLUMNS or not column:
            raise ValueError(
                f"{option}={text}: expected FIELD=COLUMN, FIELD one of {', '.join(COLUMNS)}"
            )
        found[field] = (column,)
    return found


def read(
    given: Sequence[Source],
    columns: Mapping[str, tuple[str, ...]],
    policy: Policy,
    split: str,
    seed: int = 0,
) -> tuple[list[Prompt], list[Reject], list[Input]]:
    """All prompts of the sources in order, the rows that are none, and what was read.

    A source with a limit gives as many prompts, drawn by the seed; the others are rejects.

    The same text twice is one prompt. Categories are ids of the policy or names of a taxonomy that
    it maps; a label that means nothing lowers label_conf to 0.5. Answers are kept for harmless
    prompts only, taken out of their reasoning.
    """
    prompts: dict[str, Prompt] = {}
    rejects: list[Reject] = []
    inputs: list[Input] = []
    for source in given:
        digest, count = hashlib.sha256(), 0
        mine: list[Prompt] = []
        for where, record in raw_records(source.name, split):
            count += 1
            try:
                if isinstance(record, str):
                    digest.update(record.encode("utf-8", "backslashreplace"))
                    raise ValueError(record)
                digest.update(to_json(record).encode("utf-8", "backslashreplace"))
                prompt = _prompt(record, source, columns, policy, count)
                if prompt.id in prompts:
                    first = prompts[prompt.id]
                    raise ValueError(f"duplicate prompt: of {first.source} {first.source_id}")
            except ValueError as error:
                rejects.append(Reject(f"{source.name}:{count}", str(error), _short(where)))
                continue
            prompts[prompt.id] = prompt
            mine.append(prompt)
        if not count:
            raise ValueError(f"{source.name}: no rows")
        inputs.append(Input(source.name, count, digest.hexdigest(), _local(source.name)))
        _resolve_bases(mine, prompts)
        if source.limit is not None:
            mine.sort(key=lambda one: _draw(seed, "limit", one.id))
            for one in mine[source.limit :]:
                rejects.append(Reject(one.id, "not drawn", f"{source.name}@{source.limit}"))
                del prompts[one.id]
    return list(prompts.values()), rejects, inputs


def texts(
    source: str, columns: Mapping[str, tuple[str, ...]], split: str
) -> tuple[list[str], Input]:
    """The prompts of an evaluation set as texts; a row without one is an error."""
    found = []
    digest = hashlib.sha256()
    for where, record in raw_records(source, split):
        if isinstance(record, str):
            raise ValueError(f"{where}: {record}")
        digest.update(to_json(record).encode("utf-8", "backslashreplace"))
        text = _text_of(_value(record, columns["prompt"]))
        if text is None:
            raise ValueError(f"{where}: no prompt: looked for {', '.join(columns['prompt'])}")
        found.append(text)
    if not found:
        raise ValueError(f"{source}: no rows")
    return found, Input(source, len(found), digest.hexdigest(), _local(source))


def unduplicated(prompts: Sequence[Prompt], threshold: float) -> tuple[list[Prompt], list[Reject]]:
    """Without near duplicates of the same kind; 1 keeps them."""
    if threshold >= 1:
        return list(prompts), []
    dropped: dict[str, Reject] = {}
    for kind in KINDS:
        group = [prompt for prompt in prompts if prompt.kind == kind and prompt.attack is None]
        same = decontamination.near_duplicates([one.text for one in group], threshold)
        for later, earlier in same.items():
            reason = f"near duplicate: of {group[earlier].id}"
            dropped[group[later].id] = Reject(group[later].id, reason)
    return [one for one in prompts if one.id not in dropped], list(dropped.values())


def split_groups(prompts: Sequence[Prompt], dev_share: float, seed: int) -> list[Prompt]:
    """With train or dev by group: a request, what is based on it and its twins stay together."""
    return [
        prompt.model_copy(
            update={"split": "dev" if _draw(seed, "split", group(prompt)) < dev_share else "train"}
        )
        for prompt in prompts
    ]


def group(prompt: Prompt) -> str:
    """What ties a request to the disguises and twins made of it."""
    return prompt.base_id or prompt.id


def wrapped(prompts: Sequence[Prompt], shares: Mapping[str, float], seed: int) -> list[Prompt]:
    """Disguised prompts made of clean ones: `shares` says how many per prompt of each kind.

    Harmful ones become jailbreaks, benign and borderline ones borderline. Train prompts get the
    training families, others the held-out ones.
    """
    found = []
    for prompt in prompts:
        share = shares.get(prompt.kind, 0.0)
        if prompt.attack is not None or prompt.kind == "jailbreak" or not share:
            continue
        count = int(share) + (_draw(seed, "wrap", prompt.id) < share % 1)
        rng = random.Random(f"{seed}:wrappers:{prompt.id}")
        for one in wrappers.choose(count, held_out=prompt.split != "train", rng=rng):
            text = one.around(prompt.text)
            found.append(
                prompt.model_copy(
                    update={
                        "id": prompt_id(text),
                        "parent_ids": (prompt.id,),
                        "text": text,
                        "kind": "jailbreak" if prompt.kind == "harmful" else "borderline",
                        "base_id": prompt.base_id or prompt.id,
                        "attack": Attack(name=one.family, template_id=one.id),
                    }
                )
            )
    return found


def mixed(
    prompts: Sequence[Prompt], size: int, shares: Mapping[str, float], dev_share: float, seed: int
) -> tuple[list[Prompt], list[Reject]]:
    """`size` prompts in those shares by kind, drawn by seed; the rest are rejects.

    `dev_share` of them are of the held-out split, in the same shares. What a kind lacks the others
    give.
    """
    held_out = round(size * dev_share)
    keep: set[str] = set()
    for split, wanted in (("train", size - held_out), ("dev", held_out)):
        mine = {
            kind: [one.id for one in prompts if (one.kind, one.split) == (kind, split)]
            for kind in KINDS
        }
        room = allotted({kind: len(ids) for kind, ids in mine.items()}, shares, wanted)
        for kind, ids in mine.items():
            keep |= set(sorted(ids, key=lambda name: _draw(seed, "mix", name))[: room[kind]])
    kept = [one for one in prompts if one.id in keep]
    return kept, [Reject(one.id, "not in the mix") for one in prompts if one.id not in keep]


def drawn(prompts: Sequence[Prompt], limit: int, seed: int) -> list[Prompt]:
    """At most `limit` prompts, drawn by seed, in their order; each kind in its share of them all.

    A kind has at least one where there is room. What a smaller limit draws a larger one draws too.
    """
    places: dict[str, tuple[float, int]] = {}
    for number, kind in enumerate(KINDS):
        ids = sorted(
            (one.id for one in prompts if one.kind == kind),
            key=lambda name: _draw(seed, "limit", name),
        )
        places |= {name: (rank / len(ids), number) for rank, name in enumerate(ids)}
    keep = set(sorted(places, key=lambda name: places[name])[:limit])
    return [one for one in prompts if one.id in keep]


def decontaminated(
    prompts: Sequence[Prompt],
    evaluation: Mapping[str, Sequence[str]],
    *,
    ngram: int,
    tfidf: float,
    embed: decontamination.Embed | None = None,
) -> tuple[list[Prompt], list[Reject], dict[str, Any]]:
    """Prompts of groups without a hit in any evaluation set, the rest, and a report.

    The report counts, for each set, its texts and the prompts that hit it by method, and lists the
    hits. One hit drops the whole group: a disguise of an evaluation prompt is one too.
    """
    report: dict[str, Any] = {}
    bad: dict[str, str] = {}
    for name, held_out in evaluation.items():
        found = decontamination.hits(
            [one.text for one in prompts], held_out, ngram=ngram, tfidf=tfidf, embed=embed
        )
        counts = Counter(hit.method for hit in found)
        report[name] = {
            "texts": len(held_out),
            "hits": {method: counts.get(method, 0) for method in decontamination.METHODS},
            "list": [
                {
                    "id": prompts[hit.text].id,
                    "text": prompts[hit.text].text,
                    "evaluation_row": hit.evaluation + 1,
                    "evaluation_text": held_out[hit.evaluation],
                    "method": hit.method,
                    "score": hit.score,
                }
                for hit in found
            ],
        }
        for hit in found:
            reason = f"contaminated: {hit.method} hit in row {hit.evaluation + 1} of {name}"
            bad.setdefault(group(prompts[hit.text]), reason)
    rejects = [Reject(one.id, bad[group(one)]) for one in prompts if group(one) in bad]
    return [one for one in prompts if group(one) not in bad], rejects, report


# ---- one row -------------------------------------------------------------------------------------


def _prompt(
    record: dict[str, Any],
    source: Source,
    columns: Mapping[str, tuple[str, ...]],
    policy: Policy,
    number: int,
) -> Prompt:
    text = _text_of(_value(record, columns["prompt"]))
    if text is None:
        raise ValueError(f"no prompt: looked for the columns {', '.join(columns['prompt'])}")
    kind = source.kind or _value(record, columns["kind"])
    if kind not in KINDS:
        raise ValueError(f"no kind: got {kind!r}, expected {' or '.join(KINDS)}")
    labels = _labels(_value(record, columns["categories"]))
    categories: dict[str, None] = {}
    confidence = 1.0 if labels or kind == "benign" else 0.0
    for label in labels:
        found = from_label(policy, label)
        confidence = confidence if found else 0.5
        categories |= dict.fromkeys(found[:1])
    if not categories and kind == "benign":
        categories = {NO_CATEGORY: None} if NO_CATEGORY in policy.categories else {}
    meta: dict[str, Any] = {}
    if kind not in HARMFUL:
        meta |= _answer(_value(record, columns["answer"]))
    base = _value(record, columns["base_id"])
    return Prompt(
        id=prompt_id(text),
        meta=meta,
        text=text,
        source=source.name,
        source_id=str(_value(record, columns["id"]) or number),
        license=str(_value(record, columns["license"]) or ""),
        kind=kind,
        base_id=None if base is None else str(base),
        categories=tuple(categories),
        label_conf=confidence,
        lang=str(_value(record, columns["lang"]) or "en"),
        policy_version=policy.version,
    )


def _value(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text_of(value: Any) -> str | None:
    """A text, or that of the only user turn of a conversation."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content") if value[0].get("role") == "user" else None
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value.strip()


def _labels(value: Any) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in re.split(r"[;|]", value) if part.strip()]
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    return []


def _answer(value: Any) -> dict[str, str]:
    """{answer} of a row's answer; of worked solutions ("... #### 72") {answer, solution, final}."""
    text = _text_of(value)
    if text is None:
        return {}
    text = reasoning.parse(text).answer or text
    worked, marker, final = text.rpartition("####")
    if not marker:
        return {"answer": text}
    worked = re.sub(r"<<[^>]*>>", "", worked).strip()
    final = final.strip()
    return {"answer": f"The answer is {final}.", "solution": worked, "final": final}


def _resolve_bases(mine: Sequence[Prompt], prompts: dict[str, Prompt]) -> None:
    """base_id by the ids of the source's own rows becomes the id of the prompt."""
    own = {one.source_id: one.id for one in mine}
    for one in mine:
        if one.base_id is not None:
            base = own.get(one.base_id, f"{one.source}:{one.base_id}")
            prompts[one.id] = one.model_copy(update={"base_id": base})


def _draw(seed: int, *names: str) -> float:
    """A number in [0, 1) that follows from seed and names."""
    return int(sha256(":".join([str(seed), *names]))[:13], 16) / 16**13


def _local(source: str) -> Path | None:
    path = Path(source).expanduser()
    return path if path.is_file() else None


def _short(where: str) -> str:
    """file:line without the folders, which differ between machines."""
    return re.split(r"[/\\]", where)[-1]
