"""The frame of predictors: transformers' own distributions with all logits, states one at a time, closed forms of CKA and of
whitening; what is kept, gone on with and made anew; and personas that do not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.measure.centroids import compute
from leakfast.measure.predictors import output
from leakfast.measure.predictors.divergences import Reply, along
from leakfast.measure.predictors.request import Request
from leakfast.measure.predictors.stage import predictors
from leakfast.prompts import chat
from leakfast.prompts.conversation import Question
from leakfast.prompts.personas import Persona, load_personas
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

NAMES = "villain,librarian,comedian,nice_villain,no_persona"
QUESTIONS = ["Who are you?", "What do you do all day?", "Why?", "Is it raining?"]
TOKENS = 6


@pytest.fixture
def request_():
    return Request(load_personas(NAMES), QUESTIONS, reply_tokens=TOKENS)


@pytest.fixture
def made(tiny_qwen2, request_, tmp_path):
    return predictors(tiny_qwen2, Run(tmp_path / "run"), request_)


def value(frame, source, persona, predictor, layer=None):
    found = frame.filter(
        pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)),
        source=source,
        persona=persona,
        predictor=predictor,
    )
    return found["value"].item()


def matrix(frame, names, predictor, layer=None):
    one = frame.filter(pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)), predictor=predictor)
    found = {(s, p): v for s, p, v in one.select("source", "persona", "value").iter_rows()}
    assert len(found) == one.height == len(names) * (len(names) - 1)
    nothing = [[np.nan if s == p else found[s, p] for p in names] for s in names]
    return np.array([[np.nan if v is None else v for v in row] for row in nothing])


def plain_logprobs(loaded, prompt, tokens):
    """(n, V) float64 log-probabilities before each of the reply's tokens, one pass with all logits."""
    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def plain_divergences(lp, lq):
    p, q = lp.exp(), lq.exp()
    lm = torch.logaddexp(lp, lq) - np.log(2)
    terms = [p * (lp - lq), q * (lq - lp), (p * (lp - lm) + q * (lq - lm)) / 2]
    return np.array([float(term.sum()) for term in terms])


def replies_to(loaded, question, run):
    """(persona, tokens) of the replies that a run drew."""
    said = pl.read_parquet(run / layout.predictor_replies()).filter(question=question)
    return list(said.select("persona", "token_ids").iter_rows())


# ── next-token distributions along replies ────────────────────────────────────────────────────────


def some_replies(loaded, people, question=QUESTIONS[0]):
    encode = loaded.tokenizer.encode
    prompts = [list(p.ids) for p in chat.render_prompts(loaded.tokenizer, people, [question])]
    said = ["I read a book.", "I read a lot", "Rain.", "I read a book."]  # one twice, beginnings shared
    said = [encode(text, add_special_tokens=False) for text in said]
    return prompts, [
        Reply(k % len(prompts), [*ids, loaded.tokenizer.eos_token_id]) for k, ids in enumerate(said)
    ]


def test_divergences_equal_those_of_full_logits(tiny_qwen2):
    people = load_personas(NAMES)
    prompts, replies = some_replies(tiny_qwen2, people)
    found = along(tiny_qwen2, prompts, replies)
    assert found.shape == (4, 5, 3)
    for r, reply in enumerate(replies):
        own = plain_logprobs(tiny_qwen2, prompts[reply.of], reply.tokens)
        for p in range(len(prompts)):
            if p == reply.of:
                assert (found[r, p] == 0).all()
                continue
            expected = plain_divergences(own, plain_logprobs(tiny_qwen2, prompts[p], reply.tokens))
            assert (expected > 1e-3).all()  # there is something to be told apart
            assert np.abs(found[r, p] - expected).max() / len(reply.tokens) <= 1e-4


@pytest.mark.parametrize("budget", [1, 50, None])
def test_neither_order_nor_batch_nor_company_changes_a_divergence(tiny_qwen2, budget):
    prompts, replies = some_replies(tiny_qwen2, load_personas(NAMES))
    expected = along(tiny_qwen2, prompts, replies)
    turned = along(tiny_qwen2, prompts, replies[::-1], budget_tokens=budget)[::-1]
    alone = np.concatenate([along(tiny_qwen2, prompts, [one], budget_tokens=budget) for one in replies])
    assert np.abs(turned - expected).max() <= 1e-5 and np.abs(alone - expected).max() <= 1e-5


