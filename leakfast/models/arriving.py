"""Says in the log how much of a hub model has arrived, while it is fetched for the first time: tens of gigabytes take longer
than a driver waits for a worker that says nothing. Demands huggingface_hub's cache; fetches nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

EVERY_S = 60.0


@contextmanager
def told(name: str, every_s: float = EVERY_S) -> Iterator[None]:
    """A line whenever more of the hub model `name` lies in the cache than at the last one; none where nothing comes."""
    ended, at_first = threading.Event(), arrived_bytes(name)

    def watch() -> None:
        before = at_first
        while not ended.wait(every_s):
            now = arrived_bytes(name)
            if now > before:
                log.info("model: %s: %.1f GB have arrived", name, now / 1e9)
            before = now

    watcher = threading.Thread(target=watch, daemon=True, name="leakfast-arriving")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def arrived_bytes(name: str) -> int:
    """Bytes of a hub model in the cache, whole files and begun ones."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "blobs"
    total = 0
    for path in blobs.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it was begun under another name
            continue
    return total
