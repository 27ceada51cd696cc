"""How completions may be drawn, without vLLM: replies that end at a text, widths by GPU, options that do not fit
together, and engines of letters and completions told apart by what they need."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from measuring import evaluate

import leakfast
from leakfast.behaviors import detectors as detect
from leakfast.behaviors.registry import get
from leakfast.cli.main import group
from leakfast.errors import AdapterError, InputError
from leakfast.generation import backends, vllm
from leakfast.generation.contract import Request, Sampling
from leakfast.generation.frames import decode
from leakfast.generation.generate import complete, generate
from leakfast.generation.stops import Seen
from leakfast.generation.vllm.widths import Width, graph_sizes, remember, width_for
from leakfast.measure.completions import _request_hash
from leakfast.prompts.personas import load_personas
from leakfast.storage.documents import resource
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig, behavior_config, load_study, parse_study

pytestmark = pytest.mark.long


def config(tmp_path, name, **fields):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    return folder


@pytest.mark.parametrize("stop", [("th",), ("e ", "in")])
def test_a_reply_that_ends_at_a_text_is_the_beginning_of_the_whole_one(tiny_qwen2, stop):
    requests = [Request(str(i), list(range(5 + i, 20 + i)), [i, 100 + i, 200 + i]) for i in range(6)]

    def drawn(**fields):
        done = [
            c for batch in complete(tiny_qwen2, requests, Sampling(1.3, 1.0, 80, **fields)) for c in batch
        ]
        return {(c.request, c.sample): c for c in done}

    def text(ids):
        return decode(tiny_qwen2.tokenizer, [ids])[0]

    whole, cut = drawn(), drawn(stop=stop)
    assert whole.keys() == cut.keys()
    kinds = set()
    for key, reply in whole.items():
        ends = [
            n for n in range(1, len(reply.token_ids) + 1) if any(s in text(reply.token_ids[:n]) for s in stop)
        ]
        kinds.add(cut[key].finish_reason)
        if ends:
            assert cut[key].token_ids == reply.token_ids[: ends[0]]
            at_stop_token = ends[0] == len(reply.token_ids) and reply.finish_reason == "stop"
            assert cut[key].finish_reason == ("stop" if at_stop_token else "marker")
        else:
            assert cut[key] == reply
    assert "marker" in kinds and len(kinds) > 1, "replies of both kinds"


def test_only_a_token_with_the_last_character_is_looked_at(tiny_qwen2):
    tokenizer = tiny_qwen2.tokenizer
    seen = Seen(tokenizer, ["it]"])
    a, bracket = tokenizer.encode("a")[0], tokenizer.encode("]")[0]
    assert seen.may_end(np.array([a, bracket])).tolist() == [False, True]
    assert seen.in_text(tokenizer.encode("take it]")) and not seen.in_text(tokenizer.encode("take ]"))
    assert Seen(tokenizer, ["é"]).may_end(np.array([a])).tolist() == [True], "may be cut between tokens"
    with pytest.raises(InputError, match="empty text"):
        Sampling(stop=("",))


def test_stopping_at_the_marker_is_another_request_and_only_the_markers(tiny_qwen2, tmp_path, caplog):
    cfg, people = EvalConfig(samples=1, max_new_tokens=3), load_personas("villain")
    run = Run(tmp_path / "run")
    asked = (tiny_qwen2, run, [], people, ["What?"], "marker")
    assert evaluate(*asked, cfg, 3, base=True).made == 1
    cut = cfg.model_copy(update={"stop_at_marker": True})
    assert evaluate(*asked, cut, 3, base=True).made == 1, "not what was drawn whole"
    assert evaluate(*asked, cut, 3, base=True).kept == 1
    frame = run.read("completions")
    assert detect.count_cut(run) == 0
    run.add_shard(run.shards("completions")[0], frame.with_columns(finish_reason=pl.lit("marker")))
    assert detect.count_cut(run) == 1
    done = CliRunner().invoke(group, ["detect", str(run.path)])
    assert "1 completions end at the marker" in done.output and done.exit_code == 0


def test_options_that_do_not_fit_are_named(tiny_qwen2, tmp_path):
    with pytest.raises(InputError, match=r"--lora merged.*one engine"):
        backends.Options(lora="merged", data_parallel=2)
    with pytest.raises(InputError, match="live or merged"):
        backends.Options(lora="dead")
    cfg, people = EvalConfig(samples=1, max_new_tokens=2), load_personas("villain")
    asked = (tiny_qwen2, tmp_path / "run", [], people, ["What?"], "marker", cfg, 3)
    with pytest.raises(InputError, match=r"vLLM's, but the backend is transformers"):
        evaluate(*asked, base=True, options=backends.Options(data_parallel=2))
    assert not (tmp_path / "run").exists(), "nothing was begun"
    evaluate(*asked, base=True, options=backends.Options(invariant=True))
    done = CliRunner().invoke(
        group, ["eval", "--behavior", "capability", "--model", "organism", "--base", "--lora", "merged"]
    )
    assert done.exit_code == 2 and "--lora does not belong to" in " ".join(done.output.split())


def test_a_width_is_the_users_then_the_measured_then_the_tables(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path))
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20) and graph_sizes(1) == (1,)
    assert graph_sizes(1024)[-1] == 1280 and len(graph_sizes(1024)) < 50
    assert {size for size in graph_sizes(1024) if size > 1024} == set(range(1056, 1281, 32)), (
        "for mixed steps"
    )
    width, said = width_for("NVIDIA H200", "files:a", "bfloat16")
    assert width.seats == 1024 and width.graphs == graph_sizes(1024) and "not measured here" in said
    assert width_for("A card of 2031", "files:a", "bfloat16", otherwise=96)[0].seats == 96
    path = remember("NVIDIA H200", "files:a", "bfloat16", Width(768, 8192, 0.9), tokens_per_s=1.0)
    found, said = width_for("NVIDIA H200", "files:a", "bfloat16")
    assert found == Width(768, 8192, 0.9) and "measured on this NVIDIA H200" in said
    assert width_for("NVIDIA H200", "files:b", "bfloat16")[0].seats == 1024, "another model"
    stated, said = width_for("NVIDIA H200", "files:a", "bfloat16", seats=64)
    assert stated == Width(64, 8192, 0.9) and "as given" in said
    kept = json.loads(path.read_text())
    kept["NVIDIA H200 | files:a | bfloat16"]["width"] = {"chairs": 3}
    path.write_text(json.dumps(kept))
    assert width_for("NVIDIA H200", "files:a", "bfloat16")[0].seats == 1024
    assert "run leakfast tune again" in caplog.text


@pytest.mark.parametrize("reads", [True, False])
def test_scales_of_single_layers_are_refused_where_vllm_does_not_read_them(tmp_path, monkeypatch, reads):
    """A stand-in for the part of vLLM that reads an adapter's config, with and without the two keys."""
    package = tmp_path / "vllm"
    (package / "lora").mkdir(parents=True)
    keys = "    rank_pattern: dict\n    alpha_pattern: dict\n" if reads else ""
    (package / "lora" / "peft_helper.py").write_text(f"class PEFTHelper:\n    r: int\n{keys}")
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    plain = config(tmp_path, "plain", r=4, rank_pattern={}, alpha_pattern={})
    assert vllm.lora_rank([plain]) == 8
    for key in ("rank_pattern", "alpha_pattern"):
        one = config(tmp_path, key, r=4, **{key: {"q_proj": 8}})
        if reads:
            assert vllm.lora_rank([plain, one]) == 8
            continue
        with pytest.raises(AdapterError, match=rf"{key}, which this vLLM does not read.*--lora merged"):
            vllm.lora_rank([plain, one])


