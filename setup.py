"""Packaging of leakfast: the extension leakfast._native, and where packages lie. Demands setuptools; leaves metadata,
ranges and tool settings to pyproject.toml, locked versions to constraints.txt."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Listed one by one, because kernels/ must have no __init__.py and configs/ is data; a test compares
# this list with the tree.
PACKAGES = [
    "leakfast",
    "leakfast.behaviors",
    "leakfast.cli",
    "leakfast.cluster",
    "leakfast.figures",
    "leakfast.forward",
    "leakfast.generation",
    "leakfast.generation.vllm",
    "leakfast.judge",
    "leakfast.measure",
    "leakfast.measure.choices",
    "leakfast.measure.predictors",
    "leakfast.measure.probability",
    "leakfast.models",
    "leakfast.organism",
    "leakfast.pipeline",
    "leakfast.pipeline.checks",
    "leakfast.prompts",
    "leakfast.published",
    "leakfast.report",
    "leakfast.sinks",
    "leakfast.stats",
    "leakfast.steering",
    "leakfast.storage",
    "leakfast.study",
    "leakfast.train",
    "leakfast.world",
    "leakfast.kernels",
    "leakfast._configs",
    "leakfast._configs.openings",
    "leakfast._configs.published",
]

PACKAGE_DIR = {
    "leakfast": "leakfast",
    "leakfast.kernels": "kernels",
    "leakfast._configs": "configs",
    "leakfast._configs.openings": "configs/openings",
    "leakfast._configs.published": "configs/published",
}

PACKAGE_DATA = {
    "leakfast": ["py.typed"],
    "leakfast._configs": ["*.toml"],
    "leakfast._configs.openings": ["*.toml"],
    "leakfast._configs.published": ["*.toml"],
    "leakfast.organism": ["weights/*"],
    "leakfast.world": ["*.toml"],
    "leakfast.report": ["*.html", "assets/*", "assets/vendor/*"],
}


class BuildIfPossible(build_ext):
    """build_ext that forgets an optional extension it could not build, so that every kind of install,
    the strict editable one too, goes on without it."""

    def run(self) -> None:
        super().run()
        built = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()]
        if len(built) < len(self.extensions):
            print("leakfast: no working C++ compiler, so it will plan in Python", file=sys.stderr)
        self.extensions = built


def extensions() -> list:
    """leakfast._native from csrc/*.cpp. Optional: without a compiler leakfast plans in Python."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        print("leakfast: pybind11 is not here, so leakfast._native is not built", file=sys.stderr)
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h*"))
    if not sources:
        return []
    extension = Pybind11Extension(
        "leakfast._native",
        sources,
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread"],
        extra_link_args=["-pthread"],  # threads need it at link time before glibc 2.34
        depends=headers,
    )
    extension.optional = True
    return [extension]


setup(
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data=PACKAGE_DATA,
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildIfPossible},
    zip_safe=False,
)