def test_equal_prompts_have_no_divergence_at_all(tiny_qwen2):
    prompts, replies = some_replies(tiny_qwen2, load_personas("villain,villain_twin", among=twins()))
    assert (along(tiny_qwen2, prompts, replies[:2]) == 0).all()


def twins():
    villain = load_personas("villain")[0]
    return [villain, replace(villain, name="villain_twin")]


def test_a_reply_without_tokens_is_refused(tiny_qwen2):
    prompts, _ = some_replies(tiny_qwen2, load_personas("villain,comedian"))
    with pytest.raises(ValueError, match="one token"):
        along(tiny_qwen2, prompts, [Reply(0, [])])


def test_output_predictors_are_means_over_tokens_along_each_others_replies(tiny_qwen2, made, tmp_path):
    people = {p.name: p for p in load_personas(NAMES)}
    total, tokens = {}, {}
    for number, question in enumerate(QUESTIONS):
        prompts = {n: chat.render(tiny_qwen2.tokenizer, p.system, question) for n, p in people.items()}
        for of, ids in replies_to(tiny_qwen2, number, tmp_path / "run"):
            assert 1 <= len(ids) <= TOKENS
            tokens[of] = tokens.get(of, 0) + len(ids)
            own = plain_logprobs(tiny_qwen2, prompts[of], ids)
            for other in people:
                theirs = plain_logprobs(tiny_qwen2, prompts[other], ids)
                total[of, other] = total.get((of, other), 0) + plain_divergences(own, theirs)
    for source in people:
        for persona in people:
            if source == persona:
                continue
            on_source, on_persona = total[source, persona], total[persona, source][[1, 0, 2]]
            both = (on_source + on_persona) / (tokens[source] + tokens[persona])
            for k, name in enumerate(output.NAMES):
                for ending, expected in (
                    ("", both[k]),
                    ("_on_source", on_source[k] / tokens[source]),
                    ("_on_persona", on_persona[k] / tokens[persona]),
                ):
                    assert value(made, source, persona, name + ending) == pytest.approx(expected, abs=1e-4)


def test_js_is_symmetric_and_no_divergence_is_negative(made):
    names = NAMES.split(",")
    away = ~np.eye(len(names), dtype=bool)
    js = matrix(made, names, "js")
    assert (js[away] == js.T[away]).all() and (js[away] <= np.log(2)).all()
    forward, backward = (matrix(made, names, name) for name in ("kl_forward", "kl_backward"))
    assert (forward[away] == backward.T[away]).all()
    assert (forward[away] != forward.T[away]).any()
    assert (made.filter(family="output")["value"] >= 0).all()
    assert (matrix(made, names, "js_on_source")[away] == matrix(made, names, "js_on_persona").T[away]).all()


# ── geometry ──────────────────────────────────────────────────────────────────────────────────────


def test_cosines_are_those_of_the_centroids(tiny_qwen2, made, request_):
    names = NAMES.split(",")
    known = compute(tiny_qwen2, request_.personas, QUESTIONS, "all", keep_questions=True)
    away = ~np.eye(len(names), dtype=bool)
    for layer in known.layers:
        for kind in ("centered", "raw"):
            expected = known.cosine(layer, kind)
            assert (matrix(made, names, f"cosine_{kind}", layer)[away] == expected[away]).all()


def test_a_runs_own_centroids_are_the_ones_whose_cosines_are_told(tiny_qwen2, request_, tmp_path):
    """To the bit, though they were summed in another order."""
    run, names = Run(tmp_path / "run"), NAMES.split(",")
    known = compute(tiny_qwen2, request_.personas, QUESTIONS, "all")
    run.create()
    run.add_file(layout.centroids(), known.save)
    found = predictors(tiny_qwen2, run, request_)
    away = ~np.eye(len(names), dtype=bool)
    for layer in known.layers:
        assert (matrix(found, names, "cosine_centered", layer)[away] == known.cosine(layer)[away]).all()


