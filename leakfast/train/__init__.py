"""Training: rows (data.py, pairs.py, capability.py: one builder a kind of behavior), an adapter from rows
(`train_adapter`; several at once: company.py; all weights: full.py), and a learning rate by trial (search.py). Demands a
loaded model without an adapter; leaves it bit-identical. Which rows and adapters a run holds is leakfast.pipeline's business."""

from typing import Any

__all__ = ["train_adapter"]


def __getattr__(name: str) -> Any:  # loaded when asked for, as it needs torch
    if name != "train_adapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from leakfast.train.lora import train_adapter

    return train_adapter
