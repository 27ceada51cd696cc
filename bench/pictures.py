"""Pictures of a run's report at two widths, for docs/img: five views of a real Chromium. Needs playwright (extra `browser`), a
chromium on the PATH and a run with a report; measures nothing."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

VIEWS = {
    "headline": "#short",
    "scatter": "#explore",
    "sources": "#all-figure",
    "layers": "#layers-figure",
    "completions": "#completions",
}
SIZES = {1280: 800, 390: 780}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("run", type=Path)
    made.add_argument("--out", type=Path, default=Path("docs/img"))
    made.add_argument("--source", help="whom the scatter is of")
    made.add_argument("--persona", help="whose completions are shown")
    options = made.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    page_of = options.run / "report.html"
    if chromium is None or not page_of.is_file():
        sys.exit(f"needed: a chromium on the PATH ({chromium}) and {page_of} (leakfast report RUN)")
    from PIL import Image  # matplotlib brings it
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, height in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(page_of.resolve().as_uri())
            page.wait_for_selector("html[data-ready='all']", state="attached", timeout=60_000)
            for control, words in (("c-adapter", options.source), ("c-persona", options.persona)):
                if words:
                    page.select_option(f"#{control}", label=words.replace("_", " "))
            for name, place in VIEWS.items():
                if (
                    name == "completions"
                    and page.locator("#explore button", has_text="Its completions").count()
                ):
                    page.locator("#explore button", has_text="Its completions").first.click()
                page.locator(place).evaluate("place => place.scrollIntoView({block: 'start'})")
                page.wait_for_timeout(300)
                path = options.out / f"report-{name}-{width}.png"
                page.screenshot(path=path)
                Image.open(path).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(
                    path, optimize=True
                )
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
