"""A pytest plugin (-p _pytest_rows): every test's outcome is a row of a GPU run the moment it is known. Does nothing
where no file of rows is named; prints nothing."""

from __future__ import annotations

from typing import Any

import _rows


def pytest_runtest_logreport(report: Any) -> None:
    """One row a test: of its call, or of the set-up that skipped or broke it."""
    if report.when != "call" and report.outcome == "passed":
        return
    row = {"bench": "tests", "partial": 1, "test": report.nodeid, "outcome": report.outcome}
    if report.outcome == "skipped":
        row["why"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
    if report.outcome == "failed":
        row["why"] = report.longreprtext.strip().splitlines()[-1][: _rows.MOST_CHARACTERS]
    _rows.told(_rows.line_of({**row, "s": round(report.duration, 1)}))
