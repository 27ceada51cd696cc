"""The page's own scripts and styles, and the Content-Security-Policy that lets these run and nothing else. Demands the
files of report/assets; knows nothing of a run."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

ASSETS = Path(__file__).with_name("assets")
# in the order in which they run
_SCRIPTS = (
    "vendor/d3.min.js",
    "vendor/plot.umd.min.js",
    "base.js",
    "scatter.js",
    "curves.js",
    "matrix.js",
    "who.js",
    "completions.js",
    "main.js",
)
_SERVED = "served.js"  # before the last: of a page that is served while its run fills
# the style element that Observable Plot 0.6.17 puts into every chart (its src/plot.js), for the class name `lf`
_PLOT_STYLE = """:where(.lf) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.lf text),
:where(.lf tspan) {
  white-space: pre;
}"""


@cache
def scripts(served: bool = False) -> tuple[str, ...]:
    """Texts of the scripts. Raises ValueError where one could end its own element."""
    names = (*_SCRIPTS[:-1], _SERVED, _SCRIPTS[-1]) if served else _SCRIPTS
    texts = tuple((ASSETS / name).read_text(encoding="utf-8") for name in names)
    for name, text in zip(names, texts, strict=True):
        if "</script" in text.lower() or "<!--" in text:
            raise ValueError(f"{name}: holds text that an HTML parser reads as the end of a script")
    return texts


@cache
def css() -> str:
    return (ASSETS / "page.css").read_text(encoding="utf-8")


def policy(*, served: bool = False) -> str:
    """The Content-Security-Policy of the page: its scripts and styles by their hash, pictures as data, no network; one
    that is served may ask its own server for more."""
    connect = "'self'" if served else "'none'"
    run = " ".join(_hash(text) for text in scripts(served))
    look = " ".join(_hash(text) for text in (css(), _PLOT_STYLE))
    return (
        f"default-src 'none'; script-src {run}; style-src {look}; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
