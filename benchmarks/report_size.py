"""How heavy a report is, and how fast it opens: MODELS x PROMPTS transcripts in headless Chromium.

The transcripts are made up, or the responses of --rows (JSON lines of question, response); their
folders and the report lie in --out afterwards.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import chromium
import report_folders

from saro_jax import report

READY = "document.documentElement.dataset.ready === 'yes'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--rows", type=Path, help="real responses, such as STAR-1's")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/report_size"))
    args = parser.parse_args()
    names = ["base", "rw", "srpo", *(f"other-{i}" for i in range(1, args.models - 2))]
    rows = None
    if args.rows:
        rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    made = report_folders.transcripts(names[: args.models], args.prompts, rows=rows)
    folder = args.out / f"{args.models}x{args.prompts}{'_rows' * bool(rows)}"
    report_folders.write_evaluation(folder / "evaluation", made)
    texts = sum(len(one.prompt) + len(one.reasoning) + len(one.answer) for one in made)
    start = time.perf_counter()
    page = report.run([folder / "evaluation"], folder / "report")
    wrote = time.perf_counter() - start
    seconds = []
    if chromium.find() is not None:
        for _ in range(5):  # a new browser each time: nothing is in a cache
            with chromium.Chromium() as browser:
                seconds.append(browser.open(page, READY))
    print(f"| transcripts | text, MB | page, MB | written in, s | opens in, s |\n{'|---' * 5}|")
    opened = f"{statistics.median(seconds):.2f} (worst {max(seconds):.2f})" if seconds else "-"
    print(
        f"| {args.models} x {args.prompts:,} | {texts / 1e6:.1f} | "
        f"{page.stat().st_size / 1e6:.2f} | {wrote:.1f} | {opened} |"
    )


if __name__ == "__main__":
    main()
