"""What is installed is whole: wheel, sdist and editable install, with and without a compiler, away
from the checkout. Builds from a copy of the tree; needs no network."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from archives import extracted

import leakfast

pytestmark = pytest.mark.long

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FALSE = shutil.which("false") or "/bin/false"
NO_COMPILER = {"CC": FALSE, "CXX": FALSE}
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "runs", "build", "dist", "*.so", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
)


def copy_tree(to: Path) -> Path:
    shutil.copytree(ROOT, to, ignore=LEFT_OUT, symlinks=True)
    return to


def build(tree: Path, what: str, out: Path, settings: dict | None = None, **env: str) -> Path:
    """The file that setuptools' backend makes of `tree`: what = wheel, sdist or editable."""
    out.mkdir(parents=True, exist_ok=True)
    call = f"build_{what}({str(out)!r}{'' if settings is None else f', {settings!r}'})"
    code = f"from setuptools import build_meta; print('made', build_meta.{call})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out / re.findall(r"^made (\S+)$", done.stdout, re.MULTILINE)[-1]


def unpack(wheel: Path, to: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(to)
    return to


def python(code: str, cwd: Path, *folders: Path, pth: Path | None = None) -> str:
    """Standard output of `code` in a Python that knows our libraries and `folders`, but no other leakfast:
    without site, so that the editable install this suite runs in is not found."""
    libraries = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    libraries += [p for p in [*site.getsitepackages(), site.getusersitepackages()] if p not in libraries]
    head = f"import sys; sys.path[1:1] = {[str(f) for f in folders]!r}; sys.path += {libraries!r}\n"
    if pth is not None:
        head += f"import site; site.addsitedir({str(pth)!r})\n"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", head + code],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_tree(folder / "tree"), "wheel", folder / "out")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return unpack(wheel, tmp_path_factory.mktemp("installed"))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def setup_constant(name: str):
    module = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = [n.value for n in module.body if isinstance(n, ast.Assign) and n.targets[0].id == name]
    return ast.literal_eval(values[0])


def test_packages_are_listed_as_they_stand():
    packages, places = setup_constant("PACKAGES"), setup_constant("PACKAGE_DIR")
    tree = {
        str(p.parent.relative_to(ROOT)).replace(os.sep, ".") for p in ROOT.glob("leakfast/**/__init__.py")
    }
    mapped = {name for name in places if name != "leakfast"}
    assert tree == set(packages) - mapped
    configs = {"leakfast._configs", "leakfast._configs.openings", "leakfast._configs.published"}
    assert mapped == {"leakfast.kernels"} | configs
    folders = {p.parent for p in (ROOT / "configs").rglob("*.toml")} | {ROOT / "kernels"}
    assert {ROOT / places[name] for name in mapped} == folders


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_that_of_the_package(installed):
    """It stands once, in version.py; the changelog and the citation name it too."""
    assert "version" in project()["project"]["dynamic"]
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.version == leakfast.__version__
    assert f"## {leakfast.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {leakfast.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_locked_versions_lie_in_the_ranges():
    from packaging.requirements import Requirement

    told = project()["project"]
    extras = told["optional-dependencies"]
    wanted = [Requirement(r) for r in [*told["dependencies"], *extras["dev"], *extras["docs"]]]
    locked: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            locked.setdefault(requirement.name, []).append(requirement)
    for need in wanted:
        assert need.name in locked, f"{need.name} is not locked"
        for lock in locked[need.name]:
            version = next(iter(lock.specifier)).version
            assert version in need.specifier, f"{need} but locked {version}"


def test_the_hooks_lint_with_the_locked_ruff():
    locked = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==([\d.]+)", hooks)) == {locked[1]}


def test_every_extra_that_is_advised_exists():
    extras = set(project()["project"]["optional-dependencies"])
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("leakfast/**/*.py"),
    ]
    for path in [*pages, ROOT / "Makefile"]:
        for words in re.findall(r"(?:leakfast|'\.)\[([a-z,]+)\]", path.read_text(encoding="utf-8")):
            assert set(words.split(",")) <= extras, f"{path.name}: {words}"


