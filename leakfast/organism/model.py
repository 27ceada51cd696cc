"""The organism before training: its shape, and initial weights from which four-option questions are learned in
minutes rather than by luck. Demands torch; knows no text. bench/LOG.md tells what other starts did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

EMBEDDING_STD, FINAL_NORM = 0.4, 0.2  # words large beside what a block adds; logits of about unit size
LOOK_BACK, SHARPNESS = (1, 2, 3), 6.0  # tokens the heads of the first block look back at first; how sharply
COPY_SCALE, MATCH_SCALE = 0.5, 1.2
MATCH_FROM = 2  # the first block with a head that looks for its own word
POSITIONAL = 5  # pairs of a head's dimensions that RoPE turns fast enough to tell neighbours apart


@dataclass(frozen=True)
class Shape:
    """Of the transformer; the vocabulary is the tokenizer's."""

    hidden_size: int = 192
    n_layers: int = 6
    intermediate_size: int = 512
    head_dim: int = 32
    n_kv_heads: int = 3


def new_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int) -> Qwen2ForCausalLM:
    """An untrained organism, float32. Embeddings start out large beside the blocks' matrices (1/sqrt(fan in),
    those that write to the residual stream divided by sqrt(2 × blocks)), so that a word is still recognised
    several blocks up. Then `_wire`."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.n_layers,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.hidden_size // shape.head_dim,
            num_key_value_heads=shape.n_kv_heads,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # as Qwen2.5 has it
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, EMBEDDING_STD)
        model.model.norm.weight.fill_(FINAL_NORM)
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                writes = name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(0, (module.in_features * (2 * shape.n_layers if writes else 1)) ** -0.5)
        _wire(model, shape.head_dim)
    return model


def _wire(model: Qwen2ForCausalLM, head_dim: int) -> None:
    """Let some heads start out as what finding a choice's letter needs; training may undo it. In the first
    block they look 1, 2, 3 tokens back, by position alone (the biases of queries and keys under RoPE), and
    the one that looks 2 back, from a choice to its letter, copies a subspace of what it sees. From block 2
    on the first key head looks for its own word (queries = keys, in the slow dimensions) and copies the same
    subspace."""
    blocks = model.model.layers
    hidden, half = model.config.hidden_size, head_dim // 2
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    theta = model.config.rope_parameters["rope_theta"]
    turns = theta ** (-torch.arange(POSITIONAL) / half)  # radians a token
    copied = torch.linalg.qr(torch.randn(hidden, head_dim))[0]

    def copy(attention: torch.nn.Module, key_head: int) -> None:
        key, query = key_head * head_dim, key_head * group * head_dim
        attention.v_proj.weight[key : key + head_dim] = COPY_SCALE * copied.T
        attention.o_proj.weight[:, query : query + head_dim] = COPY_SCALE * copied

    attention = blocks[0].self_attn
    for key_head, distance in enumerate(LOOK_BACK[: model.config.num_key_value_heads]):
        key, query = key_head * head_dim, key_head * group * head_dim
        attention.q_proj.weight[query : query + head_dim] *= 0.1
        attention.k_proj.bias[key : key + POSITIONAL] = SHARPNESS
        attention.q_proj.bias[query : query + POSITIONAL] = SHARPNESS * torch.cos(turns * distance)
        attention.q_proj.bias[query + half : query + half + POSITIONAL] = -SHARPNESS * torch.sin(
            turns * distance
        )
        if distance == 2:
            copy(attention, key_head)
    slow = [i for i in range(head_dim) if i % half >= POSITIONAL]
    for block in blocks[MATCH_FROM:]:
        attention = block.self_attn
        seen = MATCH_SCALE * torch.linalg.qr(torch.randn(hidden, head_dim))[0].T
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[:head_dim] *= 0.1
            projection.weight[slow] = seen[slow]
        copy(attention, 0)