def test_centroids_of_questions_without_what_stands_around_them_are_not_taken(tiny_qwen2, request_, tmp_path):
    """The same texts with turns before them, or with a beginning of the reply, are other prompts; and centroids of these are
    kept in a file as any."""
    run, names = Run(tmp_path / "run").create(), NAMES.split(",")
    run.add_file(layout.centroids(), compute(tiny_qwen2, request_.personas, QUESTIONS, "all").save)
    away = ~np.eye(len(names), dtype=bool)
    for around in ({"turns": (("Tea?", "Yes."),)}, {"prefill": "Well,"}):
        asked = [Question(text, **around) for text in QUESTIONS]
        own = compute(tiny_qwen2, request_.personas, asked, "all", keep_questions=True)
        assert Centroids.load(own.save(tmp_path / "own.safetensors")).metadata == own.metadata
        found = predictors(tiny_qwen2, run, replace(request_, questions=asked, families=["geometry"]))
        for layer in own.layers:
            assert (matrix(found, names, "cosine_centered", layer)[away] == own.cosine(layer)[away]).all()


def plain_mean(loaded, prompt, tokens):
    """(layers, D) mean over the reply's tokens of each block's output."""
    caught = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: caught.__setitem__(i, out[0].double()))
        for i, block in enumerate(loaded.model.model.layers)
    ]
    with torch.inference_mode():
        loaded.model(input_ids=torch.tensor([[*prompt, *tokens]]))
    for hook in hooks:
        hook.remove()
    return np.stack([caught[i][len(prompt) :].mean(0).numpy() for i in range(loaded.n_layers)])


def test_replies_cosines_contrasts_and_projections_are_of_the_states_at_the_replies_tokens(
    tiny_qwen2, made, tmp_path
):
    people = load_personas(NAMES)
    own, without = [], []
    for one in people:
        sides = [[], []]
        for number, question in enumerate(QUESTIONS):
            ids = dict(replies_to(tiny_qwen2, number, tmp_path / "run"))[one.name]
            ids = [t for t in ids if t != tiny_qwen2.tokenizer.eos_token_id]
            if ids:
                for side, system in zip(sides, (one.system, None), strict=True):
                    prompt = chat.render(tiny_qwen2.tokenizer, system, question)
                    side.append(plain_mean(tiny_qwen2, prompt, ids))
        own.append(np.mean(sides[0], 0))
        without.append(np.mean(sides[1], 0))
    own, contrast = np.array(own), np.array(own) - np.array(without)
    extras = [k for k, one in enumerate(people) if not one.is_extra]
    names = NAMES.split(",")
    away = ~np.eye(len(names), dtype=bool)
    for layer in range(tiny_qwen2.n_layers):
        centered = own[:, layer] - own[extras, layer].mean(0)
        for name, rows in (("reply_cosine_raw", own[:, layer]), ("reply_cosine_centered", centered)):
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            assert matrix(made, names, name, layer)[away] == pytest.approx((unit @ unit.T)[away], abs=1e-4)
        unit = contrast[extras, layer] / np.linalg.norm(contrast[extras, layer], axis=1, keepdims=True)
        away_4 = ~np.eye(4, dtype=bool)
        got = matrix(made, names, "contrast_cosine", layer)[:4, :4]
        assert got[away_4] == pytest.approx((unit @ unit.T)[away_4], abs=1e-3)
        got = matrix(made, names, "projection", layer)[:4, :4]
        assert got[away_4] == pytest.approx((unit @ centered[:4].T)[away_4], abs=1e-3)
    last = made.filter(predictor="contrast_cosine", source="no_persona")
    assert last["value"].null_count() == last.height  # nothing to contrast it with
    assert last["reason"].str.contains("length 0").all()


def test_cka_needs_four_questions(tiny_qwen2, request_, tmp_path):
    found = predictors(tiny_qwen2, Run(tmp_path / "run"), replace(request_, questions=QUESTIONS[:3]))
    few = found.filter(predictor="cka")
    assert few["value"].null_count() == few.height and few["reason"].str.contains("4 questions").all()
    assert found.filter(predictor="cosine_centered")["value"].null_count() == 0


# ── the frame, and what is kept of it ─────────────────────────────────────────────────────────────


def test_the_frame_has_every_ordered_pair_and_a_reason_for_every_null(made):
    schema.check(made, "predictors")
    assert made.select("source", "persona", "predictor", "layer").is_duplicated().sum() == 0
    assert (made["source"] != made["persona"]).all()
    assert made.group_by("predictor", "layer").len()["len"].unique().to_list() == [20]
    assert (made["value"].is_null() == made["reason"].is_not_null()).all()
    assert not made["value"].is_nan().any()
    assert set(made["orientation"]) == {1, -1}
    assert set(made.filter(orientation=-1)["predictor"]) == {
        *made.filter(family="output")["predictor"],
        "edit_distance",
        "token_length_difference",
    }


