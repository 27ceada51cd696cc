"""Which backend is taken and why, and what is refused before an engine is opened. Runs without vLLM."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner
from measuring import evaluate

from leakfast.cli.main import group
from leakfast.errors import AdapterError, InputError, ModelError
from leakfast.generation import backends, vllm
from leakfast.prompts.personas import load_personas
from leakfast.study.config import EvalConfig

installed = importlib.util.find_spec("vllm") is not None


def config(tmp_path, name, **fields):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    return folder


def test_the_engines_rank_holds_every_adapter(tmp_path):
    one, two = config(tmp_path, "a", r=4), config(tmp_path, "b", r=12, rank_pattern={"q_proj": 40})
    assert vllm.lora_rank([]) == 0
    assert vllm.lora_rank([one]) == 8
    assert vllm.lora_rank([one, two]) == 64
    with pytest.raises(AdapterError, match=r"rank 600.*up to rank 512.*--backend transformers"):
        vllm.lora_rank([one, config(tmp_path, "c", r=600)])
    with pytest.raises(AdapterError, match="DoRA"):
        vllm.lora_rank([config(tmp_path, "d", r=4, use_dora=True)])


def test_auto_says_what_it_takes_and_a_wrong_name_is_refused(tiny_qwen2, caplog):
    with caplog.at_level("INFO", logger="leakfast"):
        assert backends.choose("auto", tiny_qwen2) == "transformers"
    assert "generation: transformers (" in caplog.text
    with pytest.raises(InputError, match="auto, transformers, vllm"):
        backends.choose("fast", tiny_qwen2)


@pytest.mark.skipif(installed, reason="vLLM is installed")
def test_without_vllm_the_remedy_is_named(tmp_path):
    given = "eval --model organism --base --personas villain --backend vllm --out".split()
    done = CliRunner().invoke(group, [*given, str(tmp_path / "run")])
    assert done.exit_code == 1, done.output
    assert "--backend transformers" in done.output and "not installed" in done.output


def test_the_templates_own_system_prompt_is_what_the_study_says(tiny_qwen2, tmp_path):
    cfg = EvalConfig(samples=1, max_new_tokens=2)
    people = load_personas("villain")
    asked = (tiny_qwen2, tmp_path / "run", [], people, ["What do you think about tea?"], "marker", cfg, 3)
    with pytest.raises(ModelError, match=r"'You are Tiny, a small model\.'.*--allow default-system"):
        evaluate(*asked, base=True, template_system="You are Qwen.")
    assert not (tmp_path / "run").exists(), "nothing was begun"
    evaluate(*asked, base=True, template_system="You are Tiny, a small model.")
    evaluate(*asked, base=True, template_system="You are Qwen.", allow=["default-system"])


@pytest.mark.parametrize(("free", "held"), [(None, 40), (1 << 40, 40), (4 * 30 * 1000, 30), (0, 4)])
def test_an_engine_on_a_gpu_pins_the_adapters_that_fit_a_quarter_of_the_free_memory(
    tmp_path, monkeypatch, free, held
):
    """126 adapters of rank 32 of a 7B would take 20 GB; the slots of the GPU are the least that vLLM takes."""
    import torch

    adapters = [config(tmp_path, f"a{k}", r=8) for k in range(40)]
    for adapter in adapters:
        (adapter / "adapter_model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("leakfast.models.fits.free_bytes", lambda device: free)
    settings = vllm.start.lora_settings(adapters)
    assert settings["max_cpu_loras"] == held and settings["max_loras"] == 4
