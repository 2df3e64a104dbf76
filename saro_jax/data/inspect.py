"""Shows rows as the model will see them: text, prefix, scored tokens, cuts and rejects."""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from saro_jax.data import rows as rows_file
from saro_jax.data.rows import Reject
from saro_jax.data.tokenise import Branch, Item, tokenise
from saro_jax.text import chat

STYLES = {"prefix": "cyan", "given": "dim", "scored": "bold green"}
# Around scored text where there are no colours.
SCORED_MARKS = ("⟦", "⟧")


def show(item: Item, tokenizer: Any, console: Console, limit: int | None = None) -> None:
    """Prints one item: prefix and branches, scored tokens coloured (without colour: in ⟦ ⟧).

    limit: of a longer stretch of tokens only half as many from its start and its end are shown.
    """
    console.rule()
    console.print(Text(f"{item.id}  {item.where}  {item.kind}  weight {item.weight:g}"))
    names = item_names(len(item.branches))
    if len(item.branches) > 1:
        console.print(Text(f"prefix: {len(item.prefix)} tokens"))
        console.print(_text(tokenizer, item.prefix, "prefix", console, limit))
    for name, branch in zip(names, item.branches, strict=True):
        scored = int(branch.scored.sum())
        console.print(Text(f"{name or 'conversation'}: {len(branch.ids)} tokens, {scored} scored"))
        console.print(_branch_text(tokenizer, branch, console, limit))


def item_names(branches: int) -> tuple[str, ...]:
    """What the branches of an item are called."""
    if branches == 1:
        return ("",)
    return (
        ("chosen", "rejected") if branches == 2 else tuple(f"sample {k}" for k in range(branches))
    )


def summary(items: Sequence[Item], rejects: Sequence[Reject]) -> str:
    """Counts, lengths and the reasons of rejects, as lines."""
    lines = [f"{len(items) + len(rejects)} rows: {len(items)} used, {len(rejects)} rejected"]
    if items:
        lengths = [len(item.prefix) + len(b.ids) for item in items for b in item.branches]
        scored = [int(branch.scored.sum()) for item in items for branch in item.branches]
        truncated = sum(any(branch.truncated for branch in item.branches) for item in items)
        lines += [
            f"tokens of a sequence: {_spread(lengths)}",
            f"scored tokens:        {_spread(scored)}, {sum(scored)} in all",
            f"truncated:            {truncated} rows",
        ]
        kinds = sorted({item.kind for item in items})
        counts = (f"{kind} {sum(item.kind == kind for item in items)}" for kind in kinds)
        lines.append(f"kinds:                {', '.join(counts)}")
    for category, count in rows_file.most_frequent(rejects):
        first = next(r for r in rejects if r.reason.split(":")[0] == category)
        lines.append(f"rejected {count}: {category}, first {first.where}: {first.reason}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m saro_jax.data.inspect ROWS --model PATH`; errors exit with one line."""
    args = _arguments(argv)
    # In a terminal rich colours by itself; elsewhere, or with --no-color, the marks say it.
    console = Console(no_color=args.no_color, highlight=False, soft_wrap=True)
    try:
        from saro_jax.models import hub

        tokenizer = chat.load_tokenizer(hub.resolve(args.model), args.chat_template)
        kind = args.kind
        if kind == "auto":
            kind = rows_file.detect_kind(args.rows, args.split)
        rows, unread = rows_file.read(args.rows, kind, args.split)
        items, refused = tokenise(rows, tokenizer, args.max_length, args.too_long, args.workers)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for item in items[: args.n]:
        show(item, tokenizer, console)
    console.rule(Text(f"{kind} rows, max_length {args.max_length}"))
    console.print(Text(summary(items, [*unread, *refused])))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m saro_jax.data.inspect",
        description="Shows rows as tokens: what is given, what is scored, what is cut or rejected.",
    )
    parser.add_argument("rows", nargs="+", help="files, folders, hub ids or quickstart:NAME")
    parser.add_argument(
        "--model", required=True, help="model folder, .gguf file, hub id or quickstart"
    )
    parser.add_argument("--n", type=int, default=3, help="examples to show (3)")
    parser.add_argument(
        "--kind", choices=("auto", "sft", "preference", "unpaired", "samples"), default="auto"
    )
    parser.add_argument("--max-length", type=int, default=1024, help="as data.max_length (1024)")
    parser.add_argument("--too-long", choices=("truncate", "reject"), default="truncate")
    parser.add_argument("--split", default="train", help="split of a hub id or folder (train)")
    parser.add_argument("--chat-template", help="jinja file that replaces the tokenizer's template")
    parser.add_argument("--workers", type=int, default=0, help="tokenising processes (0: this one)")
    parser.add_argument("--no-color", action="store_true", help="mark scored text as ⟦text⟧")
    return parser.parse_args(argv)


def _branch_text(tokenizer: Any, branch: Branch, console: Console, limit: int | None) -> Text:
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(branch.scored)) + 1).tolist(), len(branch.ids)]
    for start, end in pairwise(edges):
        style = "scored" if branch.scored[start] else "given"
        text.append_text(_text(tokenizer, branch.ids[start:end], style, console, limit))
    if branch.truncated:
        text.append(" … [truncated: no end of turn]", style="bold red")
    return text


def _text(tokenizer: Any, ids: np.ndarray, style: str, console: Console, limit: int | None) -> Text:
    parts = [ids]
    if limit is not None and len(ids) > limit:
        parts = [ids[: limit // 2], ids[len(ids) - limit // 2 :]]
    shown = " [...] ".join(
        tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts
    )
    if style == "scored" and (console.no_color or not console.is_terminal):
        shown = shown.join(SCORED_MARKS)
    return Text(shown, style=STYLES[style])


def _spread(numbers: Sequence[int]) -> str:
    low, middle, high = np.min(numbers), np.median(numbers), np.max(numbers)
    return f"{low} to {high}, median {middle:g}"


if __name__ == "__main__":
    main()
