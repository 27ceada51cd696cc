"""centroids.py and its command: means and cosines against plain numpy and one-at-a-time transformers,
the file and its metadata, and every refusal a new user may meet."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import leakfast
from leakfast import models
from leakfast.cli.centroids import cli
from leakfast.errors import InputError, ModelError, StoreError
from leakfast.geometry import Centroids, names_extras, parse_layers
from leakfast.measure.centroids import compute, measure
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas, load_questions

NAMES = "villain,librarian,comedian,nice_villain"
QUESTIONS = ["Who are you?", "What do you do all day?", "Why?"]


@pytest.fixture
def personas():
    return load_personas(NAMES)


@pytest.fixture
def made(tiny_qwen2, personas):
    return compute(tiny_qwen2, personas, QUESTIONS, "all", keep_questions=True)


def truth(loaded, personas, questions):
    """(P, Q, layers, D) float64: one prompt at a time, block outputs by hooks."""
    caught = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: caught.__setitem__(i, out[0, -1].double()))
        for i, block in enumerate(loaded.model.model.layers)
    ]
    states = []
    with torch.inference_mode():
        for persona in personas:
            for question in questions:
                loaded.model(
                    input_ids=torch.tensor([chat.render(loaded.tokenizer, persona.system, question)])
                )
                states.append(torch.stack([caught[i] for i in range(loaded.n_layers)]))
    for hook in hooks:
        hook.remove()
    return torch.stack(states).unflatten(0, (len(personas), len(questions))).numpy()


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_centroids_equal_the_mean_of_one_at_a_time_states(made, tiny_qwen2, personas):
    expected = truth(tiny_qwen2, personas, QUESTIONS)
    assert made.personas == NAMES.split(",")
    for layer in made.layers:
        assert made.layer(layer).dtype == np.float32
        assert relative(made.layer(layer), expected[:, :, layer].mean(1)) <= 1e-5
        assert made.questions[layer].shape == (4, 3, 32)
        assert relative(made.questions[layer], expected[:, :, layer]) <= 1e-5


@pytest.mark.parametrize("budget", [1, 60, None])  # no batch shared, cuts within a persona, one batch
def test_summed_in_place_they_are_the_same(made, tiny_qwen2, personas, budget):
    """Without --keep-questions no state is stored: sums and squares alone leave the engine."""
    expected = truth(tiny_qwen2, personas, QUESTIONS)
    got = compute(tiny_qwen2, personas, QUESTIONS, "all", budget_tokens=budget)
    again = compute(tiny_qwen2, personas, QUESTIONS, "all", budget_tokens=budget)
    for layer in made.layers:
        assert relative(got.layer(layer), expected[:, :, layer].mean(1)) <= 1e-5
        assert relative(got.moments[layer], np.square(expected[:, :, layer]).mean(1)) <= 1e-5
        assert relative(made.moments[layer], np.square(expected[:, :, layer]).mean(1)) <= 1e-5
        np.testing.assert_array_equal(got.layer(layer), again.layer(layer))
    assert got.questions == {}


def test_a_chunked_run_gives_the_same_centroids(made, tiny_qwen2, personas, monkeypatch):
    from leakfast.measure import centroids

    monkeypatch.setattr(centroids, "_CHUNK_BYTES", 1)
    told = []
    again = compute(tiny_qwen2, personas, QUESTIONS, "all", True, progress=lambda *a: told.append(a))
    for layer in made.layers:
        assert relative(again.layer(layer), made.layer(layer)) <= 1e-5
    assert told[-1] == (12, 12, "states")
    assert [t[0] for t in told] == sorted(t[0] for t in told)


def test_cosines_are_what_their_names_say(made):
    c = made.layer(1).astype(np.float64)
    unit = c / np.linalg.norm(c, axis=1, keepdims=True)
    np.testing.assert_allclose(made.cosine(1, "raw"), unit @ unit.T, atol=1e-12)
    c -= c.mean(0)
    unit = c / np.linalg.norm(c, axis=1, keepdims=True)
    np.testing.assert_allclose(made.cosine(1), unit @ unit.T, atol=1e-12)
    assert made.cosine(1).dtype == np.float64
    assert np.abs(made.cosine(1) - made.cosine(1, "raw")).max() > 0.1
    with pytest.raises(ValueError, match="'centered' or 'raw'"):
        made.cosine(1, "cosine")
    with pytest.raises(ValueError, match="layer 7"):
        made.cosine(7)


def test_extras_stay_out_of_the_mean_unless_named(tiny_qwen2, personas):
    with_extra = [*personas, *load_personas("qwen_default")]
    plain = compute(tiny_qwen2, personas, QUESTIONS, [1])
    beside = compute(tiny_qwen2, with_extra, QUESTIONS, [1])
    named = compute(tiny_qwen2, with_extra, QUESTIONS, [1], center_extras=True)
    np.testing.assert_allclose(beside.cosine(1)[:4, :4], plain.cosine(1), atol=1e-5)
    assert np.abs(named.cosine(1)[:4, :4] - plain.cosine(1)).max() > 1e-3
    assert named.metadata["centered_on"] == [*NAMES.split(","), "qwen_default"]


def test_an_extra_is_named_by_words_not_by_a_file():
    shipped = load_personas("villain,qwen_default")
    assert names_extras("villain, qwen_default", shipped)
    assert names_extras(["qwen_default"], shipped)
    assert not names_extras("personas.toml", shipped)
    assert not names_extras("all", load_personas("all"))


def test_a_direction_that_does_not_exist_is_nan_not_a_number(tiny_qwen2):
    people = load_personas({"a": "You are one.", "b": "You are one."})
    made = compute(tiny_qwen2, people, QUESTIONS, [0])
    assert np.isnan(made.cosine(0)).all()
    np.testing.assert_allclose(made.cosine(0, "raw"), 1.0)
    with pytest.raises(ValueError, match="at least two"):
        compute(tiny_qwen2, people[:1], QUESTIONS, [0]).cosine(0)


def test_personas_that_render_alike_are_warned_of(tiny_qwen2, caplog):
    compute(tiny_qwen2, load_personas("villain,qwen_default,no_persona"), QUESTIONS, [0])
    assert "qwen_default, no_persona render to the same tokens" in caplog.text


def test_the_file_carries_everything_and_comes_back(made, tiny_qwen2, personas, tmp_path):
    path = made.save(tmp_path / "new" / "c.safetensors")
    again = Centroids.load(path)
    assert (again.personas, again.layers, again.metadata) == (made.personas, made.layers, made.metadata)
    for layer in made.layers:
        np.testing.assert_array_equal(again.layer(layer), made.layer(layer))
        np.testing.assert_array_equal(again.questions[layer], made.questions[layer])
    with safe_open(str(path), framework="np") as file:
        assert set(file.keys()) == {"layer.0", "layer.1", "questions.layer.0", "questions.layer.1"}
        metadata = file.metadata()
    assert "0-based" in metadata["layer_convention"]
    assert metadata["dtype"] == "float32"
    assert metadata["model_fingerprint"] == tiny_qwen2.fingerprint
    assert metadata["template_hash"] == chat.template_hash(tiny_qwen2.tokenizer)
    assert json.loads(metadata["personas"]) == made.personas
    assert json.loads(metadata["questions"]) == QUESTIONS
    assert json.loads(metadata["systems"]) == ["text"] * 4
    assert len(set(json.loads(metadata["rendered_ids_hashes"]))) == 4


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: a[:, ::2], lambda a: a[::-1]])
def test_centroids_that_lie_in_memory_otherwise_come_back_as_they_were(layout, tmp_path):
    """safetensors 0.8 writes memory as it lies, whatever the strides: what is saved is laid in rows first."""
    means = layout(np.arange(24, dtype=np.float32).reshape(4, 6))
    kept = layout(np.arange(24, dtype=np.float32).reshape(4, 6))[:, None].repeat(3, 1).swapaxes(1, 2)
    told = {"personas": list("abcd"), "layers": [0], "centered_on": list("abcd")}
    again = Centroids.load(Centroids(list("abcd"), [0], told, {0: means}, {0: kept}).save(tmp_path / "c"))
    np.testing.assert_array_equal(again.layer(0), means)
    np.testing.assert_array_equal(again.questions[0], kept)


def test_the_same_command_gives_the_same_bytes(made, tiny_qwen2, personas, tmp_path):
    first = made.save(tmp_path / "1.safetensors").read_bytes()
    for n in range(3):
        again = compute(tiny_qwen2, personas, QUESTIONS, "all", keep_questions=True)
        assert again.save(tmp_path / f"{n}.safetensors").read_bytes() == first


def test_what_is_no_centroid_file_is_refused_with_the_remedy(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "junk").write_bytes(b"junk")
    save_file({"x": np.zeros(2)}, tmp_path / "other")
    for name in ("missing", "junk", "other"):
        with pytest.raises(StoreError, match="leakfast centroids --out"):
            Centroids.load(tmp_path / name)


def test_reading_a_file_needs_no_torch(made, tmp_path):
    path = made.save(tmp_path / "c.safetensors")
    code = (
        "import sys; from leakfast.measure.centroids import Centroids; "
        f"Centroids.load({str(path)!r}).cosine(1); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_state_that_is_not_finite_names_persona_and_layer(tiny_qwen2, personas):
    with torch.no_grad():
        tiny_qwen2.model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    assert compute(tiny_qwen2, personas, QUESTIONS, [0]).layer(0).shape == (4, 32)
    with pytest.raises(ModelError, match="persona villain at layer 1"):
        compute(tiny_qwen2, personas, QUESTIONS, [0, 1])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("0,2,4", [0, 2, 4]),
        ("0-2", [0, 1, 2]),
        ("0–2, 5", [0, 1, 2, 5]),
        ("5,1,5", [5, 1]),
        (3, [3]),
        ([4, 0], [4, 0]),
        (np.array([1, 2]), [1, 2]),
    ],
)
def test_layer_specs(spec, expected):
    assert parse_layers(spec, 6) == expected


@pytest.mark.parametrize("spec", ["", "x", "-1", "3-1", "1.5", [], [True], ["2"], [1.0]])
def test_what_is_no_layer(spec):
    with pytest.raises(InputError, match="--layers 0-5"):
        parse_layers(spec, 6)


@pytest.mark.parametrize("spec", ["30", "0-30", "2,30", [30], 30])
def test_a_layer_out_of_range_has_the_agreed_message(spec):
    with pytest.raises(InputError) as caught:
        parse_layers(spec, 6, "organism")
    assert caught.value.message == (
        "centroids: layer 30 asked, but organism has blocks 0–5. Use --layers 0-5 or --layers all."
    )
    assert caught.value.exit_code == 2


def test_layers_are_checked_before_the_weights_are_read(tiny_folder):
    (tiny_folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="layer 9 asked"):
        measure(tiny_folder, layers=[9])
    with pytest.raises(ModelError, match="weights"):
        measure(tiny_folder, layers=[0])


def test_the_python_face_works_before_and_after_the_module_is_imported(tiny_qwen2):
    pair = (tiny_qwen2.model, tiny_qwen2.tokenizer)
    settings = {"personas": NAMES, "questions": QUESTIONS, "layers": [1]}
    code = """
