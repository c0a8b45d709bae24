"""Docs are executed: the modules and flags that they show, the keys and links that they name."""

import ast
import contextlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from distill.base.errors import UserError
from distill.batches.packing import Layout, Shape
from distill.batches.rows import make_batch
from distill.build.session import open_session
from distill.config.parse import default_teacher, known_keys, parse_config
from distill.config.schema import schema_key
from distill.data.base import Example, get_dataset
from distill.data.sequences import Sequences
from distill.evaluation.grading import get_grader
from distill.rollout.environment import Reply, get_environment, says
from distill.step import make_loss

pytestmark = pytest.mark.usefixtures("losses_as_before")

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
CONCEPTS = (DOCS / "concepts.md").read_text()
# name: (source, the flags below it)
EXAMPLES = {
    name: (source, flags.split())
    for name, source, flags in re.findall(
        r"```python\n# (\w+)\.py\n(.*?)```\n\n    (--config.*?)\n", CONCEPTS, re.DOTALL
    )
}


def run_with(
    names: list[str], models, folder: Path, monkeypatch, held_out: int = 8
) -> tuple[distill.Result, Path]:
    """A tiny run with modules of the docs and their flags, both as they are written there."""
    config = with_models(tiny_config(max_steps=2, eval_steps=1), models)
    config.data.validation.max_samples = held_out
    for name in names:
        source, flags = EXAMPLES[name]
        (folder / f"{name}.py").write_text(source)
        with config.unlocked():
            config.update_from_flattened_dict(dict(map(parse_flag, flags)))
        assert config.plugins == (name,)
    config.plugins = tuple(names)
    monkeypatch.syspath_prepend(folder)
    return distill.train(config, folder / "run"), folder / "run"


def parse_flag(flag: str) -> tuple[str, object]:
    key, _, value = flag.removeprefix("--config.").partition("=")
    tuples = "plugins", "evaluation.metrics", "step_metrics", "objective.terms", "objective.weights"
    return key, (value,) if key.endswith(tuples) else value


def test_every_module_shown_is_run_here():
    losses = {"my_divergence", "my_term", "my_weight"}
    others = {"my_data", "my_metric", "my_backend", "my_grader", "my_step_metric", "my_reward"}
    others |= {"my_environment"}
    assert set(EXAMPLES) == others | losses
    assert CONCEPTS.count("```python") == len(EXAMPLES)


def test_own_divergence(models, tmp_path, monkeypatch):
    names = ["my_divergence", "my_step_metric", "my_reward"]
    _, workdir = run_with(names, models, tmp_path, monkeypatch, held_out=0)
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert len(lines) == 2 and all(0 < line["loss"] < 1 for line in lines), "a total variation"
    assert all(0 <= line["confident"] <= 1 for line in lines)
    assert all(-0.2 < line["reward/mean"] <= 1 for line in lines)


def test_own_grader():
    exec(EXAMPLES["my_grader"][0], {"__name__": "my_grader"})
    grader = get_grader("last_word")
    example = Example("p", None, "b", "0")
    assert grader(example, "a b") and not grader(example, "")


def test_own_environment():
    exec(EXAMPLES["my_environment"][0], {"__name__": "my_environment"})
    dialogue = get_environment("higher_lower")(Example("p", None, "b", "0"), hint="no")
    assert dialogue.step("a") == Reply(says("user", "no"))
    assert dialogue.step(" b\n") == Reply(reward=1.0)


def test_own_term(models, tmp_path, monkeypatch):
    _, workdir = run_with(["my_term"], models, tmp_path, monkeypatch, held_out=0)
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    # Between such models the divergence alone is a hundredth of a nat.
    shares = [line["loss"] / -line["student_log_prob"] for line in lines]
    assert len(shares) == 2 and all(0.3 < share < 0.5 for share in shares)


def test_own_weight(models, tmp_path, monkeypatch):
    _, workdir = run_with(["my_weight"], models, tmp_path, monkeypatch)
    lines = read_metrics(workdir)
    losses = [line["loss"] for line in lines if "loss" in line]
    # A teacher of so little training may say any of 17 tokens: the weight is e to minus log 17.
    assert len(losses) == 2 and all(0 < x < lines[0]["eval/base/forward_kl"] / 8 for x in losses)


def test_own_data_metric_and_backend(models, tmp_path, monkeypatch, capsys):
    names = ["my_data", "my_metric", "my_backend"]
    result, workdir = run_with(names, models, tmp_path, monkeypatch)
    metrics = read_metrics(workdir)
    assert result.steps == 2 and result.results["student"]["examples"] == 8
    assert get_dataset("squares", "validation")[0].answer == "6561"
    assert get_dataset("squares", "train", max_samples=4)[1].prompt == "2*2"

    saved = json.loads((workdir / "results.json").read_text())
    for role in ("base", "student", "teacher"):
        assert saved[role]["style/lines"] >= 1 and saved[role]["style/surprise"] > 0
    logged = [line for line in metrics if "eval/student/style/lines" in line]
    assert len(logged) == 2
    assert logged[-1]["eval/student/style/lines"] == result.results["student"]["style/lines"]
    printed = capsys.readouterr().out
    assert "style/lines  style/surprise" in printed and "style/surprise 0" not in printed
    assert "style/lines" in (workdir / "student" / "README.md").read_text()

    lines = [json.loads(line) for line in (workdir / "answers.jsonl").read_text().splitlines()]
    assert [step for step, _ in lines] == [0] * 8 + [1] * 8
    gaps = [line["log_prob_gap"] for line in metrics if "log_prob_gap" in line]
    assert len(gaps) == 2 and np.max(gaps) < 1e-3


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "policy.generation.backend",
            "recordd",
            "'recordd', but the known names are jax, .*vllm.*register_backend",
        ),
        (
            "evaluation.metrics",
            ("styl",),
            "names 'styl', but .*register_metric",
        ),
    ],
)
def test_names_that_no_module_registers(key, value, words, tmp_path):
    config = tiny_config()
    config.plugins = ("json",)
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=words) as error:
        distill.train(config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# ---- what the pages say ----

PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "results.md")


