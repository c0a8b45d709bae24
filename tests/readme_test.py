"""The README's Python example is run as written; its keys and files exist."""

import re
from pathlib import Path

import pytest

from distill.config import default_config
from distill.losses.divergences import get_divergence

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n# (\w+)\.py.*?\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def executed_examples():
    assert [name for name, _ in EXAMPLES] == ["my_losses"] and README.count("```python") == 1
    for _, source in EXAMPLES:
        exec(compile(source, "README.md", "exec"), {})


def test_own_divergence():
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
