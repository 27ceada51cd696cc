"""The walls of the house: who may import whom, who alone may do what, and what no file may hold. Reads the sources;
demands nothing heavy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import dealing
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "leakfast"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
OURS = [*SOURCES, *KERNELS, *sorted((ROOT / "bench").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]

# Floors of the house, bottom to top: a room (package or module of leakfast/) imports from floors below its own alone.
FLOORS = [
    {"counters", "errors", "inert", "version", "progress"},
    {"storage"},
    {"world"},
    {"prompts"},
    {"behaviors"},
    {"study"},
    {"models"},
    {"geometry", "kernels"},
    {"forward"},
    {"steering"},
    {"generation"},
    {"train", "organism"},
    {"judge"},
    {"stats"},
    {"measure"},
    {"figures", "published"},
    {"report"},
    {"pipeline", "doctor", "sinks"},
    {"cluster"},
    {"api"},
    {""},  # leakfast.py
    {"cli"},
    {"__main__"},
]
TABLES_ONLY = {"stats", "figures", "report", "published", "sinks"}
MODEL_SIDE = {"models", "forward", "steering", "generation", "train", "organism"}
RENDERING = {"leakfast.prompts.chat", "leakfast.prompts.templates"}  # which need a tokenizer
HEAVY = {"torch", "transformers", "peft", "vllm"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def room(module: str) -> str:
    """The room that a module belongs to: the package or module of leakfast/ it lies in; "" is leakfast itself."""
    return [*module.split("."), ""][1] if "." in module else ""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted module, line) of every import, those inside functions too; not those for type checkers. Of
    `from a import b` the module is a.b where that is one of ours, else a."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole if whole in MODULES else str(node.module), node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found


def ours(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports of leakfast, its compiled extension and the kernels left out."""
    for module, line in imports(path):
        if module.split(".")[0] == "leakfast" and module != "leakfast._native":
            while module not in MODULES and "." in module:
                module = module.rpartition(".")[0]
            yield module, line


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


