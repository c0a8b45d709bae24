"""benchmarks/evidence: its runs are what they say, and its tables what the numbers say."""

import json
import re

import numpy as np
import pytest

from benchmarks.evidence import (
    forgetting,
    held_out,
    language_model,
    mending,
    own_teacher,
    probe,
    reader,
    report,
    runner,
    styles,
    word_problems,
)
from benchmarks.evidence.forgetting_task import BOTH, NEW, OLD, Conventions
from benchmarks.evidence.mending_task import Mending, WithSlips
from benchmarks.evidence.own_teacher_task import BOTH as BOTH_KINDS
from benchmarks.evidence.own_teacher_task import PLAIN, SOLVED, Sums
from benchmarks.evidence.runs import (
    BATCH,
    METHODS,
    OFF,
    ON,
    PROMPTS,
    UPDATES,
    Run,
    all_runs,
    config_of,
)
from benchmarks.evidence.styles_task import HELD_OUT, STYLES, Styles, style_of, work, write
from benchmarks.evidence.word_problems_task import MARK, WordProblems
from distill.base.errors import UserError
from distill.config.parse import parse_config


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_a_config_of_its_method(method):
    phases, lambdas = METHODS[method].phases, []
    for phase in range(len(phases)):
        config = parse_config(config_of(Run(method, 384, 1), phase))
        distillation = config.distillation
        lambdas.append(distillation.lambda_)
        assert distillation.hard_labels == (method == "sft")
        assert method.endswith(distillation.kl_type) or distillation.kl_type == "forward"
        assert distillation.max_steps * len(phases) == UPDATES
        assert (config.seed, config.data.max_samples) == (1, 384)
        assert config.policy.train_global_batch_size == BATCH
    expected = {"off": [0.0], "on": [1.0], "mix": [0.5], "warm": [0.0, 1.0], "sft": [0.0]}
    assert lambdas == expected[method.split("_")[0]]


def test_runs_have_names_of_their_own_and_whole_tables_come_first():
    runs = all_runs()
    assert len({run.name for run in runs}) == len(runs)
    first = {(run.method, run.prompts, run.seed) for run in runs[: 2 * len(PROMPTS)]}
    assert first == {(method, n, 0) for method in (OFF, ON) for n in PROMPTS}


def test_only_missing_runs_are_made(tmp_path, monkeypatch):
    made = []

    def perform(run, output):
        made.append(run.name)
        return {"right": "10", "seconds": 1.0}

    monkeypatch.setattr(runner, "perform", perform)
    monkeypatch.setattr(runner, "_measured", lambda student: {"right": "00"})
    monkeypatch.setattr(runner.jax, "clear_caches", lambda: None)  # other tests' programs
    runs = [Run(OFF, 64, 0), Run(ON, 64, 0)]
    runner.perform_all(runs[:1], tmp_path)
    runner.perform_all(runs, tmp_path)
    assert made == [run.name for run in runs]
    assert {path.stem for path in (tmp_path / "rows").iterdir()} == {"base", *made}


