"""The local server that speaks every judge's protocol."""

from __future__ import annotations

import pytest
from judge_server import Service
from judged_runs import KEY


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    made = Service()
    yield made
    made.close()
