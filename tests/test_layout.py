"""The walls of the house: who may import whom, who alone may do what, and what no file may hold.
Reads the sources; demands nothing heavy."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "leakfast"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
OURS = [*SOURCES, *KERNELS, *sorted((ROOT / "bench").rglob("*.py")), *sorted((ROOT / "tests").glob("*.py"))]

# Floors of the house: a module imports from its own floor or below. A new module is given its floor here.
FLOORS = [
    {"errors", "schema"},
    {
        "files",
        "disk",
        "lines",
        "tuning",
        "interrupts",
        "threads",
        "formats",
        "reasoning",
        "rendering",
        "layers",
    },
    {"personas", "question_sets", "items", "answers", "pairs"},
    {"config", "study_words", "store", "detect", "behaviors"},
    {"tokenizer_file", "tokenizer_probes"},
    {
        "chat",
        "templates",
        "ops",
        "forest",
        "_forest_py",
        "kernels",
        "_native",
        "fetched",
        "model_names",
        "models",
    }
    | {"adapter_structure", "adapters"},
    {"engine", "generate", "train"},
    {"targets", "unfinished"},
    {"centroids", "choices", "evaluate", "stats", "published", "judge"},
    {"figures", "report", "organism", "doctor"},
    {"series", "trajectory", "reply_sample"},
    {"beforehand", "pipeline", "adapter_stage", "cluster", "sweep", "plan"},
    {"faces"},
    {"", "cli", "__main__"},
]
# a word about each upward import that is meant
ALLOWED_UP = {
    ("doctor", ""): "the version",
    ("report", ""): "the version",
    ("store", ""): "the version",
    ("centroids", ""): "the version",
    ("organism", ""): "the version",
    ("personas", "chat"): "find_collisions asks it when called",
    ("items", "organism"): "the organism's facts are a list of items, made when asked for",
    ("pairs", "organism"): "the organism's words are training pairs, made when asked for",
    ("judge", "organism"): "the organism's lexicon is its world's advice, read when asked for",
}
TABLES_ONLY = {"stats", "figures", "report", "published", "trajectory"}
MODEL_SIDE = {"models", "engine", "generate", "train", "chat", "templates", "forest", "ops"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """The room a source file belongs to: its module, or the subpackage it lies in; "" is the package."""
    if not path.is_relative_to(PACKAGE):
        return "kernels"
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(path: Path, top_only: bool = False) -> list[tuple[str, int]]:
    """(dotted module, line) of every import, `from a import b` as a and a.b; not those for type checkers."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            found.append((base, node.lineno))
            found.extend((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found


@cache
def rooms_imported(path: Path) -> set[tuple[str, int]]:
    """Rooms of leakfast that a file imports from; the package itself is ""."""
    everything = set().union(*FLOORS)
    found = set()
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] == "leakfast":
            if len(parts) == 1:
                continue  # `from leakfast import x` also appears as leakfast.x
            found.add((parts[1] if parts[1] in everything else "", line))
    return found


@cache
def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def called_name(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_every_module_has_a_floor():
    known = set().union(*FLOORS)
    assert {room(path) for path in SOURCES} - known == set(), "give the new module its floor in FLOORS"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_down(path):
    here = room(path)
    wrong = [
        f"line {line}: {here} (floor {floor(here)}) imports {there or 'leakfast'} (floor {floor(there)})"
        for there, line in rooms_imported(path)
        if floor(there) > floor(here) and (here, there) not in ALLOWED_UP
    ]
    assert not wrong


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) in TABLES_ONLY], ids=name_of)
def test_tables_never_meet_models(path):
    reads_pt = room(path) == "published"  # the study's centroids are .pt files
    outside = set() if reads_pt else {"torch", "transformers", "peft", "vllm"}
    wrong = [f"line {n}: {module}" for module, n in imports(path) if module.split(".")[0] in outside]
    wrong += [f"line {n}: leakfast.{there}" for there, n in rooms_imported(path) if there in MODEL_SIDE]
    assert not wrong


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernels_know_only_tensors(path):
    roots = {module.split(".")[0] for module, _ in imports(path)}
    assert roots <= {"__future__", "torch", "triton", "dataclasses", "typing", "math", "functools"}


