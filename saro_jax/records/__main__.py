"""The command that prints what a record goes back to.

`python -m saro_jax.records --file=pairs.jsonl --id=ID` prints prompts, models with their hashes,
policy versions and stages.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from saro_jax.config import Flag, parse_command_line
from saro_jax.records.origins import lineage


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: the lineage of one record as JSON; returns the exit code."""
    flags = [
        Flag("file", "shard that holds the record", parse=Path, required=True),
        Flag("id", "the record's id", required=True),
    ]
    try:
        args = parse_command_line("python -m saro_jax.records", __doc__, argv, flags, False)
        found = lineage(args.id, args.file)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
