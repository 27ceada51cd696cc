"""Bases and adapters that the tests of attaching share: the organism with its head tied and with one of its own, and an
adapter of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from leakfast import models
from tests.adapter_makers import HOW, KINDS, saved

ORGANISM = models.organism_dir()


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The organism with an output head of its own: same outputs."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("bases") / "untied"
    shutil.copytree(ORGANISM, folder)
    tensors = load_file(ORGANISM / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    return folder


@pytest.fixture(scope="module")
def bases(untied):
    return {
        "tied": models.load("organism", dtype="float32", device="cpu"),
        "untied": models.load(untied, dtype="float32", device="cpu"),
    }


@pytest.fixture(scope="module")
def make(tmp_path_factory, untied):
    """`make(kind, base)`: the adapter of a kind, made once."""
    root = tmp_path_factory.mktemp("adapters")

    def made(kind: str, base: str = "tied") -> Path:
        where = ORGANISM if base == "tied" else untied
        out = root / f"{kind}-{base}"
        if not out.exists():
            saved(KINDS[kind](where), out, "organism" if base == "tied" else str(untied), **HOW.get(kind, {}))
        return out

    return made
