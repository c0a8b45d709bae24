"""The package as pip installs it, without the clone: it is imported from a wheel's own files."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import distill

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what a wheel holds."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("distill", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", *map(str, ROOT.glob("requirements*"))):
        shutil.copy(ROOT / name, source)
    (source / "wheels").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = (source / "wheels").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_metadata_has_version_and_readme(site):
    [path] = site.glob("*.dist-info/METADATA")
    metadata = Parser().parsestr(path.read_text(encoding="utf-8"))
    assert metadata["Version"] == distill.__version__
    assert metadata.get_payload().startswith("# distill: on-policy distillation")


def test_configs_are_found_by_name_in_any_folder(site, tmp_path):
    program = (
        "import distill, sys; from distill.configs import arithmetic; "
        "print(distill.__version__, distill.__file__, arithmetic.get_config().data.name)"
    )
    done = run(site, tmp_path, "-c", program)
    assert done.stdout.split() == [
        distill.__version__,
        str(site / "distill/__init__.py"),
        "arithmetic",
    ], done.stderr
    for config in ("arithmetic:short", "configs/arithmetic.py:short"):
        done = run(site, tmp_path, "-m", "distill.main", f"--config={config}")
        assert done.returncode == 2 and "pass --workdir=FOLDER" in done.stderr
    done = run(site, tmp_path, "-m", "distill.main", "--config=arithmetc")
    assert done.returncode == 2 and "arithmetic, gemma, gsm8k, llama_teacher" in done.stderr
    done = run(site, tmp_path, "-m", "distill.main", "--version")
    assert (done.returncode, done.stdout) == (0, f"distill {distill.__version__}\n")


def test_the_notebook_takes_the_installed_package(site, tmp_path):
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)
    install = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    program = f"{install}\nimport distill\nprint(distill.__file__)"
    done = run(site, tmp_path, "-c", program)
    assert done.stdout.strip() == str(site / "distill/__init__.py"), done.stderr
    assert not (tmp_path / "distillation").exists()