def test_csrc_knows_only_arrays():
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", text), name_of(path)
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        assert not re.search("persona|behavior", code, re.IGNORECASE), name_of(path)


def test_only_the_command_line_prints():
    wrong = [
        f"{name_of(path)}:{call.lineno}"
        for path in [*SOURCES, *KERNELS]
        if room(path) != "cli"
        for call in calls(path)
        if called_name(call) in ("print", "echo", "secho")
        and not (
            isinstance(call.func, ast.Attribute)
            and isinstance(call.func.value, ast.Name)
            and call.func.value.id in ("console",)
        )
    ]
    assert not wrong


def test_only_templates_renders_chat_templates():
    users = {name_of(p) for p in SOURCES for c in calls(p) if called_name(c) == "apply_chat_template"}
    assert users == {"leakfast/prompts/templates.py"}


def test_only_models_and_what_converts_for_it_load_models():
    loaders = {
        name_of(path)
        for path in SOURCES
        for call in calls(path)
        if called_name(call) == "from_pretrained"
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id.startswith("Auto")
    }
    assert loaders == {"leakfast/models/loading.py", "leakfast/models/formats.py"}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("vllm", {name_of(p) for p in SOURCES if p.parent.name == "vllm"}),
        ("ray", {"leakfast/cluster.py"}),
        ("matplotlib", {name_of(p) for p in SOURCES if room(p) == "figures"}),
        ("triton", set()),
    ],
)
def test_one_importer_a_library(library, allowed):
    users = {name_of(p) for p in SOURCES for module, _ in imports(p) if module.split(".")[0] == library}
    assert users <= allowed


def test_only_adapters_and_training_use_peft():
    users = {name_of(p) for p in SOURCES for module, _ in imports(p) if module.split(".")[0] == "peft"}
    outside = {user for user in users if not user.startswith("leakfast/train/")}
    assert outside <= {
        "leakfast/models/adapters.py",
        "leakfast/models/adapter_structure.py",
        "leakfast/models/attach.py",
    }


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_nothing_unsafe_or_unstable(path):
    wrong = []
    for module, line in imports(path):
        if module.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
            wrong.append(f"line {line}: {module} runs what it reads")
    for call in calls(path):
        where, name = f"line {call.lineno}", called_name(call)
        plain = isinstance(call.func, ast.Name)
        if plain and name == "hash":
            wrong.append(f"{where}: hash() changes from process to process; use config.derive_seed")
        if plain and name in ("eval", "exec"):
            wrong.append(f"{where}: {name}()")
        if name == "load" and ast.unparse(call.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
            if not (safe and room(path) == "published"):
                wrong.append(f"{where}: torch.load is for published/, with weights_only=True")
        if any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in call.keywords):
            wrong.append(f"{where}: trust_remote_code")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if caught in ("", "Exception", "BaseException"):
                wrong.append(f"line {node.lineno}: except {caught or 'everything'}")
    assert not wrong


@pytest.mark.parametrize("path", [*SOURCES, *KERNELS, *sorted((ROOT / "csrc").iterdir())], ids=name_of)
def test_files_stay_small_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "over 400 lines: split it"
    if path.suffix == ".py":
        assert ast.get_docstring(tree(path)), "a module opens with what lives here"
    unfinished = re.findall(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error)\b", text)
    assert not unfinished


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels`"
    assert not (PACKAGE / "kernels").exists(), "leakfast/kernels.py is the door"
    assert not (ROOT / "conftest.py").exists(), "it would put the root on sys.path"
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_every_python_test_file_tests_something_that_exists():
    rooms = set().union(*FLOORS) | {path.stem for path in SOURCES} | {"layout", "packaging", "cli"}
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    stray = {
        n
        for n in names
        if n not in rooms and not any(n.startswith((f"{r}_", "kernel_")) for r in rooms - {""})
    }
    assert not stray


def test_no_machine_is_named():
    pattern = re.compile(
        r"/home/|/root/|/Users/|https?://(?!127\.0\.0\.1|localhost)[^\s\"')]*(?:pypi|simple|whl)"
    )
    for path in [
        *OURS,
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.txt"),
        *ROOT.glob("*.md"),
        ROOT / "Makefile",
        ROOT / "setup.py",
    ]:
        if path != Path(__file__).resolve():
            assert not pattern.search(path.read_text(encoding="utf-8")), name_of(path)