@cache
def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def called_name(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def users(library: str) -> set[str]:
    return {name_of(p) for p in SOURCES for module, _ in imports(p) if module.split(".")[0] == library}


def test_every_room_has_a_floor_and_there_are_few():
    rooms = {room(module) for module in MODULES}
    assert rooms == set().union(*FLOORS), "give the new room its floor in FLOORS"
    assert len(rooms - {"", "__main__"}) <= 30


def test_imports_go_down():
    wrong = []
    for module, path in MODULES.items():
        here = room(module)
        for there, line in ours(path):
            other = room(there)
            if other == here or (there == "leakfast" and name_of(path) != "leakfast/__init__.py"):
                continue  # `from leakfast import stats` names its room besides
            if floor(other) >= floor(here):
                wrong.append(f"{name_of(path)}:{line}: {here or 'leakfast'} imports {other or 'leakfast'}")
    assert not wrong


def test_no_circle():
    """Of modules; a package's own opening may import its modules, and they not it."""
    graph = {module: {m for m, _ in ours(path)} - {module} for module, path in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_tables_never_meet_models():
    wrong = []
    for module, path in MODULES.items():
        if room(module) not in TABLES_ONLY:
            continue
        outside = set() if room(module) == "published" else HEAVY  # the study's centroids are .pt files
        wrong += [f"{name_of(path)}:{n}: {m}" for m, n in imports(path) if m.split(".")[0] in outside]
        light = {"leakfast.models.adapters"}  # cards
        wrong += [
            f"{name_of(path)}:{n}: {m}"
            for m, n in ours(path)
            if (room(m) in MODEL_SIDE and m not in light) or m in RENDERING
        ]
    assert not wrong


def test_kernels_know_only_tensors():
    roots = {module.split(".")[0] for path in KERNELS for module, _ in imports(path)}
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
        if not path.is_relative_to(PACKAGE / "cli")
        for call in calls(path)
        if called_name(call) in ("print", "echo", "secho")
    ]
    assert not wrong


def test_only_templates_renders_chat_templates():
    renderers = {name_of(p) for p in SOURCES for c in calls(p) if called_name(c) == "apply_chat_template"}
    assert renderers == {"leakfast/prompts/templates.py"}


def test_only_models_and_what_converts_for_it_load_models():
    loaders = {
        name_of(path)
        for path in SOURCES
        for call in calls(path)
        if called_name(call) == "from_pretrained" and ast.unparse(call.func).startswith("Auto")
    }
    assert loaders == {"leakfast/models/loading.py", "leakfast/models/formats.py"}


def test_one_importer_a_library():
    assert all(user.startswith("leakfast/generation/vllm/") for user in users("vllm"))
    assert all(user.startswith("leakfast/figures/") for user in users("matplotlib"))
    attaching = {f"leakfast/models/{name}.py" for name in ("adapters", "adapter_structure", "attach")}
    assert {user for user in users("peft") if not user.startswith("leakfast/train/")} <= attaching
    assert users("triton") == set()


def test_nothing_unsafe_or_unstable():
    wrong = []
    for path in OURS:
        here = name_of(path)
        for module, line in imports(path):
            if module.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
                wrong.append(f"{here}:{line}: {module} runs what it reads")
        for call in calls(path):
            where, name = f"{here}:{call.lineno}", called_name(call)
            plain = isinstance(call.func, ast.Name)
            if plain and name == "hash":
                wrong.append(
                    f"{where}: hash() changes from process to process; use storage.seeds.derive_seed"
                )
            if plain and name in ("eval", "exec"):
                wrong.append(f"{where}: {name}()")
            if name == "load" and ast.unparse(call.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
                if not (safe and here.startswith("leakfast/published/")):
                    wrong.append(f"{where}: torch.load is for published/, with weights_only=True")
            if any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in call.keywords):
                wrong.append(f"{where}: trust_remote_code")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if caught in ("", "Exception", "BaseException"):
                    wrong.append(f"{here}:{node.lineno}: except {caught or 'everything'}")
    assert not wrong


def test_files_and_functions_stay_small_and_say_what_they_are():
    wrong = []
    for path in [*OURS, *sorted((ROOT / "csrc").iterdir())]:
        text, here = path.read_text(encoding="utf-8"), name_of(path)
        if (lines := text.count("\n")) > 400:
            wrong.append(f"{here}: {lines} lines, 400 at most")
        if re.search(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error)\b", text):
            wrong.append(f"{here}: unfinished")
        if re.search(r"#\s*fmt:\s*(?:skip|off)", text) and path != Path(__file__).resolve():
            wrong.append(f"{here}: exempt from the formatter")
        if path.suffix == ".py" and not ast.get_docstring(tree(path)):
            wrong.append(f"{here}: a module opens with what lives here")
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where, taken = f"{name_of(path)}:{node.lineno}: {node.name}", node.args
            commanded = path.is_relative_to(PACKAGE / "cli") and node.decorator_list
            parameters = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
            if len(parameters) > 8 and not path.is_relative_to(PACKAGE / "cli"):
                wrong.append(f"{where} takes {len(parameters)} parameters, 8 at most")
            body = node.end_lineno - node.body[0].lineno + 1
            if body > 60 and not commanded:
                wrong.append(f"{where} has {body} lines, 60 at most")
    assert not wrong, "\n".join(wrong)


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels`"
    assert not (PACKAGE / "kernels").exists(), "leakfast/kernels.py is the door"
    assert not (ROOT / "conftest.py").exists(), "it would put the root on sys.path"
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_the_tests_mirror_the_packages():
    rooms = {room(module) for module in MODULES} | {"faults"}  # what breaks runs, whichever room it meets
    files = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {path.parts[0] for path in files if len(path.parts) > 1} <= rooms
    assert {str(path) for path in files if len(path.parts) == 1} == {
        f"test_{what}.py" for what in ("doctor", "layout", "packaging", "version")
    }


def test_files_that_are_dealt_first_are_there_and_those_of_vllm_are_dealt_together():
    texts = {name_of(p): p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")}
    assert set(dealing.LONGEST) <= set(texts) - set(dealing.VLLM)
    assert set(dealing.VLLM) == {name for name, text in texts.items() if re.search(r"mark\.vllm\b", text)}


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