def test_tokens_and_seconds_of_a_run(tmp_path):
    evaluated = {"eval/student/accuracy": 0.5, "eval/student/truncated": 0.0}
    steps = [
        {"step": 1, "tokens": 100.0, "on_policy": 0.0, "seconds/step": 3.0},
        {"step": 2, "tokens": 60.0, "on_policy": 1.0, "seconds/step": 1.0},
        {"step": 2, **evaluated},
    ]
    (tmp_path / "phase0").mkdir()
    (tmp_path / "phase0/metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    (tmp_path / "seconds.jsonl").write_text('{"wall": 5.0, "cpu": 8.0}\n{"wall": 1.0, "cpu": 2.0}')
    found = runner._training_numbers(tmp_path)
    (point,) = found.pop("curve")
    assert found == {
        "seconds": 6.0,
        "cpu_seconds": 10.0,
        "seconds_per_update": 2.0,
        "tokens": 160.0,
        "sampled_tokens": 60.0,
    }
    assert (point["step"], point["accuracy"], point["forward_kl"]) == (2, 0.5, None)


PROBLEMS = 100


def make_row(method: str, prompts: int, seed: int, right: int, best: int) -> dict:
    def measured(count):
        text = "1" * count + "0" * (PROBLEMS - count)
        numbers = dict(forward_kl=0.05, reverse_kl=0.1, mean_length=29.0, truncated=0.25)
        return {"right": text, **numbers}

    return {
        **vars(Run(method, prompts, seed)),
        **measured(right),
        "best": measured(best),
        "best_step": 50,
        "curve": [{"step": 50, "accuracy": 0.5}, {"step": 400, "accuracy": 0.25}],
        **dict(seconds=60.0, cpu_seconds=100.0, seconds_per_update=0.5),
        **dict(tokens=2000.0, sampled_tokens=0.0),
    }


@pytest.fixture(scope="module")
def evidence():
    base = {**make_row(OFF, 0, 0, 30, 30), "method": "base"}
    found = {(OFF, 64): (20, 30), (ON, 64): (60, 70), (OFF, 384): (50, 50), (ON, 384): (50, 52)}
    found |= {("warm", 384): (40, 44), ("sft", 384): (10, 10)}
    rows = [
        make_row(method, n, seed, right, right + 5)
        for (method, n), rights in found.items()
        for seed, right in enumerate(rights)
    ]
    return report.Evidence([base, *rows])


def test_an_interval_is_of_seeds_and_problems():
    few = report.estimate(np.array([[1, 0] * 200], float))
    assert few.value == 0.5 and few.low == pytest.approx(0.45, abs=0.01)
    apart = report.estimate(np.array([np.zeros(400), np.ones(400)]))
    assert (apart.low, apart.value, apart.high) == (0, 0.5, 1)
    # The same problems, solved by both or by neither, say that nothing differs.
    cell = report.Cell({0: {"right": "10" * 200}})
    assert report.gain(cell, cell) == report.Estimate(0, 0, 0)


def test_tables_say_what_the_rows_say(evidence):
    tables = report.make_tables(evidence)
    cells = [line.strip("| ").split(" | ") for line in tables["situations"].splitlines()[2:]]
    assert cells[0][:2] == ["64 prompts, 400 epochs: off-policy or on-policy?", METHODS[ON].title]
    assert cells[0][2].startswith("65.0% against 25.0%: +40.0 points (+")
    assert cells[1][0].startswith("384 prompts") and cells[1][1] == "either"
    # Five points less than the student that off-policy distillation has at its best step.
    assert cells[2][2].startswith("51.0% against 55.0%: -4.0 points")
    (warm,) = (cell for cell in cells if "off-policy first" in cell[0])
    assert warm[1] == METHODS[ON].title and warm[2].endswith("2 seeds")
    rivals = {line.split(" | ")[0][2:]: line for line in tables["rivals"].splitlines()[2:]}
    assert "-8.0 points" in rivals[METHODS["warm"].title]
    assert rivals[METHODS[ON].title].endswith("| - |")
    assert "+5.0 points" in rivals[METHODS[OFF].title + ", stopped early"]
    accuracy = tables["accuracy"].splitlines()
    assert len(accuracy) == 2 + len(evidence.keys()) and "30.0% (" in accuracy[1]
    assert accuracy[2].split()[-5:] == ["30.0", "0.050", "0.100", "29.0", "25.0%"]
    stopping = tables["stopping"].splitlines()[1].split()
    assert stopping[-6:] == ["50.0%", "25.0%", "50", "50", "30.0%", "25.0%"]
    cost = {line.strip().split("  ")[0]: line for line in tables["cost"].splitlines()[1:]}
    assert cost[METHODS["sft"].title].split()[-2:] == ["0k", "0k"]
    assert cost[METHODS[ON].title].split()[-6:] == ["4", "0.500", "60", "100", "2k", "0k"]


def test_a_page_without_a_place_for_a_table_is_refused():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert report.fill(page, {"x": "new"}) == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb\n"
    with pytest.raises(UserError, match="one place for the table y"):
        report.fill(page, {"y": "new"})


def test_the_committed_page_has_the_committed_numbers():
    page = (report.DOCS / "results.md").read_text()
    evidence = report.Evidence(json.loads(report.ROWS.read_text()))
    assert report.fill(page, report.make_tables(evidence)) == page


def test_plots_are_the_same_for_the_same_numbers(evidence, tmp_path):
    from benchmarks.evidence.plots import make_plots

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_plots(evidence, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    pictures = ("forgetting", "prompts", "rivals", "styles")
    assert names == [f"evidence-{name}.svg" for name in pictures]
    for name in names:
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        assert "off-policy" in text


def test_what_the_probe_predicted_is_correlated_with_what_was_gained():
    shares = [
        (0.25, 0.5, 0.2),
        (0.5, 0.5, 0.0),
        (0.25, 1.0, 0.5),
        (0.5, 0.75, 0.3),
        (0.0, 0.0, 0.9),
    ]
    rows = [
        dict(
            run=f"off-{i}", prompts=64 if i == 4 else 384, gain=gain,
            probe=dict(student=student, teacher_from_student=teacher),
        )
        for i, (student, teacher, gain) in enumerate(shares)
    ]  # fmt: skip
    lines = probe.make_table(rows).splitlines()
    assert lines[1].split() == ["off-0", "25.0", "50.0", "25.0", "20.0"]
    x, y = ([a[1] - a[0] for a in shares], [a[2] for a in shares])
    value = np.corrcoef(x, y)[0, 1]
    assert f"the prediction: {value:+.2f} (95% interval" in lines[7] and lines[7].endswith("5 runs")
    assert f"{np.corrcoef(x[:4], y[:4])[0, 1]:+.2f}" in lines[8] and lines[8].endswith("4 runs")
    found, low, high = probe.correlation(np.array(x[:4]), np.array(y[:4]))
    assert -1 <= low <= found <= high <= 1


@pytest.mark.parametrize(
    ("response", "lines"),
    [
        ("6*8=48\n48-8=40\n40+8=48", (3, 0, 0)),
        ("6*8=46\n6*8=48\n48-8=40\n40+8=48", (3, 1, 1)),
        ("6*8=48\n48-8=40\n4\n4+8=12\n40+8=48", (3, 1, 1)),
        ("6*8=48\n48-8=41\n41+8=49", (2, 1, 0)),
        ("6*8=46\n46-8=38\n38+8=46\n6*8=48", (1, 1, 0)),  # too late
        ("6*8=48", (1, 0, 0)),
    ],
)
def test_slips_are_lines_that_are_not_the_right_next_one(response, lines):
    assert mending.read_lines("6*8-8+8", response) == mending.Lines(*lines)


def test_what_the_mending_teacher_learns_goes_on_behind_slips():
    plain, slipped = Mending("test", 0), WithSlips("test", 0)
    slips = 0
    for i in range(0, len(plain), 3):
        prompt, response = plain[i].prompt, plain[i].response
        begun = slipped[i].prompt.split("\n")[1:]
        rest = slipped[i].response.split("\n")
        whole = response.split("\n")
        done = len(whole) - len(rest)
        assert slipped[i].prompt.split("\n")[0] == prompt and whole[done:] == rest
        assert begun[:done] == whole[:done] and len(begun) <= done + 1
        slips += len(begun) > done and begun[done] != whole[done]
    assert 0.2 < slips / len(range(0, len(plain), 3)) < 0.4


@pytest.mark.parametrize("method", mending.METHODS)
def test_a_mending_run_is_a_config_of_its_method(method, tmp_path):
    (tmp_path / "samples-seed1.jsonl").touch()
    config = parse_config(mending.run_config(method, 1, tmp_path))
    lambdas = {"off": 0.0, "on": 1.0, "mix": 0.5}
    assert config.distillation.lambda_ == lambdas[method.split("_")[0]]
    mends = config.distillation.teacher_model_path == str(tmp_path / "teacher/student")
    assert mends == (method != "on_plain")


def test_mending_table():
    def row(method, seed, right, slips):
        return dict(method=method, seed=seed, right=right, slips=slips, mended=0.0)

    rows = [row(name, 0, "1100", 0.5) for name in mending.MODELS]
    rows += [row(m, seed, "1110", 0.2) for m in mending.METHODS for seed in (0, 1)]
    rows += [row(mending.ON, 2, "1111", 0.5)]
    with_forward, with_reverse = mending.situations(rows)
    assert "forward" in with_forward[0] and with_forward[1] == "either"
    assert with_reverse[1:] == (
        "either",
        "75.0% against 75.0%: +0.0 points (+0.0 to +0.0), 2 seeds",
    )
    table = {line[0]: line for line in mending.make_table(rows)}
    assert table["student as it comes"][1:4] == ("-", "50.0% (0.0 to 100.0)", "-")
    on = table[mending.METHODS[mending.ON].title]
    assert (on[1], on[4]) == ("3", "30.0%") and on[3].startswith("+0.0 points")


def test_each_problem_in_two_conventions():
    whole, new = Conventions("test", 0, 40), Conventions("test", 0, 40, subset=NEW)
    assert (len(whole), len(new)) == (80, 40)
    for i in range(40):
        mine, old = whole[i], whole[i + 40]
        assert (mine.prompt, mine.columns["task"]) == (f"={old.prompt}", NEW)
        assert new[i] == mine and old.columns["task"] == OLD
        assert int(mine.answer) == int(old.answer) % 10  # modulo ten is no matter of when
        assert whole.is_correct(mine, mine.response) and whole.is_correct(old, old.response)
        # A line of the one convention is a line of the other where nothing exceeds a digit.
        assert (mine.answer == old.answer) == whole.is_correct(mine, old.response)


@pytest.mark.parametrize("method", forgetting.METHODS)
def test_a_run_of_forgetting_is_a_config_of_its_method(method, tmp_path):
    config = parse_config(forgetting.run_config(method, 1, tmp_path))
    distillation = config.distillation
    assert distillation.lambda_ == float(method.startswith("on") or method == "rehearse")
    assert distillation.kl_type == ("reverse" if "reverse" in method else "forward")
    assert distillation.hard_labels == method.startswith("sft")
    assert (config.seed, distillation.max_steps) == (1, forgetting.UPDATES)
    assert set(config.teachers) == ({NEW, OLD} if method == "rehearse" else set())
    assert config.policy.model_name == str(tmp_path / "start/student")


def test_what_is_forgotten_where_the_new_is_learned():
    assert forgetting.interpolate(np.array([1.0, 0.5, 0.1]), np.array([0.0, 0.6, 1.0])) == (
        pytest.approx(0.3)
    )
    assert np.isnan(forgetting.interpolate(np.ones(2), np.array([0.0, 0.7])))

    def row(method, seed, *curve):
        points = [dict(step=25 * i, old=old, new=new) for i, (old, new) in enumerate(curve)]
        return dict(method=method, seed=seed, curve=points if seed is None else points[1:])

    begin = ("1111", "0000")
    rows = [row(name, None, begin) for name in forgetting.MODELS]
    for name in forgetting.METHODS:
        end = ("1000", "1111") if name == forgetting.REFERENCE else ("1100", "1100")
        rows += [row(name, seed, begin, end) for seed in (0, 1)]
    table = {line[0]: line for line in forgetting.make_table(rows)}
    reference = table[forgetting.METHODS[forgetting.REFERENCE].title]
    assert reference[1].startswith("100.0%") and reference[4].startswith("40.0%")
    on = table[forgetting.METHODS["on"].title]
    assert on[3].startswith("+25.0 points") and on[4] == "not reached"


def test_held_out_problems_are_asked_and_judged():
    config = forgetting.config_of(BOTH, 25, 25)
    config.data.validation.split, config.data.validation.max_samples = "test", 4
    asked = held_out.HeldOut(config)
    for greedy in (True, False):
        said = asked.responses("embedded:arithmetic-teacher", greedy=greedy)
        tasks = [example.columns["task"] for example, _ in said]
        assert tasks == [NEW] * 4 + [OLD] * 4
        right = [asked.is_correct(*each) for each in said]
        assert all(right[4:]) and not all(right[:4])


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_read_off_what_it_wrote_whatever_the_results(style):
    terms = 17, 48, 25
    lines = work(style, terms)
    assert lines[-1].endswith("=90") and style_of(write(terms), "\n".join(lines)) == style
    # A slip that the following lines go on with is of the same style; one that they do not is not.
    first, rest = lines[0].partition("=")[0], "\n".join(lines[1:])
    result = lines[0].partition("=")[2]
    slipped = f"{first}=99\n{rest.replace(result, '99')}"
    assert style_of(write(terms), slipped) == style
    assert style_of(write(terms), f"{first}=99\n{rest}") == ""
    for other in {*STYLES} - {style}:
        assert style_of(write(terms), "\n".join([*lines[:-1], work(other, terms)[-1]])) == ""


def test_sums_have_every_style_equally_often():
    training, held_out = Styles(), Styles("test", 0, HELD_OUT)
    rows = [training[i] for i in range(len(training))]
    found = [style_of(row.prompt, row.response) for row in rows]
    assert all(0.24 < found.count(style) / len(rows) < 0.26 for style in STYLES)
    assert all(training.is_correct(row, row.response) for row in rows)
    asked = [held_out[i].prompt for i in range(len(held_out))]
    assert asked == asked[:HELD_OUT] * 2 and len({*asked, *(r.prompt for r in rows)}) == (
        HELD_OUT + len(rows)
    )
    only = Styles(subset="ends", max_samples=50)
    assert {style_of(only[i].prompt, only[i].response) for i in range(50)} == {"ends"}


@pytest.mark.parametrize("method", styles.METHODS)
def test_a_run_of_styles_is_a_config_of_its_method(method, tmp_path):
    config = parse_config(styles.run_config(method, 1, tmp_path))
    distillation = config.distillation
    assert distillation.lambda_ == float(method.startswith("on"))
    assert distillation.kl_type == ("reverse" if "reverse" in method else "forward")
    assert distillation.hard_labels == method.startswith("sft")
    style = method.removeprefix("sft_")
    assert config.data.subset == (style if style in STYLES else "all")
    assert config.policy.model_name == str(tmp_path / "start/student")


def test_how_many_styles_students_use():
    def row(method, seed, first, second):
        return dict(method=method, seed=seed, right="1100", greedy="1111", styles=first + second)

    cell = styles.Students({0: row("on", 0, "llrr", "lrr-"), 1: row("on", 1, "tttt", "tttt")})
    bits = cell.entropy()
    assert bits.value == 0.5  # one bit and none: what students differ in is not counted
    assert 0 <= bits.low <= bits.value <= bits.high <= 1
    assert cell.agreement() == 6 / 7
    assert cell.of_style("left") == (2 / 8, 1.0) and cell.of_style("right") == (2 / 8, 0.0)
    rows = [row(name, 0, "lret", "lret") for name in styles.titles()]
    table = {line[0]: line for line in styles.make_table(rows)}
    assert table[styles.METHODS["on"].title][5].startswith("2.00 (")
    assert all(line[1] == "either" for line in styles.situations(rows))
    assert styles.make_style_table(rows)[1][1:] == (
        *("25.0%, 100.0%", "25.0%, 100.0%", "25.0%, 0.0%", "25.0%, 0.0%"),
        *("-", "100.0%"),
    )


@pytest.mark.parametrize("method", language_model.METHODS)
def test_a_run_of_the_language_model_is_a_config_of_its_method(method, tmp_path):
    config = parse_config(language_model.run_config(method, 2, tmp_path))
    assert config.seed == 2
    assert config.distillation.lambda_ == float(method != "off")
    assert config.distillation.kl_type == ("reverse" if "reverse" in method else "forward")
    assert config.policy.train_global_batch_size == language_model.BATCH
    assert config.data.path == str(tmp_path / "samples.jsonl")


def test_a_response_loops_if_four_tokens_come_three_times():
    assert reader.loops([1, 2, 3, 4, 9] * 3)
    assert reader.loops([7] * 6) and not reader.loops([7] * 5)
    assert not reader.loops([1, 2, 3, 9] * 2 + [1, 2, 3])
    assert not reader.loops([])


def test_what_is_measured_of_a_language_model():
    def row(method, forward, seed=0):
        read = dict(tokens=[10, 30], forward=forward, reverse=[1.0, 3.0])
        read |= dict(absurd=[0, 10], cut=[0, 1], loops=[0, 0])
        return dict(method=method, seed=seed, own=read, teachers=read, texts=["a"] * 3)

    rows = [row("start", [20.0, 60.0]), row("on", [5.0, 15.0]), row("off", [10.0, 30.0])]
    table = {line[0]: line[1:] for line in language_model.make_table(rows)}
    assert table["forward KL, own responses"] == (
        *("2.00 (2.00 to 2.00)", "0.50 (0.50 to 0.50)", "1.00 (1.00 to 1.00)"),
        *("-", "-0.50 (-0.50 to -0.50)"),
    )
    assert table["tokens that the teacher finds absurd"][0] == "25.0% (0.0 to 33.3)"
    assert table["responses at the limit"][0] == "50.0% (0.0 to 100.0)"
    assert [line[1] for line in language_model.situations(rows)] == ["on-policy, forward KL"] * 2
    rows += [row("on", [15.0, 45.0], seed=1), row("off", [10.0, 30.0], seed=1)]
    assert language_model.make_table(rows)[1][2:] == (
        *("1.00 (0.50 to 1.50)", "1.00 (1.00 to 1.00)"),
        *("-", "+0.00 (-0.50 to +0.50)"),
    )
    assert [line[1] for line in language_model.situations(rows)] == ["either"] * 2


@pytest.mark.parametrize("method", own_teacher.METHODS)
def test_a_run_of_an_own_teacher_is_a_config_of_its_method(method, tmp_path):
    config = parse_config(own_teacher.run_config(method, 2, tmp_path))
    distillation, start = config.distillation, str(tmp_path / "start/student")
    assert (config.seed, config.policy.model_name, config.data.subset) == (2, start, PLAIN)
    assert distillation.lambda_ == float(not method.startswith(("sft", "off")))
    assert distillation.hard_labels == method.startswith("sft")
    assert distillation.kl_type == ("reverse" if "reverse" in method else "forward")
    _, _, rate = method.rpartition("_")
    assert config.policy.optimizer.learning_rate == (float(rate) if "e-4" in rate else 2e-3)
    assert distillation.teacher_model_path == ("ema" if method.startswith("sd") else "start")
    decay = 0.999 if "_slow" in method else 0.99
    assert config.teacher.ema_decay == (decay if method.startswith("sd") else 0.0)
    asks = {"sft": "", "sft_": "", "sdpo": "{feedback}\n{problem}"}
    assert config.teacher.prompt_template == asks.get(method[:4], "{response}\n{problem}")


def test_sums_have_their_solution_before_them_as_asked():
    both, plain, solved = (Sums(max_samples=4, subset=name) for name in (BOTH_KINDS, PLAIN, SOLVED))
    for i in range(4):
        example = plain[i]
        assert solved[i].prompt == f"{example.response}\n{example.prompt}"
        assert both[i] == (solved if i % 2 else plain)[i]
        assert style_of(example.prompt, example.response) == "left"


def test_what_an_own_teacher_gains():
    def row(method, right, seed=0):
        return dict(method=method, seed=seed, right=right, greedy="1111")

    rows = [row("start", "1000"), row("reads", "1111")]
    rows += [row("sft", "1100"), row("opsd", "1110"), row("opsd", "1100", seed=1)]
    rows += [row("opsd_2e-4", "1110"), row("opsd_reverse_6e-4", "0000")]
    table = {line[0]: line[1:] for line in own_teacher.make_table(rows)}
    assert table["student before"][:2] == ("-", "25.0% (0.0 to 75.0)")
    whole = "100.0% (100.0 to 100.0)"
    assert table[own_teacher.TITLES["reads"]] == ("-", whole, "-", "-", whole)
    seeds, accuracy, above_start, above_sft, _ = table[own_teacher.TITLES["opsd"]]
    assert seeds == "2" and accuracy.startswith("62.5%")
    assert above_start.startswith("+37.5 points") and above_sft.startswith("+25.0 points")
    forward, reverse = own_teacher.situations(rows)
    assert forward[1] == "either" and forward[2].endswith("1 seed")
    assert reverse[2].startswith("0.0% against 50.0%")


def test_word_problems_are_worked_rightly_and_held_out_ones_are_no_others():
    training, held_out = WordProblems(max_samples=300), WordProblems("test")
    assert {example.prompt for example in training} & {
        example.prompt for example in held_out
    } == set()
    for example in training:
        lines, _, answer = example.response.partition(MARK)
        worked = re.findall(r"(\d+[-+*/]\d+)=(\d+)", lines)
        assert all(eval(left) == int(result) for left, result in worked)
        assert worked[-1][1] == answer == example.answer
        assert training.is_correct(example, example.response)
        assert not training.is_correct(example, f"{lines}{MARK}{int(answer) + 1}")
        assert not training.is_correct(example, answer)  # without its mark


@pytest.mark.parametrize("size", word_problems.SIZES)
def test_a_run_of_word_problems_is_a_config_of_its_method(size, tmp_path):
    size = word_problems.SIZES[size]
    runs = word_problems.all_runs(size)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        config = parse_config(word_problems.config_of(run, size, tmp_path))
        trained = run.method in word_problems.SIZES["full"].models
        assert config.distillation.hard_labels == (trained or run.method == "sft")
        assert config.distillation.lambda_ == float(run.method.startswith("on_"))
        assert config.policy.model_name.endswith(run.method if trained else "start/student")
        assert (config.seed, config.data.max_samples) == (run.seed, run.prompts)


def test_word_problems_table():
    def row(method, seed, right, prompts=64):
        return dict(method=method, prompts=prompts, seed=seed, right=right)

    rows = [row("teacher", 0, "1111", None), row(OFF, 0, "1000"), row(OFF, 1, "1100")]
    table = word_problems.make_table([*rows, row(ON, 0, "1110"), row(ON, 1, "1111")])
    assert [line[:3] for line in table[1:]] == [
        ("teacher", "-", "-"),
        ("off-policy, forward KL", "64", "2"),
        ("on-policy, forward KL", "64", "2"),
    ]
    assert table[2][3].startswith("37.5% ") and table[2][4] == "-"
    assert table[3][4].startswith("+50.0 points")
