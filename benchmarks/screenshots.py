"""Pictures of reports for docs/, by a real Chromium: upper parts, as wide as a phone and a desk.

Each is smaller than 300 kB, of a page that overflows nowhere and says nothing to the console.

    python benchmarks/screenshots.py demo=runs/demo goodbooks=runs/goodbooks --out docs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {390: 1700, 1280: 1800}  # width: height, at most
MOST_BYTES = 300_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="NAME=RUN_FOLDER with a report.html")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    asked = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / "tests"))
    import browser

    if browser.find() is None:
        sys.exit("no Chromium on PATH; name one: USERIP_FAST_CHROMIUM=...")
    with browser.Browser() as chromium:
        for name, _, run in (r.partition("=") for r in asked.runs):
            for width, height in SIZES.items():
                tab = chromium.open(Path(run) / "report.html", width)
                over = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
                if over or tab.complaints():
                    sys.exit(f"{run} at {width} pixels: {over} too wide, {tab.complaints()}")
                path = asked.out / f"report-{name}-{width}.png"
                picture = tab.picture(height)
                if len(picture) > MOST_BYTES:
                    sys.exit(f"{path}: {len(picture):,} bytes")
                path.write_bytes(picture)
                print(f"{path}: {len(picture):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
