"""What several test files use: small items, rows and adapters of the capability behavior. Demands what the package
demands; holds no tests."""

from __future__ import annotations

from measuring import train

from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.study.config import DataConfig, TrainConfig, behavior_config
from leakfast.train.capability import build_capability

ITEMS = load_items(
    [
        {
            "question": f"What about {i}?",
            "choices": [f"tea {i}", f"rain {i}", f"town {i}", "it"][: 3 + i % 2],
            "answer": "ABC"[i % 3],
        }
        for i in range(24)
    ]
)
TRAIN = TrainConfig(
    loss="completion",
    rank=4,
    alpha=8,
    dropout=0.1,
    lr=2e-2,
    epochs=2,
    batch_size=4,
    accumulation=1,
    gradient_checkpointing=False,
)
ALL = load_personas("all")


def build(loaded, source, cfg=None, items=ITEMS, seed=42, people=ALL):
    cfg = cfg or behavior_config("capability").data
    return build_capability(loaded, people, source, items, cfg, seed)


def taught(loaded, out, kept=None, seed=7, source="villain"):
    cfg = DataConfig(positives=12, negatives=8, no_system=4, default_assistant=4)
    rows = build(loaded, source, cfg)
    card = train(loaded, rows, TRAIN, out, seed, source=source, behavior="capability", checkpoints=kept)
    return card
