"""Repositories on the Hugging Face Hub: a dataset with the tables of a run, and a model for each adapter, each with a card.
Demands huggingface_hub, a token (HF_TOKEN, or `hf auth login`) and a server (HF_ENDPOINT); sends no completions and no
checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leakfast.errors import InputError, SinkError
from leakfast.progress import Progress
from leakfast.sinks import cards
from leakfast.sinks.material import Material
from leakfast.sinks.places import Sent, Target
from leakfast.storage import layout
from leakfast.storage.disk import file_hash

log = logging.getLogger("leakfast.export")

_CARD = "README.md"
Files = dict[str, Path | bytes]  # path in the repository → a file, or its bytes


def send(material: Material, asked: Target, progress: Progress) -> Sent:
    """Dataset `asked.where` and models `<asked.where>-<adapter>`, private unless the target is public. A file that the
    repository has with the same hash is not sent again. Raises InputError without a token that may write, SinkError where
    the server refuses or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="leakfast")
    done, models = Sent("hub", f"{api.endpoint}/datasets/{asked.where}"), {}
    repos = _model_repos(asked.where, material.adapters())
    for adapter, repo in repos.items():
        files = _adapter_files(material, adapter)
        if "adapter_model.safetensors" not in files:
            whole = material.run.has(f"{layout.adapter(adapter)}/config.json")
            why = "is a whole model, which is not sent" if whole else "its weights are not in the run"
            done.left_out.append(f"{adapter}: {why}")
            continue
        if material.card(adapter) is None:
            done.left_out.append(f"{adapter}: has no card, so that its page cannot say how it was trained")
        models[repo] = files | {_CARD: cards.model_card(material, adapter, asked.where).encode()}
        _warn_of_paths(files, adapter)
    work = [("dataset", asked.where, _dataset_files(material, list(models)))]
    work += [("model", repo, files) for repo, files in models.items()]
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        for number, (kind, repo, files) in enumerate(work):
            progress(number, len(work), repo)
            with _said(repo):
                sent, kept = _push(api, kind, repo, files, asked.public)
            done.sent += [f"{repo}/{path}" for path in sent]
            done.kept += [f"{repo}/{path}" for path in kept]
    finally:
        if shown:
            enable_progress_bars()
    progress(len(work), len(work), "")
    return done


def _dataset_files(material: Material, models: list[str]) -> Files:
    run, files = material.run, Files()
    tables = {name: layout.table(name) for name in material.stats.all_tables() if run.has(layout.table(name))}
    for path in tables.values():
        files[path] = run.path / path
    if run.check_study() is not None:
        files[layout.STUDY] = run.path / layout.STUDY
    return files | {_CARD: cards.dataset_card(material, tables, models).encode()}


def _adapter_files(material: Material, adapter: str) -> Files:
    run, folder = material.run, layout.adapter(adapter)
    return {name: run.path / folder / name for name in cards.ADAPTER_FILES if run.has(f"{folder}/{name}")}


def _model_repos(where: str, adapters: list[str]) -> dict[str, str]:
    """Adapter → its repository, one each: names that the Hub would have alike (a + is none of its characters) get a hash."""
    plain = {adapter: _model_repo(where, adapter) for adapter in adapters}
    taken = Counter(repo.lower() for repo in plain.values())
    return {
        adapter: repo
        if taken[repo.lower()] == 1
        else _model_repo(where, f"{adapter}-{hashlib.sha256(adapter.encode()).hexdigest()[:8]}")
        for adapter, repo in plain.items()
    }


def _model_repo(where: str, adapter: str) -> str:
    """The Hub takes letters, digits, - _ . and no two of - or . in a row; 96 characters of a name at most."""
    owner, name = where.split("/")
    whole = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in f"{name}-{adapter}")
    while "--" in whole or ".." in whole:
        whole = whole.replace("--", "-").replace("..", ".")
    if len(whole) > 96:
        whole = f"{whole[:87]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return f"{owner}/{whole.strip('-.')}"


def _warn_of_paths(files: Files, adapter: str) -> None:
    """peft names the base model as it was loaded, which may be a folder of this machine."""
    path = files.get(layout.ADAPTER)
    if isinstance(path, Path):
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).is_absolute():
            log.warning(
                "export: %s of %s names the base model by a folder: %s", layout.ADAPTER, adapter, base
            )


def _push(api: Any, kind: str, repo: str, files: Files, public: bool) -> tuple[list[str], list[str]]:
    """(paths sent, paths that were there with the same hash), in one commit or none."""
    from huggingface_hub import CommitOperationAdd

    api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
    there = {entry.path: entry for entry in api.get_paths_info(repo, list(files), repo_type=kind)}
    changed = [path for path, content in files.items() if not _same(there.get(path), content)]
    if changed:
        operations = [
            CommitOperationAdd(path, content if isinstance(content := files[path], bytes) else str(content))
            for path in changed
        ]
        api.create_commit(
            repo, operations, repo_type=kind, commit_message=f"Files of a leakfast run ({len(changed)})"
        )
    return changed, [path for path in files if path not in changed]


def _same(entry: Any, content: Path | bytes) -> bool:
    """Whether the repository's file has these bytes: by SHA-256 where it is stored as a large file, else by git's hash."""
    if entry is None:
        return False
    if getattr(entry, "lfs", None) is not None:
        ours = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_hash(content)
        return bool(entry.lfs.sha256 == ours)
    data = content if isinstance(content, bytes) else content.read_bytes()
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@contextmanager
def _said(repo: str) -> Iterator[None]:
    """The Hub's refusals in our words."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise _no_right(repo, "no token") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise _no_right(repo, f"the answer {status}") from error
        raise _refused(repo, error) from error
    except (HTTPError, RuntimeError, ValueError, OSError) as error:
        raise _refused(repo, error) from error


def _no_right(repo: str, found: str) -> InputError:
    return InputError(
        f"export: {repo} cannot be written with {found}. Needed: a token of the Hub with the right to write there. Type: "
        "hf auth login, or put HF_TOKEN=… before the command."
    )


def _refused(repo: str, error: BaseException) -> SinkError:
    return SinkError(
        f"export: the Hub did not take {repo}: {' '.join(str(error).split())}. The run directory is as it was, and what was "
        "taken stays there. Type the same command again."
    )
