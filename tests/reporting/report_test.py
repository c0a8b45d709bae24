"""What a run leaves for its report, and what the report makes of whatever is in a folder."""

import base64
import functools
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from made_up_run import HOSTILE, write_run
from tiny_models import model_config, random_model
from tiny_runs import tiny_config

import distill
from benchmarks.objectives import objective_of
from distill.base.errors import UserError
from distill.data.arithmetic import CHARACTERS
from distill.data.base import DatasetInterface, Example
from distill.data.tokenizer import (
    Vocabulary,
    character_tokenizer,
    train_bpe_tokenizer,
    vocabulary_size,
)
from distill.data.tokenizing import tokenize_prompts
from distill.evaluation import diagnosis, token_values
from distill.evaluation.evaluator import Responses
from distill.evaluation.recorder import RolloutRecorder, pieces
from distill.evaluation.token_values import TokenReader
from distill.models.model import Model
from distill.reporting import curves
from distill.reporting.page import render, write_report
from distill.reporting.read import read_run
from distill.sampling.request import Rollout

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------- token by token


class Questions(DatasetInterface):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Example:
        return Example(f"{i}+{i}", None, str(2 * i), f"q{i}")


def record(workdir, *, with_teacher=True, kl_type="reverse", batch_size=2) -> dict:
    """`rollouts/student.json` of made-up responses to all questions, 6 tokens at most."""
    tokenizer, questions = character_tokenizer(CHARACTERS), Questions()
    size = vocabulary_size(tokenizer)
    workdir.mkdir(exist_ok=True)
    reader = TokenReader(
        objective_of(kl_type, kl_temperature=2.0),
        vocab_size=size,
        batch_size=batch_size,
        put=jnp.asarray,
    )
    prompts = tokenize_prompts(questions, tokenizer, max_prompt_length=10)
    recorder = RolloutRecorder(
        workdir,
        questions,
        prompts,
        Vocabulary(tokenizer, size, (tokenizer.eos_token_id,)),
    )
    student, teacher = models()
    teachers, rollout = {"": teacher if with_teacher else None}, made_up_rollout()
    _, values = reader(student, teachers, prompts, rollout, reads_tokens=True)
    correct = [True, False, True, False, True]
    recorder("student", 7, Responses(rollout, ["text"] * 5, correct, values))
    return json.loads((workdir / "rollouts/student.json").read_text())


def made_up_rollout() -> Rollout:
    size = vocabulary_size(character_tokenizer(CHARACTERS))
    lengths_b = np.array([3, 6, 1, 5, 2], np.int32)
    return Rollout(
        tokens_br=np.random.default_rng(0).integers(2, size, (5, 6)).astype(np.int32),
        lengths_b=lengths_b,
        log_probs_br=np.zeros((5, 6), np.float32),
        sampled_log_probs_br=np.zeros((5, 6), np.float32),
        stopped_b=lengths_b < 6,
    )


def responses_of(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.tokens_br.tolist(), rollout.lengths_b, strict=True)
    return [row[:length] for row, length in rows]


def models() -> tuple[Model, Model]:
    """Student and teacher; the teacher's head has rows of padding."""
    shapes = model_config(vocab_size=24), model_config(vocab_size=32)
    return tuple(Model(*random_model(shape, seed=i)) for i, shape in enumerate(shapes))


def plain_log_probs(prompt: str, ids: list[int]) -> list[np.ndarray]:
    """Of student and teacher for every token of a response, (r, v), by one plain forward pass."""
    tokenizer = character_tokenizer(CHARACTERS)
    size = vocabulary_size(tokenizer)
    context = tokenizer(f"{prompt}\n", add_special_tokens=False).input_ids
    row = jnp.asarray([context + ids])
    found = []
    for model in models():
        module = nnx.merge(model.graph, model.params)
        logits_tv = np.asarray(module.logits(module(row))[0], np.float64)[:, :size]
        found.append(logits_tv[len(context) - 1 : -1])
    return found


