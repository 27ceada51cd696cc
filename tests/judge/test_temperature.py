"""What is sent to a judge: a temperature only where its API takes one, room for what it thinks; and that the shipped
prices say what they are made of."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from judged_runs import QUESTIONS, a_run

from leakfast.errors import InputError
from leakfast.judge import anthropic as anthropic_judge
from leakfast.judge import prices, stage
from leakfast.judge.sdk import Asking
from leakfast.study.config import JudgeConfig

pytest.importorskip("openai", reason="the judges' libraries are not installed: pip install '.[judge]'")
sdk = pytest.importorskip(
    "anthropic", reason="the judges' libraries are not installed: pip install '.[judge]'"
)


@pytest.mark.parametrize(
    ("settings", "temperature", "max_tokens"),
    [
        ({"judge": "anthropic:claude-sonnet-4-6"}, None, 100),
        ({"judge": "anthropic:claude-haiku-5-5"}, None, 2_000),
        ({"judge": "anthropic:no-such-model"}, None, 100),
        ({"judge": "openai:gpt-4o-mini"}, 0.0, 100),
        ({"judge": "openai-batch:gpt-4o-mini-2024-07-18"}, 0.0, 100),
        ({"judge": "openai:gpt-5-mini"}, None, 2_000),
        ({"judge": "openai:no-such-model"}, None, 100),
        ({"judge": "openai:my/model", "base_url": "http://localhost:8000/v1"}, 0.0, 100),
        ({"judge": "local:some/model"}, 0.0, 100),
        ({"judge": "openai:gpt-4o", "temperature": 0.7}, 0.7, 100),
        ({"judge": "openai:gpt-4o", "send_temperature": False}, None, 100),
        ({"judge": "openai:gpt-5-mini", "max_tokens": 300}, None, 300),
    ],
)
def test_a_temperature_goes_where_the_api_takes_one(settings, temperature, max_tokens):
    asking = stage.asking(JudgeConfig(**settings))
    assert (asking.temperature, asking.max_tokens) == (temperature, max_tokens)


@pytest.mark.parametrize("judge", ["openai:gpt-5-mini", "anthropic:claude-opus-5-5"])
def test_one_that_the_judge_is_known_not_to_take_is_refused(judge):
    with pytest.raises(
        InputError, match="takes none: the service would refuse the request. Leave temperature out"
    ):
        stage.asking(JudgeConfig(judge=judge, temperature=0))


def test_a_model_of_ones_own_says_so_in_the_file_of_prices(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[models]\nnew = { input = 1, output = 1, thinks = true, temperature = true }\n")
    asking = stage.asking(JudgeConfig(judge="openai:new", prices=str(mine)))
    assert (asking.temperature, asking.max_tokens) == (0.0, stage.THINKING_TOKENS)


def ask(run, service, judge, **settings):
    cfg = JudgeConfig(judge=judge, base_url=service.base_url(judge), poll_s=0.02, free=True, **settings)
    stage.judge(run, "advice", stage.parse_spec(judge), QUESTIONS, asking=stage.asking(cfg), free=True)
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("judge", "temperature"),
    [
        ("anthropic:claude-haiku-4-5", None),
        ("anthropic:claude-opus-5-5", None),
        ("openai:gpt-5-mini", None),
        ("openai-batch:gpt-5-mini", None),
        ("openai:gpt-4o", 0.0),
        ("openai-batch:gpt-4o", 0.0),
    ],
)
def test_what_is_sent_and_what_is_kept_of_it(tmp_path, service, judge, temperature):
    run = a_run(tmp_path / "run", texts=4)
    log = ask(run, service, judge)
    assert len(service.sent) == 4
    assert {request.get("temperature") for request in service.sent} == {temperature}
    assert all(("temperature" in request) == (temperature is not None) for request in service.sent)
    (told,) = (entry for entry in log if entry["event"] == "judge")
    assert told["temperature"] == temperature and told["statuses"] == {"base": {"ok": 4}}
    assert told["max_tokens"] == service.sent[0].get(
        "max_tokens", service.sent[0].get("max_completion_tokens")
    )


def test_a_library_whose_requests_know_no_temperature_refuses_one(service):
    with pytest.raises(InputError, match=f"requests of anthropic {sdk.__version__} take none"):
        anthropic_judge.Batch("m", Asking(service.root, temperature=0.0))
    old = SimpleNamespace(
        MessageCreateParamsBase=type("Base", (), {"__annotations__": {"temperature": float}})
    )
    assert not anthropic_judge.takes_temperature(sdk)
    assert anthropic_judge.takes_temperature(
        SimpleNamespace(types=SimpleNamespace(message_create_params=old))
    )


def test_every_shipped_judge_has_its_limits_and_says_whether_it_takes_a_temperature():
    shipped = prices._read(prices.SHIPPED)
    for name, price in shipped.items():
        assert price.temperature is not None, name
        assert price.temperature == name.startswith("gpt-4"), name
        assert (price.batch == 0.5 and price.context_tokens) or name == "claude-fable-5-2", name
    assert not shipped["claude-opus-4-8"].thinks and shipped["claude-opus-5"].thinks
