"""The notebook: committed as written, and run from top to bottom on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from quick_xla import QUICK_XLA_FLAGS

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).parents[1]
PATH = ROOT / "notebooks" / "quickstart.ipynb"
STEPS = 2


def read_notebook():
    return nbformat.read(PATH, as_version=4)


def test_is_valid_and_holds_no_outputs():
    notebook = read_notebook()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.id
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_links_lead_somewhere():
    text = "".join(cell.source for cell in read_notebook().cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\((.+?)\)", text) if "://" not in target]
    assert len(targets) > 1
    for target in targets:
        assert (PATH.parent / target).exists(), target


def test_first_cell_fetches_the_project(tmp_path):
    """Without a checkout around, from where it is told to."""
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("this is no git repository, or somebody else's")
    install = next(cell.source for cell in read_notebook().cells if cell.cell_type == "code")
    look = (
        "import configs.arithmetic, distill; print(configs.arithmetic.__file__, distill.__file__)"
    )

    def run(cell: str) -> subprocess.CompletedProcess:
        program = [sys.executable, "-c", f"{cell}\n{look}"]
        return subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert "fill in REPOSITORY: the project is neither here nor installed" in run(install).stderr
    empty = 'REPOSITORY = ""'
    assert empty in install
    for _ in range(2):  # as it is when the session was restarted
        printed = run(install.replace(empty, f'REPOSITORY = "{ROOT.as_uri()}"'))
        assert printed.returncode == 0, printed.stderr
        clone = tmp_path / "distillation"
        expected = [str(clone / "configs/arithmetic.py"), str(clone / "distill/__init__.py")]
        assert printed.stdout.split() == expected


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Outputs by cell, of a run with few steps and problems; and the run's folder."""
    folder = tmp_path_factory.mktemp("notebook")
    environment = {
        "IPYTHONDIR": str(folder / "ipython"),
        "XLA_FLAGS": QUICK_XLA_FLAGS,
    }
    smaller = {
        "max_steps = 350\n": f"max_steps = {STEPS}\n",
        'Path("runs/notebook")': f'Path("{folder / "run"}")',
        "print(": "config.preflight = False\nconfig.data.validation.max_samples = 32\nprint(",
    }
    notebook = read_notebook()
    (cell,) = (cell for cell in notebook.cells if cell.id == "config")
    for source, replacement in smaller.items():
        assert source in cell.source
        cell.source = cell.source.replace(source, replacement)
    client = nbclient.NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(PATH.parent)}},
    )
    client.execute(env=os.environ | environment)
    return {cell.id: cell.get("outputs", []) for cell in notebook.cells}, folder / "run"


def printed(outputs) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.slow
class TestRunFromTopToBottom:
    def test_config_and_data(self, executed):
        outputs, _ = executed
        assert "kl_type: forward" in printed(outputs["config"])
        assert len(re.findall(r"^[-+*\d]+$", printed(outputs["data"]), re.MULTILINE)) == 3

    def test_bar_and_plot_follow_the_run(self, executed):
        outputs, _ = executed
        shown = [
            output.data for output in outputs["distil"] if output.output_type == "display_data"
        ]
        bar, plot = shown
        assert bar["text/plain"].endswith(f"{STEPS}/{STEPS}")
        assert len(plot["image/png"]) > 10_000

    def test_answer_token_by_token(self, executed):
        outputs, _ = executed
        head, *rows = printed(outputs["tokens"]).split("\n\n")[1].splitlines()
        assert head.split() == ["student", "probability", "teacher", "probability", "divergence"]
        for row in rows:
            _, q, _, p, divergence, *_ = row.split()
            assert 0 <= float(q) <= 1 and 0 < float(p) <= 1 and float(divergence) > -1e-4

    def test_report_is_shown_in_a_sandbox(self, executed):
        outputs, workdir = executed
        (output,) = outputs["report"]
        html = output.data["text/html"]
        assert html.startswith('<div><iframe sandbox="allow-scripts" srcdoc="&lt;!doctype html')
        assert len(html) > (workdir / "report.html").stat().st_size

    def test_evaluation(self, executed):
        outputs, _ = executed
        run, test = printed(outputs["evaluate"]).split("\n\n")
        assert [line.split()[0] for line in run.splitlines()] == [
            "model", "base", "student", "teacher"
        ]  # fmt: skip
        assert "student" in test and "teacher" in test

    def test_export_and_transformers(self, executed):
        outputs, workdir = executed
        assert {"model.safetensors", "README.md"} <= set(os.listdir(workdir / "best"))
        assert "library_name: transformers" in printed(outputs["export"])
        text = printed(outputs["transformers"])
        assert "Qwen2ForCausalLM of width 48, 17 tokens" in text
        assert re.search(r"correct: (True|False)|torch is not installed", text)