def test_the_wheel_holds_every_file(wheel):
    expected = {str(p.relative_to(ROOT)) for p in ROOT.glob("leakfast/**/*.py")}
    expected |= {f"leakfast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    expected |= {
        f"leakfast/_configs/{p.relative_to(ROOT / 'configs')}" for p in ROOT.glob("configs/**/*.toml")
    }
    data = [p for p in ROOT.glob("leakfast/**/*") if p.is_file() and p.suffix not in (".py", ".so")]
    data = [p for p in data if p.parent.name != "__pycache__"]
    expected |= {str(p.relative_to(ROOT)) for p in data}
    held = {n for n in names(wheel) if ".dist-info/" not in n}
    native = {n for n in held if n.startswith("leakfast/_native")}
    assert held - native == {n.replace(os.sep, "/") for n in expected}
    assert "leakfast/py.typed" in held
    assert bool(native) == bool(shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"))


WORKS = """
import json, importlib.util, pathlib
import leakfast, leakfast.kernels.reference as reference
from leakfast import doctor
from leakfast.forward import forest
from leakfast.prompts import personas
from leakfast.storage import documents
from leakfast.study import config
print(json.dumps({
    "at": leakfast.__file__, "kernels": reference.__file__, "found": str(documents.resource("demo.toml")),
    "personas": len(personas.load_personas()), "study": config.load_study("configs/demo.toml").name,
    "native": doctor.native_extension(), "segments": len(forest.plan([[1, 2, 3], [1, 2, 4]], 100).q_offsets) - 1,
    "weights": sorted(p.name for p in (pathlib.Path(leakfast.__file__).parent / "organism/weights").glob("*")),
}))
"""


def test_the_wheel_works_away_from_the_checkout(installed, tmp_path):
    told = json.loads(python(WORKS, tmp_path, installed).splitlines()[-1])
    assert told["at"].startswith(str(installed))
    assert told["kernels"] == str(installed / "leakfast" / "kernels" / "reference.py")
    assert told["found"] == str(installed / "leakfast" / "_configs" / "demo.toml")
    assert (told["personas"], told["study"]) == (111, "demo")
    assert told["weights"] == sorted(p.name for p in (ROOT / "leakfast/organism/weights").glob("*"))
    assert told["segments"] > 0


def test_the_console_script_is_there(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    (script,) = distribution.entry_points
    assert (script.name, script.value) == ("leakfast", "leakfast.cli.main:main")
    assert distribution.metadata["License-Expression"] == "MIT" or distribution.metadata["License"] == "MIT"


def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    wheel = build(tree, "wheel", tmp_path / "out", **NO_COMPILER)
    assert not any("_native" in name for name in names(wheel))
    at = unpack(wheel, tmp_path / "installed")
    told = json.loads(python(WORKS, tmp_path, at).splitlines()[-1])
    assert told["native"][0] is False
    assert "no C++ compiler" in told["native"][1]
    assert told["segments"] > 0, "the Python planner plans"
    said = python(
        "import logging, io; out = io.StringIO(); logging.basicConfig(stream=out, level=logging.WARNING)\n"
        "from leakfast.forward import forest\nfor _ in range(3): forest.plan([[1, 2]], 10)\nprint(out.getvalue())",
        tmp_path,
        at,
    )
    assert said.count("planning in Python") == 1, "said once"
    code = "from leakfast.cli.main import main; main(['doctor', '--json'])"
    planner = [p for p in json.loads(python(code, tmp_path, at))["paths"] if p["what"] == "forest planner"]
    assert planner[0]["chosen"] == "Python"
    assert "no C++ compiler" in planner[0]["why"]


def test_the_sdist_makes_the_same_wheel(wheel, tmp_path):
    sdist = build(copy_tree(tmp_path / "tree"), "sdist", tmp_path / "out")
    with tarfile.open(sdist) as archive:
        extracted(archive, tmp_path / "src")
    (source,) = (tmp_path / "src").iterdir()
    for path in [
        *ROOT.glob("csrc/*"),
        *ROOT.glob("tests/**/*.py"),
        ROOT / "Makefile",
        ROOT / "constraints.txt",
    ]:
        assert (source / path.relative_to(ROOT)).is_file(), path.name
    again = build(source, "wheel", tmp_path / "again", **NO_COMPILER)
    assert names(again) == {n for n in names(wheel) if "_native" not in n}


@pytest.mark.parametrize("mode", [None, "compat", "strict"])
def test_editable_installs_find_everything(tmp_path, mode):
    tree = copy_tree(tmp_path / "tree")
    wheel = build(
        tree, "editable", tmp_path / "out", {"editable_mode": mode} if mode else None, **NO_COMPILER
    )
    at = unpack(wheel, tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    for cwd in (tree, tmp_path / "elsewhere"):
        told = json.loads(python(WORKS, cwd, at, pth=at).splitlines()[-1])
        assert told["at"].startswith(str(tree)), told
        assert told["kernels"].endswith(("/kernels/reference.py",))
        assert told["personas"] == 111


def test_our_kernels_folder_does_not_pose_as_the_package_kernels(tmp_path):
    """transformers looks for an optional package `kernels`: from the checkout's root it must find the
    real one if there is one, and load without it if there is none."""
    tree = copy_tree(tmp_path / "tree")
    real = tmp_path / "real" / "kernels"
    real.mkdir(parents=True)
    (real / "__init__.py").write_text("REAL = True\n")
    code = "import kernels, leakfast.kernels.reference as ours; print(kernels.REAL, ours.__file__)"
    assert python(code, tree, tree, real.parent).split() == ["True", str(tree / "kernels" / "reference.py")]
    code = (
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "import leakfast.kernels.reference\n"
        "tiny = Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "                   num_attention_heads=1, num_key_value_heads=1)\n"
        "print(Qwen2ForCausalLM(tiny).num_parameters() > 0)"
    )
    assert python(code, tree, tree).strip() == "True"
