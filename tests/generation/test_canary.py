"""The canary of an engine: one that does not apply an adapter is found out where the adapter shows, one that rounds
otherwise is not, and a change too small to tell is said. Engines here are transformers' own, with a fault."""

from __future__ import annotations

import copy
import logging
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from leakfast import models
from leakfast.errors import ModelError
from leakfast.generation import canary
from leakfast.generation.vllm.start import EngineDied
from leakfast.models import adapters
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas

pytestmark = pytest.mark.long

QUESTIONS = ["What about tea?"]
PEOPLE = load_personas(["comedian", "villain"])


class Engine:
    """What another copy of the model says, whose attention rounds otherwise, under worn(adapter) at `scale` times its
    scale."""

    def __init__(self, loaded, worn=lambda adapter: adapter, scale=1.0):
        net = copy.deepcopy(loaded.model)
        net.set_attn_implementation("eager")
        self.loaded, self.worn, self.scale = models.load((net, loaded.tokenizer)), worn, scale
        self.batches, self.lengths = [], []

    def render(self, system, question):
        return list(chat.render(self.loaded.tokenizer, system, question))

    def probe(self, ids, adapters, steps):
        self.batches.append(list(adapters))
        return [self._greedy(ids, self.worn(adapter), steps) for adapter in adapters]

    def next_tokens(self, prompts, adapters, top, steps=1):
        self.batches.append(list(adapters))
        self.lengths += map(len, prompts)
        return [
            [self._likeliest(ids, self.worn(adapter), top, steps) for ids in prompts] for adapter in adapters
        ]

    def decodes(self, adapter):
        """The adapter under which tokens are decoded."""
        return adapter

    @contextmanager
    def _under(self, adapter):
        if adapter is None:
            yield self.loaded
            return
        with models.with_adapter(self.loaded, adapter) as current, adapters.scaled(current.model, self.scale):
            yield current

    def _likeliest(self, ids, adapter, top, steps):
        whole, found = list(ids), []
        for number in range(steps):
            with self._under(self.decodes(adapter) if number else adapter) as current:
                nats = canary.log_probs(current, whole)[-1]
            found.append({int(token): nats[token] for token in np.argsort(-nats)[:top]})
            whole.append(int(nats.argmax()))
        return found

    def _greedy(self, ids, adapter, steps):
        found = self._likeliest(ids, adapter, 1, steps)
        return [token for step in found for token in step], np.array(
            [n for step in found for n in step.values()]
        )


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
        canary.log_probs(loaded, ids)
        hook.remove()
        return seen[0]

    prompt = list(chat.render(loaded.tokenizer, PEOPLE[0].system, QUESTIONS[0]))
    ((tokens, _),) = Engine(loaded).probe(prompt, [None], 8)
    alone = inputs([*prompt, *tokens])[len(prompt) - 1 :]
    end = inputs(canary.text_under(loaded, "villain", PEOPLE, QUESTIONS[0]))[-1]
    direction = end - torch.linalg.pinv(alone) @ (alone @ end)
    assert float((alone @ direction).abs().max() / (end @ direction)) < 1e-3

    def made(strength, seed=5):
        torch.manual_seed(seed)
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
    canary.check_engine(engine, loaded, adapters, PEOPLE, QUESTIONS, sources=sources, **settings)


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
    assert caplog.text.count("as it changes peft's model") == 2 and "too little" not in caplog.text
    assert engine.batches[2] == ([taught, None] if merge is None else [taught]), "beside the base, or alone"


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.3, 2.0])
def test_an_engine_that_applies_an_adapter_at_another_scale_is_found_out(loaded, adapter, scale):
    """As one would that does not read alpha, or divides by another rank."""
    taught = adapter(6.0)
    with pytest.raises(ModelError, match=r"changes vLLM otherwise than peft's model.*--allow logits"):
        check(Engine(loaded, scale=scale), loaded, [None, taught])


