"""How completions may be drawn, without vLLM: replies that end at a text, widths by GPU, options that do not fit
together, and engines of letters and completions told apart by what they need."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from leakfast import detect
from leakfast.cli.main import group
from leakfast.config import EvalConfig
from leakfast.errors import InputError
from leakfast.evaluate import evaluate
from leakfast.generate import Request, Sampling, complete, decode, engines
from leakfast.generate.stops import Seen
from leakfast.generate.vllm.widths import Width, graph_sizes, remember, width_for
from leakfast.personas import load_personas
from leakfast.store import Run


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
    assert evaluate(*asked, cfg, 3, base=True).rows_made == 1
    cut = cfg.model_copy(update={"stop_at_marker": True})
    assert evaluate(*asked, cut, 3, base=True).rows_made == 1, "not what was drawn whole"
    assert evaluate(*asked, cut, 3, base=True).rows_kept == 1
    frame = run.read("completions")
    assert detect.count_cut(run) == 0
    run.add_shard(run.shards("completions")[0], frame.with_columns(finish_reason=pl.lit("marker")))
    assert detect.count_cut(run) == 1
    done = CliRunner().invoke(group, ["detect", str(run.path)])
    assert "1 completions end at the marker" in done.output and done.exit_code == 0


def test_options_that_do_not_fit_are_named(tiny_qwen2, tmp_path):
    with pytest.raises(InputError, match=r"--lora merged.*one engine"):
        engines.Options(lora="merged", data_parallel=2)
    with pytest.raises(InputError, match="live or merged"):
        engines.Options(lora="dead")
    cfg, people = EvalConfig(samples=1, max_new_tokens=2), load_personas("villain")
    asked = (tiny_qwen2, tmp_path / "run", [], people, ["What?"], "marker", cfg, 3)
    with pytest.raises(InputError, match=r"vLLM's, but the backend is transformers"):
        evaluate(*asked, base=True, options=engines.Options(data_parallel=2))
    assert not (tmp_path / "run").exists(), "nothing was begun"
    evaluate(*asked, base=True, options=engines.Options(invariant=True))
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
