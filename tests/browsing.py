"""A real Chromium for tests of pages, and what a page may not do while it is looked at. Needs playwright (extra
`browser`) and a chromium on the PATH; says which is missing otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not here: pip install '.[browser]'"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Watched:
    """A page with everything that went wrong on it: console errors, exceptions, dialogs, requests to elsewhere."""

    def __init__(
        self, found: Any, url: str, *, width: int = 1280, height: int = 900, **settings: Any
    ) -> None:
        self.page = found.new_page(viewport={"width": width, "height": height}, **settings)
        self.faults: list[str] = []
        self.page.on("console", lambda one: self._note("console", one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda one: self._note("exception", str(one)))
        self.page.on("dialog", self._dialog)
        self.page.on(
            "request", lambda one: self._note("request", one.url) if self._is_foreign(one.url, url) else None
        )
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready='all']", state="attached", timeout=60_000)

    @staticmethod
    def _is_foreign(url: str, own: str) -> bool:
        return not url.startswith((own.split("#")[0], "data:", "blob:"))

    def _note(self, kind: str, text: str) -> None:
        self.faults.append(f"{kind}: {text[:300]}")

    def _dialog(self, dialog: Any) -> None:
        self._note("dialog", dialog.message)
        dialog.dismiss()

    def choose(self, label: str, value: str) -> None:
        self.page.select_option(f"#{label}", value=value)

    def found(self) -> int:
        """How many completions the filters leave, as the page says."""
        return int(self.page.inner_text("#found").split(" ")[0].replace(",", ""))
