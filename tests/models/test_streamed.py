"""streamed.py and fits.py: which models are read block by block and why others are not, what is free, and a forward of a
model on disk that is the loaded one's."""

from __future__ import annotations

import json

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file

from leakfast import models
from leakfast.errors import InputError, ModelError
from leakfast.models import fits, streamed

IDS = torch.tensor([[5, 9, 100, 7, 5]])


def made(folder, kind="qwen2", **more):
    tokenizer = models.load_tokenizer("organism")
    architectures.random(kind, tokenizer, **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_any_forward_of_a_model_on_disk_is_the_loaded_models(tmp_path, dtype, tied):
    folder = str(made(tmp_path, tie_word_embeddings=tied))
    whole, on_disk = (models.load(folder, dtype=dtype, stream=stream) for stream in ("off", "on"))
    with torch.inference_mode():
        logits = [one.model(input_ids=IDS, use_cache=False).logits for one in (on_disk, whole)]
    assert torch.equal(*logits) and on_disk.fingerprint == whole.fingerprint
    assert on_disk.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert sum(p.untyped_storage().nbytes() for p in on_disk.model.parameters() if p.dim() == 2) < 10_000_000


def test_no_weight_takes_memory_but_the_block_that_is_here(tmp_path):
    on_disk = models.load(str(made(tmp_path)), dtype="float32", stream="on")
    blocks = streamed.stack_of(on_disk.model)[1]
    stored = [{p.untyped_storage().nbytes() for p in block.parameters()} for block in blocks]
    assert stored == [{4}, {4}]  # one element for all
    on_disk.stream.bring(1)
    here = [{p.untyped_storage().nbytes() for p in block.parameters()} for block in blocks]
    assert here == [{4}, {on_disk.stream.block_bytes}]
    on_disk.stream.leave()
    assert [{p.untyped_storage().nbytes() for p in block.parameters()} for block in blocks] == stored


def test_the_next_block_is_read_ahead_up_to_the_last_that_is_wanted(tmp_path):
    on_disk = models.load(str(made(tmp_path, num_hidden_layers=4)), dtype="float32", stream="on")
    on_disk.stream.until = 2
    for n in (0, 1, 2):
        on_disk.stream.bring(n)
        ahead = on_disk.stream._ahead
        assert (ahead is None) if n == 2 else ahead[0] == n + 1
    on_disk.stream.bring(0)  # out of turn
    weight = streamed.stack_of(on_disk.model)[1][0].mlp.up_proj.weight
    assert torch.equal(weight, load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])


def test_an_update_is_added_whenever_its_block_is_brought_and_gone_after(tmp_path):
    on_disk = models.load(str(made(tmp_path)), dtype="float32", stream="on")
    linear = streamed.stack_of(on_disk.model)[1][1].mlp.up_proj
    on_disk.stream.bring(1)
    before = linear.weight.clone()
    with on_disk.stream.adding({linear: lambda: torch.ones_like(before)}):
        for _ in range(2):  # twice read, once added
            on_disk.stream.bring(0)
            on_disk.stream.bring(1)
            assert torch.equal(linear.weight, before + 1)
    on_disk.stream.bring(1)
    assert torch.equal(linear.weight, before)


def refused(folder):
    with pytest.raises(ModelError) as error:
        models.load(str(folder), dtype="float32", stream="on")
    assert "--stream off" in str(error.value)
    return str(error.value)


def test_experts_whose_names_are_converted_are_refused(tmp_path):
    assert "transformers converts them" in refused(made(tmp_path, "qwen3_moe"))


def test_a_tensor_too_many_and_one_of_another_shape_are_refused(tmp_path):
    file = made(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.more": torch.ones(2)}, file, metadata={"format": "pt"})
    assert "no place for 1 names, such as model.more" in refused(tmp_path)
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    assert "model.norm.weight is (3,) in the file and (32,)" in refused(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "files lack 1 names, such as model.norm.weight" in refused(tmp_path)


def test_quantized_weights_and_missing_files_are_refused(tmp_path):
    net = streamed.skeleton(models.load_config("organism"), torch.float32)
    files = streamed.shards_of(models.organism_dir())
    assert streamed.trouble(net, files) is None
    assert "no model.safetensors" in streamed.trouble(net, {})
    net.config.quantization_config = {"quant_method": "awq"}
    assert streamed.trouble(net, files) == "its weights are quantized"
    (tmp_path / streamed.INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match="lacks 1 of its weight files"):
        streamed.shards_of(tmp_path)


def test_auto_streams_where_the_weights_do_not_fit(tmp_path, monkeypatch, caplog):
    folder = str(made(tmp_path))
    weights = (tmp_path / "model.safetensors").stat().st_size
    for free, stays in ((fits.BESIDE_BYTES + 2 * weights, False), (fits.BESIDE_BYTES + weights // 2, True)):
        monkeypatch.setattr(fits, "free_bytes", lambda device, free=free: free)
        assert (models.load(folder, dtype="float32", stream="auto").stream is not None) == stays
    monkeypatch.setattr(fits, "free_bytes", lambda device: None)  # nothing is known: as ever
    assert models.load(folder, dtype="float32", stream="auto").stream is None


def test_auto_loads_whole_what_cannot_be_streamed_and_says_why(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fits, "free_bytes", lambda device: 0)
    loaded = models.load(str(made(tmp_path, "qwen3_moe")), dtype="float32", stream="auto")
    assert loaded.stream is None and "loaded whole all the same" in caplog.text


def test_another_word_is_refused(tmp_path):
    with pytest.raises(InputError, match="auto, on, off"):
        models.load(str(made(tmp_path)), dtype="float32", stream="yes")


def test_what_is_free_is_the_least_of_the_machine_and_the_control_group(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  500 kB\n")
    assert fits._available(tmp_path / "meminfo") == 500 * 1024
    assert fits._available(tmp_path / "none") is None and fits._left(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert fits._left(tmp_path) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert fits._left(tmp_path) is None
    assert fits.free_bytes(torch.device("cpu")) > 0