def test_there_are_few_pages():
    assert len(PAGES) <= 9, [page.name for page in PAGES]


def _anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([\w-]+))?\)", page.read_text()):
        if not target.startswith("https://"):
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_shown_are_keys(page):
    for key in re.findall(r"--config\.([\w.]*\w)=", page.read_text()):
        is_own = key.startswith("plugin.")  # plugins declare theirs
        assert is_own or schema_key(key) in known_keys(), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_shown_exist(page):
    folders = "distill|configs|launch|tests|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w/]*(?:\.py|\.sh|/))`", page.read_text()):
        assert (DOCS.parent / path).exists(), path


def _sentences(page: Path) -> list[str]:
    """Sentences of paragraphs and list items, without code, formulas, tables and headings."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"^( {4}|#|\|).*$", "", text, flags=re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n *(?:[-*]|\d+\.) ", text)
    return [s for block in blocks for s in re.split(r"(?<=[.?!])[*)]*\s+(?=[^a-z])", block)]


@pytest.mark.parametrize(
    "page",
    [README, DOCS / "results.md", *(page for page in PAGES if page.name != "configuration.md")],
    ids=lambda page: page.name,
)
def test_sentences_are_short(page):
    sentences = _sentences(page)
    assert len(sentences) > 10
    for sentence in sentences:
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        assert len(words) <= 35, f"{len(words)} words: {' '.join(words)}"


SECTION = r"(?:distillation|policy|teacher|data|mesh|evaluation|checkpointing|logger)"


@pytest.mark.parametrize(
    "page",
    [README, *(page for page in PAGES if page.name != "migration.md")],
    ids=lambda page: page.name,
)
def test_keys_named_exist(page):
    """Keys and sections that are named in full; migration.md has those of other projects, too."""
    for key in re.findall(rf"`({SECTION}\.(?!py`)[\w.]*\w)(?:=[^`]*)?`", page.read_text()):
        assert key in known_keys() or key.startswith("plugin."), key  # whose keys plugins declare


def test_keys_of_ours_in_the_migration_table_exist():
    """Keys with a section in the columns that are ours, and all that carry no default there."""
    text = (DOCS / "migration.md").read_text()
    theirs_trl, theirs_nemo = 2, 1
    trl, nemo = text.split("## NeMo-RL")
    found = [*_cells(trl, theirs_trl), *_cells(nemo, theirs_nemo)]
    keys = [key for cell in found for key in re.findall(rf"`({SECTION}\.[\w.]+)(?:=\w+)?`", cell)]
    assert len(keys) > 35
    for key in keys:
        assert key in known_keys() or key.startswith("plugin."), key  # whose keys plugins declare


def _cells(text: str, column: int) -> list[str]:
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [row[column] for row in rows[1:] if len(row) > column]


METHODS = [
    (cells[1].strip(), dict(map(parse_flag, re.findall("`([^`]*)`", cells[2]))))
    for section in [CONCEPTS.partition("## Methods")[2].partition("\n## ")[0]]
    for cells in (row.split("|") for row in section.splitlines())
    if len(cells) > 3 and "`" in cells[2]
]


@pytest.mark.parametrize(("method", "lines"), METHODS, ids=[method for method, _ in METHODS])
def test_method_has_a_loss(method, lines, models, tmp_path):
    """The config lines are those of a run whose first batch has a loss."""
    config = with_models(tiny_config(), models)
    config.policy.max_total_sequence_length = 56  # of 64 positions: a teacher may read more
    config.data.chat_template = "none"  # random models have one that knows no system prompt
    values = {key: read_value(text) for key, text in lines.items()}
    named = {key.split(".")[1]: {} for key in values if key.startswith("teachers.")}
    if named:
        config.distillation.teacher_model_path, config.teacher.precision = "", "bfloat16"
    with config.unlocked():
        config.teachers = {name: default_teacher() for name in named}
        config.update_from_flattened_dict(values)
    with open_session(parse_config(config), tmp_path) as session:
        state, teachers = session.load_state(), session.load_teachers().values()
        in_step = session.teachers_in_step()
        sequences = session.prompts.sequences(np.arange(4))
        if session.prompts.response_tokens is None:
            known = dict(sampled=True, weight=1, log_prob=-2, advantage=1, reward=1)
            sampled = Sequences.of_tokens([[3, 4, 5]] * 4, **known)
            sequences = sequences.join(sampled)
        losses, views = [], []
        for teacher, of_step, prompts in zip(
            teachers, in_step, session.prompts.by_teacher, strict=True
        ):
            layout = Layout((Shape(8, 64),), view_excess=prompts.view_excess)
            views.append(prompts.view(sequences))
            (rows,) = make_batch(sequences, layout=layout, pad_id=0, view=views[-1])
            rows = jax.tree.map(lambda x: x[0], rows)
            graphs, shared = (session.student.graph, teacher.graph), of_step.shared
            objective = session.objective if shared is None else session.objective.aligned(True)
            loss_fn = make_loss(*graphs, objective, vocab_size=16, shared=shared)
            model = teacher.at(state)
            arguments = state.params, model and model.params, rows, float(rows.mask_bt.sum())
            losses.append(abs(jax.jit(loss_fn)(*arguments)[0]))  # an advantage's may be negative
    assert 1e-6 < sum(losses) < 9
    assert any(views) == any(key.startswith(("teacher.", "teachers.")) for key in lines)


def read_value(text):
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text