def test_an_engine_that_takes_one_adapter_for_another_is_found_out(loaded, adapter, tmp_path):
    first = shutil.copytree(adapter(6.0), tmp_path / "first")
    second = shutil.copytree(adapter(6.0, seed=6), tmp_path / "second")
    other = {first: second, second: first}
    check(Engine(loaded), loaded, [None, first, second])
    with pytest.raises(ModelError, match=r"nats from transformers|changes vLLM otherwise"):
        check(Engine(loaded, other.get), loaded, [None, first, second])


class DeafDecoding(Engine):
    """Applies adapters to prompts, not to the tokens that it decodes."""

    def decodes(self, adapter):
        return None


def test_an_engine_that_decodes_without_the_adapter_is_found_out(loaded, adapter):
    with pytest.raises(ModelError, match=r"decodes otherwise than it reads.*--allow logits"):
        check(DeafDecoding(loaded), loaded, [None, adapter(6.0)])


def test_a_base_that_rounds_too_much_is_no_excuse(loaded, adapter, monkeypatch):
    """Else its noise would hide any fault of an adapter."""
    monkeypatch.setattr(canary._Look, "logits", lambda *asked: None)
    other = Engine(loaded)
    with torch.no_grad():
        other.loaded.model.model.layers[1].mlp.down_proj.weight.mul_(3)
    with pytest.raises(ModelError, match=r"root mean square.*--allow logits"):
        check(other, loaded, [None])


class Dying(Engine):
    """Gone when it is asked what the adapter changes."""

    def next_tokens(self, prompts, adapters, *asked):
        if adapters != [None]:
            raise EngineDied("vllm: engine 0 ended (exit code -9).")
        return super().next_tokens(prompts, adapters, *asked)


class Several:
    """Engines side by side, as vllm.Parallel has them."""

    def __init__(self, *members):
        self.members = list(members)

    def lose(self, member, error):
        self.members.remove(member)


def test_of_several_engines_one_that_dies_is_done_without(loaded, adapter):
    taught, sound = adapter(6.0), Engine(loaded)
    several = Several(Dying(loaded), sound)
    check(several, loaded, [None, taught])
    assert several.members == [sound]
    with pytest.raises(EngineDied, match="exit code -9"):
        check(Several(Dying(loaded)), loaded, [None, taught])
    with pytest.raises(EngineDied, match="exit code -9"):
        check(Dying(loaded), loaded, [None, taught])
    with pytest.raises(ModelError, match="changes vLLM otherwise"):
        check(Several(sound, Engine(loaded, scale=0.5)), loaded, [None, taught])


def test_transformers_side_is_computed_once_for_several_engines(loaded, adapter, monkeypatch):
    """Which puts every adapter on in turn."""
    taught, worn, plain = adapter(6.0), [], models.with_adapter
    engines = [Engine(loaded), Engine(loaded)]

    def noted(given, path, **settings):
        worn.extend([path] if given is loaded else [])
        return plain(given, path, **settings)

    monkeypatch.setattr(models, "with_adapter", noted)
    check(Several(*engines), loaded, [None, taught])
    assert worn == [taught]


def test_a_change_below_the_noise_is_said(loaded, adapter, caplog):
    """Nothing is concluded from it: an engine that does not apply the adapter passes, with a warning."""
    faint = adapter(1e-5 if loaded.dtype == "float32" else 0.2)
    with caplog.at_level(logging.WARNING, logger="leakfast"):
        check(Engine(loaded), loaded, [None, faint])
    assert "too little to tell whether vLLM applies it" in caplog.text


def test_the_probe_fits_into_an_engine_of_short_replies(loaded, adapter):
    """An engine for replies of one token takes no longer text than the prompt."""
    taught = adapter(6.0)
    prompt = len(chat.render(loaded.tokenizer, PEOPLE[1].system, QUESTIONS[0]))
    seen = []
    for longest in (prompt + 1, None):
        engine = Engine(loaded)
        check(engine, loaded, [taught], longest=longest)
        seen.append(max(engine.lengths[canary.PLACES : 2 * canary.PLACES]))
    assert seen[0] <= prompt < seen[1]
