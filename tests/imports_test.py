"""Imports point down only, over the closure: function-level and TYPE_CHECKING imports count."""

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; a module may import those of its own level and of the levels below.
LEVELS = (
    {"base"},
    {"config", "data", "kernels"},
    {"models"},
    {"losses", "sampling"},
    {"rollout", "teachers"},
    {"batches"},
    {"step"},
    {"evaluation", "reporting"},
    {"run"},
    {"build"},
    {"checks", "planning"},
    {"trainer"},
    {"__init__", "evaluate", "export", "export_server", "generate", "main", "plan", "preflight"}
    | {"report", "scratch"},
)
# Who may know the whole config; everybody else takes a section or plain arguments.
KNOW_CONFIG = LEVELS[-1] | LEVELS[-2] | {"build", "checks", "config", "planning"}
MOST_TOP_LEVEL_MODULES = 12
OPTIONAL_PACKAGES = {"torch", "trackio", "wandb", "tensorflow", "tensorflow_datasets", "vllm"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "distill").rglob("*.py"))}


def level(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    return next(i for i, names in enumerate(LEVELS) if part in names)


def names_in(nodes) -> list[str]:
    """What import statements name, as dotted names."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def top_level_imports(path: Path) -> list[str]:
    """Names imported when the file is imported."""
    return names_in(ast.parse(path.read_text()).body)


def all_imports(path: Path) -> list[str]:
    """Names imported anywhere in the file."""
    return names_in(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imported_modules(module: str) -> frozenset[str]:
    """Modules of the project that this one names in an import, wherever that stands."""
    found = set()
    for name in all_imports(MODULES[module]):
        if name == "distill" or name.startswith("distill."):
            owner = name if name in MODULES else name.rpartition(".")[0]
            found.add(owner if owner in MODULES else "distill.__init__")
    return frozenset(found - {module})


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name in imported_modules(module):
        assert level(name) <= level(module), f"{module} imports {name} from a higher level"
    for name in top_level_imports(MODULES[module]):
        assert name.split(".")[0] not in OPTIONAL_PACKAGES


def cycles() -> list[list[str]]:
    """Groups of modules that reach each other, by Tarjan's algorithm."""
    index, low, stack, found = {}, {}, [], []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for name in imported_modules(module):
            if name not in index:
                visit(name)
            if name in stack:
                low[module] = min(low[module], low[name])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(group)

    for module in MODULES:
        if module not in index:
            visit(module)
    return found


def test_no_cycles():
    assert cycles() == []


def test_folders_form_no_cycle():
    """What the levels allow within one level, folders do not use in both directions."""
    edges = {
        (module.split(".")[1], name.split(".")[1])
        for module in MODULES
        for name in imported_modules(module)
        if "." in name
    }
    assert [(a, b) for a, b in sorted(edges) if a < b and (b, a) in edges] == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[1] not in KNOW_CONFIG])
def test_only_builders_know_the_whole_config(module):
    names = all_imports(MODULES[module])
    assert "distill.config.schema.Config" not in names


def test_few_modules_at_the_top():
    assert len(list((ROOT / "distill").glob("*.py"))) <= MOST_TOP_LEVEL_MODULES


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name
)
def test_configs_import_only_the_schema_and_each_other(path):
    for name in all_imports(path):
        assert not name.startswith("jax")
        assert not name.startswith("distill") or name.startswith(
            ("distill.config.", "distill.configs.")
        )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.name
)
def test_benchmarks_import_what_is_there(path):
    """Nothing else runs all of them: they take minutes, or packages of their own."""
    for name in all_imports(path):
        owner, _, symbol = name.rpartition(".")
        if owner.split(".")[0] in ("distill", "benchmarks"):
            is_module = any((ROOT / name.replace(".", "/")).parent.glob(f"{symbol}*"))
            assert is_module or hasattr(importlib.import_module(owner), symbol), name


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_launchers_import_neither_jax_nor_distill(path):
    for name in all_imports(path):
        assert name.split(".")[0] not in ("jax", "distill")


def test_schema_does_not_import_jax():
    program = "import sys, distill.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