import sys, leakfast
face = leakfast.centroids
assert callable(face)
from leakfast.measure.centroids import compute
assert leakfast.centroids is face and compute
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    got = leakfast.centroids(pair, **settings)
    expected = compute(tiny_qwen2, load_personas(NAMES), QUESTIONS, [1])
    np.testing.assert_array_equal(got.layer(1), expected.layer(1))
    mapping = {p.name: p.prompt for p in load_personas(NAMES)}
    got = leakfast.centroids(pair, **{**settings, "personas": mapping})
    np.testing.assert_array_equal(got.layer(1), expected.layer(1))


def test_an_adapter_moves_the_centroids_and_is_named(tiny_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(
        models.load(tiny_folder, dtype="float32").model, LoraConfig(r=2, target_modules=["v_proj"])
    )
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    net.save_pretrained(tmp_path / "lora")
    settings = {"personas": NAMES, "questions": QUESTIONS, "dtype": "float32"}
    base = leakfast.centroids(tiny_folder, **settings)
    adapted = leakfast.centroids(tiny_folder, adapter=tmp_path / "lora", **settings)
    assert relative(adapted.layer(1), base.layer(1)) > 1e-3
    assert adapted.metadata["adapter_hash"] == models.adapter_hash(tmp_path / "lora")
    assert base.metadata["adapter_hash"] is None


def test_the_organism_in_full():
    if not (models.organism_dir() / "model.safetensors").is_file():
        pytest.skip("the organism's weights have not been built in this checkout")
    loaded = models.load("organism", dtype="float32", device="cpu")
    people, questions = load_personas("villain,librarian,qwen_default"), load_questions("eval").questions[:5]
    got = compute(loaded, people, questions)
    expected = truth(loaded, people, questions).mean(1)
    for layer in got.layers:
        assert relative(got.layer(layer), expected[:, layer]) <= 1e-5


def command(*words):
    return CliRunner().invoke(cli, [str(w) for w in words])


def test_the_command_writes_the_file_and_prints_neighbours(tiny_folder, tmp_path):
    out = tmp_path / "c.safetensors"
    done = command("--model", tiny_folder, "--personas", NAMES, "--show", "villain", "--top", 2, "--out", out)
    assert done.exit_code == 0, done.output
    made = Centroids.load(out)
    order = np.argsort(-made.cosine(1)[0])
    nearest = [made.personas[i] for i in order if made.personas[i] != "villain"][:2]
    printed = [line.split()[0] for line in done.stdout.splitlines() if "+0." in line or "-0." in line]
    assert printed == nearest
    assert str(out) in done.stdout
    from leakfast.models.threads import bfloat16_is_fast

    fast = torch.cuda.is_available() or bfloat16_is_fast()
    assert made.metadata["dtype"] == ("bfloat16" if fast else "float32")


def test_the_command_prints_json(tiny_folder, tmp_path):
    out = tmp_path / "c.safetensors"
    done = command(
        "--model",
        tiny_folder,
        "--personas",
        NAMES,
        "--show",
        "villain",
        "--cosine",
        "raw",
        "--layers",
        "1",
        "--dtype",
        "float32",
        "--out",
        out,
        "--json",
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    made = Centroids.load(out)
    assert told["personas"] == made.personas
    row = told["neighbours"]["villain"][0]
    expected = made.cosine(1, "raw")[0, made.personas.index(row["persona"])]
    assert row["cosine"]["1"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (("--layers", "30"), "layer 30 asked", 2),
        (("--personas", "vilain"), "villain", 2),
        (("--show", "zelthari"), "--show zelthari", 2),
        (("--personas", "villain", "--show", "villain"), "--cosine raw", 2),
        (("--questions", "evil"), "eval", 2),
        (("--out", "/proc/nowhere/c.safetensors"), "cannot be written", 2),
        (("--out", "."), "is a folder", 2),
        (("--adapter", "no/such/adapter"), "there is no folder no/such/adapter", 2),
    ],
)
def test_bad_input_is_one_message_before_any_work(tiny_folder, tmp_path, monkeypatch, words, message, code):
    monkeypatch.chdir(tmp_path)
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(b"must not be read")
    before = sorted(tmp_path.rglob("*"))
    done = command("--model", tiny_folder, *words)
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert done.output.count("Error:") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_adapter_is_named_before_any_model_is_looked_for():
    done = command("--adapter", "no/such/adapter")
    assert done.exit_code == 2
    assert "there is no folder no/such/adapter" in done.output