def test_numbers_of_every_token_against_plain_formulas(tmp_path, monkeypatch):
    """Log-probabilities and choices at temperature 1, the divergence at the run's (here 2)."""
    monkeypatch.setattr(
        token_values, "_MOST_LOGITS", 2 * 32 * 4
    )  # two chunks, the second filled up
    log = record(tmp_path)
    tokenizer = character_tokenizer(CHARACTERS)
    assert [len(response["tokens"]) for response in log["responses"]] == [3, 6, 1, 5, 2]
    for i, response in enumerate(log["responses"]):
        ids = tokenizer("".join(response["tokens"]), add_special_tokens=False).input_ids
        logits = plain_log_probs(Questions()[i].prompt, ids)
        log_q, log_p = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in logits)
        tempered_q, tempered_p = (np.asarray(jax.nn.log_softmax(x / 2), float) for x in logits)
        r = np.arange(len(ids))
        assert response["log_q"] == pytest.approx(log_q[r, ids], abs=2e-5)
        assert response["log_p"] == pytest.approx(log_p[r, ids], abs=2e-5)
        reverse = (np.exp(tempered_q) * (tempered_q - tempered_p)).sum(axis=1)
        assert response["divergence"] == pytest.approx(reverse, abs=2e-5)
        for position, top in enumerate(response["top"]):
            best = np.argsort(-log_p[position])[:5]
            assert [token for token, _, _ in top] == best.tolist()
            assert [p for _, p, _ in top] == pytest.approx(log_p[position, best], abs=2e-5)
            assert [q for _, _, q in top] == pytest.approx(log_q[position, best], abs=2e-5)
            assert all(log["texts"][str(token)] == tokenizer.decode([token]) for token in best)


