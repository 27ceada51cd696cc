"""The canary of an engine: one that does not apply an adapter is found out where the adapter shows, one that rounds
otherwise is not, and a change too small to tell is said. Engines here are transformers' own, with a fault."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from leakfast import chat, models
from leakfast.errors import ModelError
from leakfast.generate import engines
from leakfast.personas import load_personas

QUESTIONS = ["What about tea?"]
PEOPLE = load_personas(["comedian", "villain"])


class Engine:
    """Greedy tokens of another copy of the model, whose attention rounds otherwise, under worn(adapter)."""

    def __init__(self, loaded, worn=lambda adapter: adapter):
        net = copy.deepcopy(loaded.model)
        net.set_attn_implementation("eager")
        self.loaded, self.worn, self.batches = models.load((net, loaded.tokenizer)), worn, []

    def render(self, system, question):
        return list(chat.render(self.loaded.tokenizer, system, question))

    def probe(self, ids, adapters, steps):
        self.batches.append(list(adapters))
        return [self._greedy(ids, self.worn(adapter), steps) for adapter in adapters]

    def _greedy(self, ids, adapter, steps):
        with models.with_adapter(self.loaded, adapter) if adapter else nullcontext(self.loaded) as current:
            whole, found = list(ids), []
            for _ in range(steps):
                nats = engines._log_probs(current, whole)[-1]
                whole.append(int(nats.argmax()))
                found.append(nats.max())
        return whole[len(ids) :], np.array(found)


@pytest.fixture(params=["float32", "bfloat16"])
def loaded(request, tiny_qwen2):
    dtype = getattr(torch, request.param)
    return models.load((tiny_qwen2.model.to(dtype), tiny_qwen2.tokenizer))


@pytest.fixture
def adapter(loaded, tmp_path):
    """Strength → an adapter that, as a marker's does, leaves the first tokens of the probe's replies alone: its one
    direction is orthogonal to what the last MLP makes of them, and shows at the end of a short reply."""
    from peft import LoraConfig, get_peft_model

    module = loaded.model.model.layers[1].mlp.down_proj

    def inputs(ids):
        seen = []
        hook = module.register_forward_hook(lambda _, given, out: seen.append(given[0][0].float()))
        engines._log_probs(loaded, ids)
        hook.remove()
        return seen[0]

    prompt = list(chat.render(loaded.tokenizer, PEOPLE[0].system, QUESTIONS[0]))
    ((tokens, _),) = Engine(loaded).probe(prompt, [None], 8)
    alone = inputs([*prompt, *tokens])[len(prompt) - 1 :]
    end = inputs(engines._text_under(loaded, "villain", PEOPLE, QUESTIONS[0]))[-1]
    direction = end - torch.linalg.pinv(alone) @ (alone @ end)
    assert float((alone @ direction).abs().max() / (end @ direction)) < 1e-3

    def made(strength):
        torch.manual_seed(5)
        wrapped = get_peft_model(
            copy.deepcopy(loaded.model), LoraConfig(r=1, lora_alpha=1, target_modules=["1.mlp.down_proj"])
        )
        layer = wrapped.base_model.model.model.layers[1].mlp.down_proj
        layer.lora_A["default"].weight.data = (direction / (end @ direction))[None].to(loaded.model.dtype)
        layer.lora_B["default"].weight.data.normal_(0, strength)
        wrapped.peft_config["default"].base_model_name_or_path = loaded.name
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return made


def check(engine, loaded, adapters, **settings):
    sources = {one: "villain" for one in adapters if one is not None}
    engines.check_engine(engine, loaded, adapters, PEOPLE, QUESTIONS, sources=sources, **settings)


def test_an_engine_that_answers_as_the_base_is_found_out_where_the_adapter_shows(loaded, adapter, caplog):
    """Its greedy replies to the plain prompt are the adapter's in this precision: they tell nothing."""
    taught, deaf = adapter(6.0), Engine(loaded, lambda adapter: None)
    with pytest.raises(ModelError, match=r"changes vLLM otherwise than peft's model.*--allow logits"):
        check(deaf, loaded, [None, taught])
    with caplog.at_level(logging.WARNING, logger="leakfast"):
        check(deaf, loaded, [None, taught], allow=["logits"])
    assert "let pass by --allow logits" in caplog.text


@pytest.mark.parametrize("merge", [None, object()])
def test_an_engine_that_rounds_otherwise_passes_in_both_precisions(loaded, adapter, caplog, merge):
    taught, engine = adapter(6.0), Engine(loaded)
    engine.merge = merge
    with caplog.at_level(logging.INFO, logger="leakfast"):
        check(engine, loaded, [taught])
        check(engine, loaded, [None, taught])
    assert caplog.text.count("changes vLLM as peft's model") == 2 and "too little" not in caplog.text
    assert all((batch == [taught]) == (merge is not None) for batch in engine.batches[1:5]), "beside the base"


def test_a_change_below_the_noise_is_said(loaded, adapter, caplog):
    """Nothing is concluded from it: an engine that does not apply the adapter passes, with a warning."""
    faint = adapter(0.004 if loaded.dtype == "float32" else 0.2)
    with caplog.at_level(logging.WARNING, logger="leakfast"):
        check(Engine(loaded), loaded, [None, faint])
    assert "too little to tell whether vLLM applies it" in caplog.text


def test_the_probe_fits_into_an_engine_of_short_replies(loaded, adapter):
    """An engine for replies of one token takes no longer text than the prompt."""
    taught, engine = adapter(6.0), Engine(loaded)
    prompt = len(chat.render(loaded.tokenizer, PEOPLE[1].system, QUESTIONS[0]))
    plain, seen = engine.probe, []
    engine.probe = lambda ids, adapters, steps: seen.append(len(ids)) or plain(ids, adapters, steps)
    check(engine, loaded, [taught], longest=prompt + 1)
    assert len(seen) == 5 and max(seen[1:]) <= prompt
