"""The README's Python example is run as written; its keys and files exist."""

import re
from pathlib import Path

import pytest

from distill.config import default_config
from distill.losses.divergences import get_divergence

pytestmark = pytest.mark.usefixtures("losses_as_before")

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py.*?\n(.*?)```", README, re.DOTALL))


def test_every_example_is_run_here():
    assert list(EXAMPLES) == ["quickstart", "my_losses"]
    assert README.count("```python") == len(EXAMPLES)


def run_example(source: str) -> None:
    exec(compile(source, "README.md", "exec"), {})


@pytest.mark.slow
def test_quickstart_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = EXAMPLES["quickstart"]
    assert "max_steps = 100\n" in source
    smaller = "max_steps = 1\nconfig.preflight = False\nconfig.data.validation.max_samples = 32\n"
    run_example(source.replace("max_steps = 100\n", smaller))
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["base", "teacher", "student"]
    assert (tmp_path / "runs/from_python/student/model.safetensors").exists()


def test_own_divergence():
    run_example(EXAMPLES["my_losses"])
    hellinger = get_divergence("half_squared_hellinger")
    assert float(hellinger(0.0, -1.0)) == pytest.approx(0.5 * (1 - 2.718281828**-0.5) ** 2)


def test_overrides_shown_exist():
    config = default_config()
    keys = re.findall(r"--config\.([\w.]+)=", README)
    assert len(keys) > 5
    for key in keys:
        section = config
        for name in key.split("."):
            assert name in section, key
            section = section[name]


def test_files_shown_exist():
    root = Path(__file__).parents[1]
    folders = "distill|configs|launch|tests|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w/]*(?:\.py|\.sh|/))`", README):
        assert (root / path).exists(), path
