"""The README's picture: the plane of safety and over-refusal of a report, as a PNG for GitHub.

    python benchmarks/report_picture.py runs/mine/report docs/images/plane.png

Taken by headless Chromium from the report's page; --selector names another part of it.
"""

import argparse
from pathlib import Path

import chromium


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="folder of a report")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--selector", default="#summary figure")
    args = parser.parse_args()
    with chromium.Chromium() as browser:
        browser.size(860, 900, 2.0)  # two columns of figures, at twice the pixels
        browser.open(args.report / "index.html", "document.readyState === 'complete'")
        browser.picture(args.picture, of=args.selector)
    print(f"{args.picture} ({args.picture.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
