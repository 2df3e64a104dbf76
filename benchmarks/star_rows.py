"""The rows of train_cpu.py: STAR-1 rows as examples, process pairs and outcome pairs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

# The row kinds: the stage that trains them.
KINDS = {"rw": "rw", "process": "srpo", "outcome": "srpo"}


class Rows(NamedTuple):
    """The files of one row kind: texts, and the token ids that saro_jax makes of them."""

    texts: Path
    tokens: Path


def prepare(
    source: Path, model: str, wanted: int, max_length: int, out: Path
) -> tuple[dict[str, Rows], Path, str]:
    """Write `wanted` rows of each kind; their files, the model's folder, a line about them."""
    from saro_jax.data.rows import read
    from saro_jax.data.tokenise import RowError, tokenise_row
    from saro_jax.models.hub import resolve
    from saro_jax.text.chat import load_tokenizer

    if not source.is_file():
        raise ValueError(f"--rows={source}: no such file of question and response lines")
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    try:
        rows = [(line["question"], line["response"]) for line in lines]
    except (KeyError, TypeError):
        raise ValueError(f"--rows={source}: every line needs question and response") from None
    made = make_rows(rows)
    items: dict[str, list[Any]] = {}
    for kind, lines in made.items():
        file = out / f"{kind}.jsonl"
        write_lines(file, lines)
        items[kind] = []
        for row in read(str(file), "sft" if kind == "rw" else "preference")[0]:
            try:
                items[kind].append(tokenise_row(row, tokenizer, max_length))
            except RowError:
                items[kind].append(None)
    # A pair whose prompt and shared half fill max_length has nothing left to compare. All kinds
    # are made of the same rows of the file.
    kept = [k for k in range(len(rows)) if all(items[kind][k] for kind in KINDS)][:wanted]
    if len(kept) < wanted:
        raise ValueError(
            f"--rows={source}: {len(kept)} usable rows, needs --warmup x --batch = {wanted}"
        )
    files, parts = {}, []
    for kind in KINDS:
        files[kind] = Rows(out / f"{kind}.jsonl", out / f"{kind}.tokens.jsonl")
        write_lines(files[kind].texts, [made[kind][k] for k in kept])
        some = [items[kind][k] for k in kept]
        write_lines(files[kind].tokens, [as_lists(item) for item in some])
        tokens = sum(len(i.prefix) + len(branch.ids) for i in some for branch in i.branches)
        shared = sum(2 * len(i.prefix) for i in some) / tokens
        length = tokens / wanted / (1 if kind == "rw" else 2)
        parts.append(
            f"{kind} {length:.0f} tokens a sequence" + (f", {shared:.0%} shared" * (kind != "rw"))
        )
    return files, folder, f"{wanted} rows of {source.name} ({'; '.join(parts)})"


def make_rows(rows: list[tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each kind, in the order of the file."""

    def says(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    halves = [middle_of_reasoning(response) for _, response in rows]
    by_length = sorted(range(len(rows)), key=lambda k: (len(rows[k][1]), k))
    longer = dict(zip(by_length, [*by_length[1:], by_length[0]], strict=True))
    made: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for k, (question, response) in enumerate(rows):
        prompt, following = {"prompt": says("user", question)}, (k + 1) % len(rows)
        made["rw"].append(prompt | {"completion": says("assistant", response)})
        made["process"].append(
            prompt
            | {
                "prefix": response[: halves[k]],
                "chosen": says("assistant", response[halves[k] :]),
                "rejected": says("assistant", rows[following][1][halves[following] :]),
            }
        )
        made["outcome"].append(
            prompt
            | {
                "chosen": says("assistant", response),
                "rejected": says("assistant", rows[longer[k]][1]),
            }
        )
    return made


def middle_of_reasoning(response: str) -> int:
    """The character behind the last word of the first half of the text in <think>...</think>."""
    start = response.find("<think>") + len("<think>") if "<think>" in response else 0
    end = response.find("</think>") if "</think>" in response else len(response)
    middle = (start + end) // 2
    space = response.rfind(" ", start, middle)
    return space if space > 0 else middle


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_lists(item: Any) -> dict[str, Any]:
    """A tokenised row as JSON: the ids of the prefix, ids and mask of each branch."""
    branches = [
        {"ids": branch.ids.tolist(), "scored": branch.scored.astype(int).tolist()}
        for branch in item.branches
    ]
    return {"prefix": item.prefix.tolist(), "branches": branches}