def files(run):
    return {path: run.manifest["shards"][path]["sha256"] for path in run.shards()}


def stamps(run, folder=""):
    return {path: (run.path / path).stat().st_mtime_ns for path in run.shards(folder)}


def test_the_same_request_makes_nothing(tiny_qwen2, made, request_, tmp_path):
    run = Run(tmp_path / "run")
    before = stamps(run)
    assert predictors(tiny_qwen2, run, request_).equals(made)
    assert stamps(Run(tmp_path / "run")) == before


def test_what_was_stopped_goes_on_to_the_same_frame(tiny_qwen2, made, request_, tmp_path):
    run = Run(tmp_path / "stopped")

    def stop(done, total, what=""):
        if what == "scored replies" and done >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictors(tiny_qwen2, run, request_, progress=stop)
    there = stamps(run)
    assert len(run.shards(layout.divergences())) == 2 and not run.has(layout.predictors())
    assert predictors(tiny_qwen2, Run(run.path), request_).equals(made)
    after = stamps(Run(run.path))
    assert {path: after[path] for path in there} == there  # nothing was made twice
    assert files(Run(run.path)) == files(Run(tmp_path / "run"))


@pytest.mark.parametrize("other", [{"reply_tokens": 3}, {"seed": 7}, {"replies": 2}])
def test_another_request_makes_it_anew_and_sets_the_old_aside(tiny_qwen2, made, request_, tmp_path, other):
    run = Run(tmp_path / "run")
    asked = replace(request_, **other)
    found = predictors(tiny_qwen2, run, asked)
    assert not found.equals(made)
    assert found.equals(predictors(tiny_qwen2, Run(tmp_path / "fresh"), asked))
    assert (run.path / layout.QUARANTINE / layout.predictors()).is_file()


def test_layers_alone_keep_the_replies_and_what_was_scored(tiny_qwen2, made, request_, tmp_path):
    run = Run(tmp_path / "run")
    before = stamps(run, layout.DIVERGENCES)
    found = predictors(tiny_qwen2, run, replace(request_, layers=[1]))
    assert stamps(Run(run.path), layout.DIVERGENCES) == before
    assert found.filter(family="geometry")["layer"].unique().to_list() == [1]


def test_a_damaged_frame_is_made_again(tiny_qwen2, made, request_, tmp_path):
    path = tmp_path / "run" / layout.predictors()
    path.write_bytes(path.read_bytes()[:-9])
    assert predictors(tiny_qwen2, Run(tmp_path / "run"), request_).equals(made)


def test_a_persona_that_does_not_fit_has_nulls_and_changes_no_other(tiny_qwen2, made, request_, tmp_path):
    long = Persona("long", "word " * 600)
    asked = replace(request_, personas=[*request_.personas, long])
    found = predictors(tiny_qwen2, Run(tmp_path / "with"), asked)
    with_it = found.filter((pl.col("source") == "long") | (pl.col("persona") == "long"))
    lacking = with_it.filter(pl.col("family") != "text")
    assert lacking["value"].null_count() == lacking.height > 0
    assert lacking["reason"].str.contains("do not fit the model's context").all()
    assert with_it.filter(predictor="edit_distance")["value"].null_count() == 2  # with no_persona alone
    others = found.join(with_it, on=found.columns, how="anti", nulls_equal=True)
    key = ["source", "persona", "predictor", "layer"]
    both = others.join(made, on=key, how="inner", nulls_equal=True)
    both = both.filter(pl.col("predictor") != "embedding_similarity")  # whose mean it joins: it is a text
    assert both.height == made.height - 20
    assert both["value"].is_null().equals(both["value_right"].is_null())
    assert (both["value"] - both["value_right"]).abs().max() <= 1e-5


def test_too_few_personas_are_refused(tiny_qwen2, tmp_path):
    with pytest.raises(InputError, match="a source and a bystander"):
        Request(load_personas("villain"), QUESTIONS)
    few = [load_personas("villain")[0], Persona("long", "word " * 600)]
    with pytest.raises(InputError, match="1 of 2 personas fit"):
        predictors(tiny_qwen2, Run(tmp_path / "run"), Request(few, QUESTIONS, reply_tokens=TOKENS))
    with pytest.raises(InputError, match="--reply-tokens 0 given"):
        Request(load_personas(NAMES), QUESTIONS, reply_tokens=0)
