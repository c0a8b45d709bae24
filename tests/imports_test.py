"""Imports point down only, and configs and launchers stay free of JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; a module may import its own level and those below.
LEVELS = [
    {
        "errors",
        "config",
        "config_reference",
        "completion",
        "status",
        "roll_call",
        "processes",
        "interrupts",
        "workdir",
        "manifest",
        "health",
    },
    {"sharding", "topology", "tokenizer", "kernels"},
    {"losses", "models", "data", "optimizer"},
    {"step", "microbatch", "sampling"},
    {
        "cli",
        "math_check",
        "evaluation_metrics",
        "grading",
        "metrics",
        "evaluate",
        "checkpoint",
        "saver",
        "rollout",
        "reporting",
        "model_card",
    },
    {
        "build",
        "build_teacher",
        "build_vllm",
        "scratch",
        "preflight",
        "preflight_checks",
        "planning",
    },
    {"trainer"},
    {"main", "plan", "generate", "export", "export_server", "report", "__init__"},
]
OPTIONAL_PACKAGES = {"torch", "wandb", "tensorflow", "tensorflow_datasets", "vllm"}


def level(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    return next(i for i, names in enumerate(LEVELS) if part in names)


def top_level_imports(path: Path) -> list[str]:
    """Modules imported when the file is imported: not those inside functions or TYPE_CHECKING."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


MODULES = sorted((ROOT / "distill").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = level(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in top_level_imports(path):
        if name.startswith("distill."):
            assert level(name) <= own, f"{path} imports {name} from a higher level"
        assert name.split(".")[0] not in OPTIONAL_PACKAGES


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name
)
def test_configs_import_only_the_schema(path):
    for name in top_level_imports(path):
        assert not name.startswith("jax")
        assert not name.startswith("distill") or name.startswith("distill.config.")


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_launchers_import_neither_jax_nor_distill(path):
    for name in top_level_imports(path):
        assert name.split(".")[0] not in ("jax", "distill")


def test_schema_does_not_import_jax():
    program = "import sys, distill.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
