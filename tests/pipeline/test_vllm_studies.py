"""How a study has vLLM run: its tables and a flag's precedence, and what cannot be drawn said before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import leakfast
from leakfast.cli.main import group
from leakfast.errors import InputError, ModelError
from leakfast.generation import backends, vllm
from leakfast.generation.backends import Drawing
from leakfast.pipeline import preflight
from leakfast.study.config import load_study

pytestmark = pytest.mark.long

VLLM = """
name = "many"
model = "organism"
dtype = "float32"
backend = "vllm"
template_system = "You are a model."
allow = ["logits"]
personas = ["villain", "assistant"]
sources = ["villain"]
[vllm]
lora = "merged"
invariant = true
[behaviors.marker.eval]
samples = 1
"""


def test_a_study_says_how_vllm_runs_and_a_flag_goes_before_it(tmp_path):
    study = tmp_path / "many.toml"
    study.write_text(VLLM)
    options = backends.Options(lora="merged", invariant=True)
    assert Drawing.of(load_study(study)) == Drawing("vllm", "You are a model.", ("logits",), options)
    flags = {"backend": "transformers", "lora": "live", "data_parallel": 2, "tensor_parallel": None}
    beside = Drawing.of(load_study(study), allow=("token-ids",), **flags)
    assert (beside.backend, beside.allow) == ("transformers", ("token-ids",))
    assert beside.options == backends.Options("live", invariant=True, data_parallel=2)
    assert Drawing.of(None) == Drawing("auto")
    study.write_text(VLLM.replace("invariant = true", "data_paralel = 8"))
    with pytest.raises(InputError, match=r"many.toml, line 12: .*data_paralel.*data_parallel"):
        load_study(study)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("invariant = true", "data_parallel = 2"), r"--lora merged swaps.*\(in a study: .*\[vllm\]"),
        (("samples = 1", "samples = 1\ntemperature = 3.0"), "temperature 3 given, but vLLM draws"),
        (("invariant", "# invariant"), "default system prompt is 'You are a model.'.*in a study: .*allow"),
        (("[vllm]", "[vllm]\n# not here"), "this machine has none"),
    ],
)
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_what_cannot_be_drawn_is_said_before_anything_is_trained(
    tmp_path, monkeypatch, changed, message, command
):
    """Which is hours before the first completion."""
    for where in ("leakfast.measure.centroids", "leakfast.pipeline.sweep"):
        monkeypatch.setattr(f"{where}.compute", lambda *a, **k: pytest.fail("work was begun"))
    monkeypatch.setattr(
        "leakfast.pipeline.adapters.train_adapter", lambda *a, **k: pytest.fail("training was begun")
    )

    def machine(**asked):
        assert asked == {
            "data_parallel": 1,
            "tensor_parallel": 1,
            "invariant": "# inv" not in study.read_text(),
        }
        if "not here" in study.read_text():
            raise ModelError("this machine has none")

    monkeypatch.setattr(vllm, "check_machine", machine)
    study = tmp_path / "many.toml"
    assert changed[0] in VLLM
    study.write_text(VLLM.replace(*changed))
    words = [
        "sweep",
        "--study",
        str(study),
        "--behavior",
        "marker",
        "--source",
        "villain",
        "--point",
        "1e-3:1",
    ]

    def begun():
        if command == "run":
            leakfast.run(study, out=tmp_path / "run")
        raise InputError(CliRunner().invoke(group, [*words, "--out", str(tmp_path / "run")]).stderr)

    with pytest.raises((InputError, ModelError), match=message):
        begun()


LATER = """
[behaviors."marker+more"]
after = "marker"
stacked = true
[behaviors."marker+more".eval]
samples = 1
"""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ('[behaviors.marker.train]\nmethod = "dora"', r'marker will be DoRA, .*backend = "transformers"'),
        ("[behaviors.marker.train]\nrank = 520", r"marker will have rank 520, .* up to rank 512 .*merged"),
        ("[behaviors.marker.train]\nrank = 500" + LATER, "more will have rank 532"),
        ("[behaviors.marker.train]\nrank = 512", None),
        ('measure = "probability"\n[behaviors.marker.train]\nmethod = "dora"', None),
    ],
)
def test_adapters_that_vllm_will_not_run_are_said_before_they_are_trained(
    tmp_path, monkeypatch, changed, message
):
    """Which was hours later, where the first replies were to be drawn of them."""
    monkeypatch.setattr(backends, "settle", lambda *given, **named: "vllm")
    study = tmp_path / "many.toml"
    study.write_text(VLLM.replace('lora = "merged"', 'lora = "live"') + changed)
    read, run = load_study(study), SimpleNamespace(shards=lambda folder: [])

    def check():
        preflight.check_drawing(read, list(read.behaviors), run, lambda: None)

    if message is None:
        check()
        return
    with pytest.raises(InputError, match=message):
        check()
    if "rank" in message:
        study.write_text(VLLM + changed)
        read = load_study(study)
        check()  # merged weights are of no rank


def test_a_machine_is_looked_at_where_an_engine_is_to_be_opened(tiny_qwen2, monkeypatch):
    """Not where a finished run is read again."""

    def settled(options, **more):
        return backends.settle(tiny_qwen2, Drawing("vllm", options=options), [], adapters=False, **more)

    options = backends.Options(tensor_parallel=2, data_parallel=3)
    assert settled(options=options) == "vllm"
    monkeypatch.setattr("leakfast.generation.vllm.start.available", lambda: (False, "it is not installed"))
    with pytest.raises(ModelError, match=r"it is not installed.*--backend transformers"):
        settled(options=options, opens=True)
    monkeypatch.setattr("leakfast.generation.vllm.start.available", lambda: (True, ""))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(
        InputError, match=r"--data-parallel 3 × --tensor-parallel 2 needs 6 GPUs, but there are 4"
    ):
        settled(options=options, opens=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert settled(options=options, opens=True) == "vllm"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="runs on GPUs alone"):
        settled(options=backends.Options(invariant=True), opens=True)


def test_where_transformers_draws_a_studys_vllm_is_not_used(tiny_qwen2, tmp_path, caplog):
    """A study for a node of GPUs is tried on a laptop; what somebody types there is an error."""
    study = tmp_path / "many.toml"
    study.write_text(VLLM.replace("invariant = true", "").replace('backend = "vllm"', ""))
    asked = replace(Drawing.of(load_study(study), backend="transformers"), template_system=None)
    assert backends.settle(tiny_qwen2, asked, [], adapters=True) == "transformers"
    assert "under [vllm] is not used" in caplog.text
    typed = Drawing.of(load_study(study), backend="transformers", data_parallel=2, lora="live")
    with pytest.raises(InputError, match="are vLLM's, but the backend is transformers"):
        typed.options.check("transformers")


def test_eval_draws_as_its_study_says(tmp_path, monkeypatch):
    seen = []

    def noted(loaded, run, request, drawing, **how):
        seen.append(drawing)
        raise InputError("enough")

    monkeypatch.setattr("leakfast.measure.as_asked.measure", noted)
    study = tmp_path / "many.toml"
    study.write_text(VLLM)
    words = ["eval", "--study", str(study), "--base", "--out", str(tmp_path / "run")]
    for more in ([], ["--backend", "transformers", "--lora", "live"]):
        assert CliRunner().invoke(group, [*words, *more]).exception is not None
    assert seen == [
        Drawing.of(load_study(study)),
        Drawing.of(load_study(study), backend="transformers", lora="live"),
    ]