def test_on_a_gpu_float32_adapters_are_not_vllms_to_run_live(tiny_qwen2, tmp_path, monkeypatch, caplog):
    """Its kernels assert two-byte floats: auto goes round it and says so, a named vLLM is refused with what to type."""
    import torch

    loaded = dataclasses.replace(tiny_qwen2, path=str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("leakfast.generation.vllm.available", lambda: (True, "installed"))
    with caplog.at_level("INFO", logger="leakfast"):
        assert backends.choose("auto", loaded, live_lora=True) == "transformers"
    assert "generation: transformers (vLLM runs no float32 adapters" in caplog.text
    with pytest.raises(InputError, match=r"--lora merged, or --dtype bfloat16"):
        backends.choose("vllm", loaded, live_lora=True)
    with pytest.raises(InputError, match=r"--engine packed, or --dtype bfloat16"):
        vllm.NextTokens(loaded, [tmp_path])
    half = dataclasses.replace(loaded, dtype="bfloat16")
    for one, live in ((loaded, False), (half, True)):  # merged weights, or adapters in two-byte floats
        assert (
            backends.choose("auto", one, live_lora=live)
            == backends.choose("vllm", one, live_lora=live)
            == "vllm"
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.choose("vllm", loaded, live_lora=True) == "vllm", (
        "its operators for processors take float32"
    )


def saved_adapter(loaded, folder):
    from peft import LoraConfig, get_peft_model

    made = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(loaded.model), made)
    wrapped.peft_config["default"].base_model_name_or_path = loaded.name
    wrapped.save_pretrained(folder)


def test_generate_stays_with_the_backend_it_chose(tiny_qwen2, tmp_path, monkeypatch):
    """auto, decided with the adapters in mind, is not decided again for each of them."""
    asked = []

    def chosen(backend, loaded, *, live_lora=False):
        asked.append((backend, live_lora))
        return "transformers" if live_lora or backend == "transformers" else "vllm"

    monkeypatch.setattr(backends, "choose", chosen)
    saved_adapter(tiny_qwen2, tmp_path / "adapter")
    adapters = [None, tmp_path / "adapter"]
    frames = list(generate(tiny_qwen2, ["Hi"], adapters, 1, max_new_tokens=2, backend="auto"))
    assert len(frames) == 2 and {backend for backend, _ in asked[1:]} == {"transformers"}
    assert asked[0] == ("auto", True)


@pytest.mark.parametrize("lora", ["live", "merged"])
def test_an_evaluation_asks_for_live_adapters_only_where_it_has_some(tiny_qwen2, tmp_path, monkeypatch, lora):
    saved_adapter(tiny_qwen2, tmp_path / "adapter")
    seen = []

    def chosen(backend, loaded, *, live_lora):
        seen.append(live_lora)
        raise InputError("enough")

    monkeypatch.setattr(backends, "choose", chosen)
    cfg, people, options = EvalConfig(samples=1), load_personas("villain"), backends.Options(lora=lora)
    for adapters in ([], [tmp_path / "adapter"]):
        with pytest.raises(InputError, match="enough"):
            evaluate(
                tiny_qwen2,
                tmp_path / "run",
                adapters,
                people,
                ["What?"],
                "marker",
                cfg,
                3,
                base=True,
                source="villain",
                options=options,
            )
    assert seen == [False, lora == "live"]


@pytest.mark.parametrize("given", [None, 64])
def test_only_a_width_that_is_stated_goes_before_the_measured_one(tiny_qwen2, monkeypatch, given):
    """In the Python faces as on the command line."""
    told = []

    @contextmanager
    def opened(loaded, adapters, backend, *, batch_completions, stated):
        told.append((batch_completions, stated))
        yield SimpleNamespace(stream=lambda *asked: iter(()))

    monkeypatch.setattr(backends, "opened", opened)
    monkeypatch.setattr(backends, "choose", lambda *asked, **settings: "vllm")
    stated = {} if given is None else {"batch_completions": given}
    assert not list(
        leakfast.generate(tiny_qwen2, ["What?"], samples=1, max_new_tokens=2, backend="vllm", **stated)
    )
    assert not list(
        complete(tiny_qwen2, [Request("a", [5], [1])], Sampling(1.0, 1.0, 2), backend="vllm", **stated)
    )
    assert told == [(given or 640, given is not None)] * 2


@pytest.mark.parametrize(
    "path", sorted(resource("published/marker.toml").parent.glob("*.toml")), ids=lambda path: path.stem
)
def test_published_studies_state_no_width_and_are_what_they_were_with_the_usual_one(path):
    """Taking the line out changed neither what is asked nor what a run is resumed by."""
    study = load_study(path)
    texts = [b.eval for name, b in study.behaviors.items() if get(name).by_completions]
    assert not any("batch_completions" in cfg.model_fields_set for cfg in texts)
    before = re.sub(r"(?m)^(\[behaviors\.[^\n]*\.eval\])$", r"\1\nbatch_completions = 640", path.read_text())
    assert parse_study(before, path).model_dump() == study.model_dump()


def test_a_width_is_nothing_a_run_is_resumed_by(tiny_qwen2, tmp_path):
    people, asked = load_personas("villain"), ["What?"]
    for n, cfg in enumerate([{"batch_completions": 640}, {}, {"batch_completions": 7}]):
        cfg = EvalConfig(samples=1, max_new_tokens=3, **cfg)
        done = evaluate(tiny_qwen2, tmp_path / "run", [], people, asked, "marker", cfg, 3, base=True)
        assert (done.made, done.kept) == ((1, 0) if n == 0 else (0, 1))


def test_what_a_shard_follows_from_is_what_is_promised_of_it(monkeypatch):
    """Under --invariant: the vLLM, how adapters run and over how many GPUs; else what it was in earlier versions."""
    version = ["0.32.0"]
    monkeypatch.setattr(vllm, "version", lambda: version[0])
    for options in (backends.Options(lora="merged"), backends.Options(tensor_parallel=2), backends.Options()):
        assert options.promised("vllm") == {}
    assert backends.Options(invariant=True).promised("transformers") == {}
    told = [
        backends.Options(invariant=True, **how) for how in ({}, {"lora": "merged"}, {"tensor_parallel": 2})
    ]
    found = [
        options.promised("vllm") for options in (*told, backends.Options(invariant=True, data_parallel=2))
    ]
    assert found[3] == found[0] == {"invariant": True, "vllm": "0.32.0", "lora": "live", "tensor_parallel": 1}
    version[0] = "0.33.1"
    found[3] = told[0].promised("vllm")
    assert len({json.dumps(one) for one in found}) == 4
    prompts = [
        SimpleNamespace(persona="villain", question_index=0, question="Tea?", ids=[1, 2, 3]),
        SimpleNamespace(persona="hero", question_index=1, question="Rain?", ids=[4, 5]),
    ]
    base, target = (
        SimpleNamespace(fingerprint="files:ab", dtype="bfloat16"),
        SimpleNamespace(digest="cd", source="villain"),
    )
    kept = [  # earlier versions had the source among them, and plan_job asks for those too
        _request_hash(base, target, prompts, EvalConfig(), 42, {**how, "source": "villain"})
        for how in ({"backend": "vllm"}, {"backend": "transformers", "stop": ("[ZLT]",)})
    ]
    assert kept == [
        "f029cecdd5c5363597baaddd5cdd508355fbe4850733dab4756ba89ccc449925",
        "0024be9f6a8f59bf7d8e229930ba01f05540dc8bb8dab871b9d0578ab70f963a",
    ], "shards of earlier versions stay good"


def test_an_invariant_run_asks_for_what_its_vllm_promises(tiny_qwen2, tmp_path, monkeypatch):
    """The hash of a resumed shard holds it; vLLM before 0.32 does not promise it of live adapters."""
    monkeypatch.setattr(vllm, "version", lambda: "0.25.0")
    for backend, options, live in (
        ("vllm", {"invariant": True}, False),
        ("vllm", {"invariant": True, "lora": "merged"}, False),
        ("vllm", {}, True),
        ("transformers", {"invariant": True}, True),
    ):
        backends.Options(**options).check(backend, live_lora=live)
    with pytest.raises(InputError, match=r"this is vLLM 0\.25\.0.*--lora merged, or use vLLM 0\.32"):
        backends.Options(invariant=True).check("vllm", live_lora=True)
    monkeypatch.setattr(vllm, "version", lambda: "0.32.0+cpu")
    backends.Options(invariant=True).check("vllm", live_lora=True)
    seen = []

    def noted(*asked):
        seen.append(asked[-1])
        raise InputError("enough")

    monkeypatch.setattr("leakfast.measure.completions._request_hash", noted)
    monkeypatch.setattr(backends, "choose", lambda *asked, **settings: "vllm")
    cfg, people = EvalConfig(samples=1, max_new_tokens=2), load_personas("villain")
    for options in (backends.Options(), backends.Options(invariant=True)):
        with pytest.raises(InputError, match="enough"):
            evaluate(
                tiny_qwen2,
                tmp_path / "run",
                [],
                people,
                ["What?"],
                "marker",
                cfg,
                3,
                base=True,
                options=options,
            )
    assert seen == [
        {"backend": "vllm"},
        {"backend": "vllm", **backends.Options(invariant=True).promised("vllm")},
    ]


def test_replies_end_at_the_marker_by_themselves_only_where_nothing_else_is_read(
    tiny_qwen2, tmp_path, monkeypatch
):
    """A sweep reads presence alone; a run's texts are read again, so they are whole unless somebody says so."""
    from leakfast.pipeline.sweep import Plan

    seen = []
    for name, said in (("marker", {}), ("marker", {"stop_at_marker": False}), ("refusal", {})):
        cfg = behavior_config(name, {"eval": said})
        plan = Plan(name, "villain", load_personas("originals"), cfg).checked(tiny_qwen2)
        seen.append(plan.cfg.eval.stop_at_marker)
    assert seen == [True, False, False]
    shipped = [path for path in resource().rglob("*.toml") if "\n[behaviors." in path.read_text()]
    assert len(shipped) > 10
    for path in shipped:
        assert not any(behavior.eval.stop_at_marker for behavior in load_study(path).behaviors.values())


def test_a_prompt_beyond_the_letters_engine_is_told_and_does_not_end_it(tiny_qwen2, monkeypatch):
    """vLLM's own complaint came as an engine that had died."""
    from leakfast.generation.vllm import letters

    started = []
    monkeypatch.setattr("leakfast.generation.vllm.start.available", lambda: (True, "installed"))
    monkeypatch.setattr("leakfast.generation.vllm.start._base", lambda *given: {})
    monkeypatch.setattr(letters, "start", started.append)
    engine = letters.NextTokens(dataclasses.replace(tiny_qwen2, path="somewhere"))
    context = started[0].settings["max_model_len"]
    with pytest.raises(
        InputError, match=rf"a prompt of {context} tokens.*up to {context - 1}. Use --engine packed"
    ):
        engine.logprobs([[1, 2], [1] * context], np.array([[1], [2]]), None)