def test_the_diagnosis_against_plain_loops(tmp_path, monkeypatch):
    """Of all responses, though only the first is written token by token."""
    monkeypatch.setattr(token_values, "MOST_TOKENS", 3)
    monkeypatch.setattr(diagnosis, "NUCLEUS", 0.9)  # so that these few tokens leave it, too
    monkeypatch.setattr(diagnosis, "BACK", 2)
    monkeypatch.setattr(diagnosis, "MOST_BINS", 3)  # of two positions each
    log = record(tmp_path)
    found, tokenizer = log["diagnosis"], character_tokenizer(CHARACTERS)
    assert len(log["responses"]) == 1 and (found["tokens"], found["responses"]) == (17, 5)
    means, bins, left, losses = [], {0: [], 1: [], 2: []}, [], []
    by_class = {name: [0, 0.0] for name in diagnosis.CLASSES}
    for i, ids in enumerate(responses_of(made_up_rollout())):
        left.append([])
        logits = plain_log_probs(Questions()[i].prompt, ids)
        for r, token in enumerate(ids):
            q, p = (np.exp(x[r]) / np.exp(x[r]).sum() for x in logits)
            flat_q, flat_p = (x**0.5 / (x**0.5).sum() for x in (q, p))  # the loss's are at 2
            best_q, best_p = (set(np.argsort(-x)[:10].tolist()) for x in (q, p))
            both = sorted(best_q & best_p)
            means.append(
                dict(
                    surprise=-np.log(p[token]), overlap=len(both) / 10,
                    mass_p=p[both].sum(), mass_q=q[both].sum(),
                    entropy_p=-(p * np.log(p)).sum(), entropy_q=-(q * np.log(q)).sum(),
                )
            )  # fmt: skip
            losses.append((i, (flat_q * np.log(flat_q / flat_p)).sum()))
            left[-1].append(sum(x for x in p if x > p[token]) >= 0.9)
            bins[r // 2].append((means[-1], losses[-1][1]))
            text = tokenizer.decode([token])
            kind = "end" if token == tokenizer.eos_token_id else diagnosis.class_of(text)
            by_class[kind][0] += 1
            by_class[kind][1] += losses[-1][1]
    loss = sum(value for _, value in losses)
    close = functools.partial(pytest.approx, abs=3e-5)
    for name, value in found["means"].items():
        assert value == close(np.mean([x[name] for x in means])), name
        for k, column in enumerate(found["positions"][name]):
            assert column == close(np.mean([x[name] for x, _ in bins[k]])), name
    positions = found["positions"]
    assert positions["start"] == [0, 2, 4] and positions["tokens"] == [9, 5, 3]
    assert positions["loss"] == close([sum(d for _, d in bins[k]) / loss for k in range(3)])
    firsts = [row.index(True) if True in row else 9 for row in left]
    assert positions["left"] == close([sum(f < end for f in firsts) / 5 for end in (2, 4, 6)])
    for name, (count, divergence) in by_class.items():
        assert found["classes"][name] == dict(
            tokens=close(count / 17), loss=close(divergence / loss)
        )
    shares = [sum(d for i, d in losses if i == number) / loss for number in range(5)]
    largest = found["prompts"]["largest"]
    assert [p["number"] for p in largest] == sorted(range(5), key=lambda i: -shares[i])
    assert [p["loss"] for p in largest] == close(sorted(shares, reverse=True))
    assert largest[0]["question"] == Questions()[largest[0]["number"]].prompt
    most = next(n for n in range(1, 6) if sum(sorted(shares)[-n:]) >= 0.5)
    assert found["prompts"]["half"] == most / 5
    back = [not any(row[r + 1 : r + 3]) for row in left for r in range(len(row) - 1) if row[r]]
    right = {True: [], False: []}
    for row, correct in zip(left, (True, False, True, False, True), strict=True):
        right[any(row)].append(correct)
    assert 0 < sum(back) < len(back) and min(map(len, right.values())) > 0  # or nothing is tested
    assert found["departures"] == dict(
        tokens=close(np.mean(sum(left, []))),
        responses=close(np.mean([any(row) for row in left])),
        back=close(np.mean(back)),
        right=close(np.mean(right[True])),
        right_otherwise=close(np.mean(right[False])),
    )


def test_tokens_are_of_four_kinds():
    assert [diagnosis.class_of(text) for text in ("7", " 12", "3.5", "+", "\n", "x1")] == [
        *["digits"] * 3, *["other"] * 3,
    ]  # fmt: skip
    assert {diagnosis.class_of(text) for text in (" So", "wait,", "First")} == {"style"}


def test_what_is_known_of_answers(tmp_path):
    log = record(tmp_path)
    first, second = log["responses"][:2]
    assert (first["question"], first["prompt"]) == ("0+0", "0+0\n")
    assert first["expected"] == "0" and first["id"] == "q0"
    assert first["correct"] and not second["correct"]
    assert first["stopped"] and not second["stopped"]
    assert (log["role"], log["step"], log["responses_in_all"]) == ("student", 7, 5)


def test_a_mesh_and_other_batches_change_nothing(tmp_path):
    from distill.base.mesh import make_mesh

    with jax.set_mesh(make_mesh(2, 1, 2, devices=jax.devices()[:4])):
        sharded = record(tmp_path / "a", batch_size=4)
    plain = record(tmp_path / "b", batch_size=2)
    ours, theirs = (jax.tree.leaves(log["diagnosis"]) for log in (sharded, plain))
    assert ours == pytest.approx(theirs, abs=3e-5)
    for ours, theirs in zip(sharded["responses"], plain["responses"], strict=True):
        for name in ("log_q", "log_p", "divergence"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5)
        assert [[i for i, _, _ in top] for top in ours["top"]] == [
            [i for i, _, _ in top] for top in theirs["top"]
        ]


def test_without_a_teacher_only_the_student_is_known(tmp_path):
    log = record(tmp_path, with_teacher=False)
    assert not log["has_teacher"] and log["texts"] == {}
    assert log["responses"][0].keys().isdisjoint({"divergence", "log_p", "top"})
    with_teacher = record(tmp_path / "b")
    for ours, theirs in zip(log["responses"], with_teacher["responses"], strict=True):
        assert ours["log_q"] == pytest.approx(theirs["log_q"], abs=2e-5)


def test_only_so_many_tokens_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(token_values, "MOST_TOKENS", 9)
    assert [len(a["tokens"]) for a in record(tmp_path / "a")["responses"]] == [3, 6]
    monkeypatch.setattr(token_values, "MOST_TOKENS", 1)
    assert [len(a["tokens"]) for a in record(tmp_path / "b")["responses"]] == [3]


def test_pieces_of_a_byte_level_tokenizer_add_up_to_the_text():
    tokenizer = train_bpe_tokenizer(["plain words"], 300)
    text = "plain 🙂 wörds\n漢"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = pieces(tokenizer.decode, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert texts[texts.index("🙂") - 1] == ""  # its first bytes
    # Cut in the middle of a character, and bytes that are none.
    assert pieces(tokenizer.decode, ids[:-1])[-1] == "\ufffd"
    assert len(pieces(tokenizer.decode, ids[-1:] * 9)) == 9


# ------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("report") / "run"
    distill.train(tiny_config(max_steps=2), workdir)
    return workdir


def test_a_run_writes_its_report(finished):
    run = read_run(finished)
    assert run.notes == () and run.step == 2
    assert run.config["distillation.max_steps"] == 2 and "cpu" in run.environment["devices"]
    assert run.results == json.loads((finished / "results.json").read_text())
    assert {chart["title"] for chart in curves.draw([run])} >= {
        "Held-out accuracy", "Held-out divergence", "Training loss", "Length of responses",
        "Gap between sampler and trainer", "Throughput", "Time of a step",
    }  # fmt: skip
    assert render([run], ["run"]) == (finished / "report.html").read_text()


@pytest.mark.parametrize("role", ["base", "student"])
def test_divergences_of_tokens_add_up_to_the_evaluation(finished, role):
    """All 8 held-out responses are written, and the run minimises the forward KL."""
    log, results = read_run(finished).rollouts[role], read_run(finished).results[role]
    divergences = [value for response in log["responses"] for value in response["divergence"]]
    assert len(log["responses"]) == results["examples"] == 8
    assert len(divergences) == pytest.approx(8 * results["mean_length"])
    assert np.mean(divergences) == pytest.approx(results["forward_kl"], rel=1e-4)
    assert np.mean([a["correct"] for a in log["responses"]]) == results["accuracy"]
    assert log["step"] == {"base": 0, "student": 2}[role]


# --------------------------------------------------------------------------- what is in a folder


def test_hostile_text_ends_no_tag_and_the_policy_names_the_script(tmp_path):
    page = render([read_run(write_run(tmp_path / "run"))], [HOSTILE])
    assert len(re.findall("<img|<!--|</script", page)) == 2  # the ends of the two scripts
    style, data, script = re.search(
        r"<style>(.*?)</style>.*id=\"data\">(.*?)</script>\s*<script>(.*?)</script>", page, re.S
    ).groups()
    for text, kind in ((style, "style"), (script, "script")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page
    read = json.loads(data)
    assert read["runs"][0]["name"] == HOSTILE
    assert read["runs"][0]["rollouts"]["student"]["responses"][0]["tokens"][2] == HOSTILE
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", style + script)


def test_damaged_lines_and_files_are_left_out_and_counted(tmp_path):
    folder = write_run(tmp_path / "run")
    whole = read_run(folder)
    with (folder / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 41, "loss"\n[1]\n\xff\xfe\n{"loss": 1}\n' + b"[" * 9999 + b"\n")
        log.write(b'{"step": 50, "loss": NaN, "grad_norm": "x", "seconds/step": 1e999}\n')
        log.write(b'{"step": 40, "loss": 0.5}\n')
    (folder / "results.json").write_text("{")
    (folder / "rollouts/base.json").write_text("[]")
    (folder / "rollouts/student.json").write_bytes(b"\xff")
    (folder / "probe.json").write_text('{"": {"verdict": 1}}')
    (folder / "rollouts/z.json").write_text(
        '{"responses": [{}], "texts": {}, "responses_in_all": 1}'
    )
    run = read_run(folder)
    assert run.series["loss"] == [*whole.series["loss"][:-1], (40, 0.5)]
    assert run.notes == (
        "5 of the lines in metrics.jsonl cannot be read and are left out.",
        "results.json is damaged and left out.",
        "base.json is damaged and left out.",
        "student.json is damaged and left out.",
        "z.json is damaged and left out.",
    )
    assert run.diagnoses == run.probe == {}
    assert run.rollouts == {} and run.results == whole.results  # from the log
    render([run], ["run"])


def test_a_damaged_diagnosis_is_left_out_and_the_rest_stays(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "rollouts/student.json"
    whole = read_run(folder)
    assert whole.diagnoses["student"].departures["back"] == 0.04
    record = json.loads(path.read_text())
    for damaged in ([], {"positions": 1}, record["diagnosis"] | dict(classes={"end": 1})):
        path.write_text(json.dumps(record | dict(diagnosis=damaged)))
        run = read_run(folder)
        assert run.diagnoses.keys() == {"base"} and run.rollouts == whole.rollouts
        render([run], ["run"])
    record["diagnosis"]["means"]["overlap"] = "much"
    path.write_text(json.dumps(record))
    assert read_run(folder).diagnoses["student"].means["overlap"] is None
    render([read_run(folder)], ["run"])


def test_a_reference_stands_beside_the_run(tmp_path):
    run, other = (read_run(write_run(tmp_path / name)) for name in ("run", "other"))
    charts = {chart["title"]: chart["curves"] for chart in curves.draw([run], other)}
    labels = [curve["label"] for curve in charts["Held-out divergence"]]
    assert labels == ["forward KL", "reverse KL", "reference: forward KL", "reference: reverse KL"]
    assert "reference" not in str(charts["Training loss"])
    assert "The reference run ends at 80.0%" in render([run], ["run"], other)


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    (folder / "checkpoints/25").mkdir(parents=True)
    run = read_run(folder)
    assert run.notes == ("Not finished: step 25 of 40. This is what there is so far.",)
    assert run.results.keys() == {"base", "teacher"}
    (folder / "run.json").unlink()
    assert "run.json cannot be read (No such file or directory)." in read_run(folder).notes
    (folder / "metrics.jsonl").write_text("")
    render([read_run(folder)], ["run"])


def test_an_unfinished_run_shows_each_of_several_teachers(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    numbers = {"examples": 9, "accuracy": 0.5, "words/mean": 3.0}
    line = {f"eval/teacher/{n}/{k}": x for n in ("math", "code") for k, x in numbers.items()}
    kept = [x for x in (folder / "metrics.jsonl").read_text().splitlines() if "teacher/a" not in x]
    (folder / "metrics.jsonl").write_text("\n".join([*kept, json.dumps({"step": 0, **line})]))
    run = read_run(folder)
    assert run.results.keys() == {"base", "teacher/math", "teacher/code"}
    assert run.results["teacher/math"] == numbers
    levels = {x["label"]: x["level"] for x in curves.draw([run])[0]["curves"] if "level" in x}
    assert levels == {"teacher/math": 0.5, "teacher/code": 0.5}


def test_long_curves_are_thinned_to_what_a_screen_shows(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps({"step": i, "loss": i}) + "\n" for i in range(41, 30_002))
    chart = next(c for c in curves.draw([read_run(folder)]) if c["title"] == "Training loss")
    points = chart["curves"][0]["points"]
    assert 500 < len(points) <= 1001 and points[-1] == (30_001, 30_001.0)


def test_accuracy_has_its_interval_from_the_base_student_on(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    curve, teacher = curves.draw([run])[0]["curves"]
    assert curve["points"] == [[0, 0.4, 0.4 - 0.05, 0.4 + 0.05], [40, 0.8, 0.8 - 0.05, 0.8 + 0.05]]
    assert teacher == {"run": 0, "label": "teacher", "level": 1.0}
    assert math.isclose(run.results["student"]["accuracy"], 0.8)


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere: pass the --workdir"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run: there is no metrics.jsonl in it"):
        read_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="there is no folder"):
        write_report([tmp_path / "file"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_command_line(tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "distill.report", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    a, b = write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run", steps=10)
    done = call(a)
    assert done.returncode == 0 and done.stdout == f"report: {a}/report.html\n", done.stderr
    done = call(a, b, f"--output={tmp_path}/both.html")
    assert done.stdout.splitlines()[0].startswith(f"{b}: Not finished: step 10 of 40.")
    page = (tmp_path / "both.html").read_text()
    assert json.dumps(str(a)) in page and json.dumps(str(b)) in page  # folders called alike
    for arguments, part in (
        ((), "pass the folder of a run"),
        ((tmp_path / "none",), "there is no folder"),
        ((a, f"--output={tmp_path}/none/x.html"), "pass --output=FILE"),
        (("--config=x",), "config"),
    ):
        done = call(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert part in done.stderr and done.stderr.count("\n") == 1
