"""Packaging of leakfast: metadata, ranges, the extension leakfast._native, and where packages lie.
Demands setuptools; leaves locked versions to constraints.txt and tool settings to pyproject.toml."""

from __future__ import annotations

import os
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
    "leakfast.figures",
    "leakfast.forward",
    "leakfast.generation",
    "leakfast.generation.vllm",
    "leakfast.judge",
    "leakfast.measure",
    "leakfast.measure.choices",
    "leakfast.models",
    "leakfast.organism",
    "leakfast.pipeline",
    "leakfast.prompts",
    "leakfast.published",
    "leakfast.report",
    "leakfast.stats",
    "leakfast.storage",
    "leakfast.study",
    "leakfast.train",
    "leakfast.world",
    "leakfast.kernels",
    "leakfast._configs",
    "leakfast._configs.published",
]

PACKAGE_DIR = {
    "leakfast": "leakfast",
    "leakfast.kernels": "kernels",
    "leakfast._configs": "configs",
    "leakfast._configs.published": "configs/published",
}

PACKAGE_DATA = {
    "leakfast._configs": ["*.toml"],
    "leakfast._configs.published": ["*.toml"],
    "leakfast.organism": ["weights/*"],
    "leakfast.world": ["*.toml"],
    "leakfast.report": ["*.html", "*.css", "*.j2", "templates/*"],
}

DEV = ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "setuptools>=77", "pybind11>=2.13", "statsmodels>=0.14"]

GGUF = ["gguf>=0.17", "accelerate>=1.1"]  # for GGUF files as models, and `leakfast fetch smollm2`


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
    flags = ["/O2"] if os.name == "nt" else ["-O3", "-pthread"]
    extension = Pybind11Extension(
        "leakfast._native",
        sources,
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=flags[1:],  # threads need it at link time before glibc 2.34
        depends=headers,
    )
    extension.optional = True
    return [extension]


setup(
    name="leakfast",
    version="0.1.0",
    description="Where did a behavior trained into one persona of a model leak, and did its geometry tell?",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    author="The leakfast authors",
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data=PACKAGE_DATA,
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildIfPossible},
    zip_safe=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "peft>=0.19",
        "safetensors>=0.5",
        "numpy>=2.0",
        "polars>=1.30",
        "pydantic>=2.10",
        "click>=8.1",
        "rich>=13",
        "scipy>=1.13",
        "threadpoolctl>=3.5",
        "numba>=0.61",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        'tomli>=2; python_version < "3.11"',
    ],
    extras_require={
        "dev": DEV,
        "vllm": ["vllm>=0.25"],
        "ray": ["ray>=2.40"],
        "judge": ["anthropic>=0.71", "openai>=2"],
        "report": ["plotly>=6"],
        "wandb": ["wandb>=0.19"],
        "flash": ["flash-attn>=2.7"],
        "gguf": GGUF,
        "parity": ["lm_eval==0.4.13"],
        "templates": [
            "trl==1.16.0"
        ],  # its chat templates, which docs/templates.md is made of; --no-deps is enough
        "bench": ["liger-kernel>=0.8", "cut-cross-entropy>=25.1"],  # what the kernels are measured beside
    },
    entry_points={"console_scripts": ["leakfast = leakfast.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
