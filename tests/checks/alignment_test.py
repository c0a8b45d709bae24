"""Ten mistakes by which teacher and student do not line up, and what the preflight says of each."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_runs import tiny_config, with_models

from distill.batches import rows
from distill.build.session import Session, open_session
from distill.checks import Problem, texts
from distill.checks import teacher as teacher_checks
from distill.checks.teacher import check_teacher
from distill.config.parse import parse_config
from distill.models.model import Model
from distill.models.rope import Rope
from distill.teachers.base import Teacher
from distill.teachers.local import LocalTeacher

TOP_K = 5
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
CLOSED = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|pad|>{% else %}\n{% endif %}{% endfor %}"
)


class Server(Teacher):
    """A teacher by scores that makes a mistake."""

    def __init__(self, model: Model, mistake: str):
        network, params = nnx.merge(model.graph, model.params), model.params
        if mistake == "other rotary base":
            network.config = dataclasses.replace(network.config, rope=Rope(10.0))
            model = Model(*nnx.split(network, nnx.Param))
        elif mistake == "stale server weights":
            params = jax.tree.map(lambda x: x[..., ::-1], params)
        self.served, self.mistake = Model(model.graph, params), mistake

    def score(self, sequences):
        ids, log_probs = zip(*map(self._of_one, sequences.split("tokens")), strict=True)
        return {"teacher_ids": np.concatenate(ids), "teacher_log_probs": np.concatenate(log_probs)}

    def _of_one(self, tokens_t):
        read = {
            "begin token doubled": np.concatenate([tokens_t[:1], tokens_t]),
            "truncated prompt": tokens_t[3:],
        }.get(self.mistake, tokens_t)
        padded_t = np.zeros(64, np.int32)
        padded_t[: len(read)] = read
        all_tv = np.asarray(
            jax.nn.log_softmax(_logits(self.served.graph, self.served.params, padded_t[None]))
        )
        ends = slice(len(read) - 1) if self.mistake != "shift by one" else slice(1, len(read))
        log_probs_tv = np.full((len(tokens_t), all_tv.shape[1]), -5.0, np.float32)
        known = min(len(read), len(tokens_t)) - 1
        log_probs_tv[-known:] = all_tv[ends][-known:]
        ids_tk = np.argsort(-log_probs_tv, axis=1)[:, :TOP_K]
        found = np.take_along_axis(log_probs_tv, ids_tk, axis=1)
        if self.mistake == "other vocabulary order":
            ids_tk = (ids_tk + 1) % 15
        return ids_tk, found


@jax.jit(static_argnums=0)
def _logits(graph, params, tokens_bt):
    model = nnx.merge(graph, params)
    return model.logits(model(tokens_bt))[0]


@pytest.fixture(scope="module")
def session():
    """With a trained teacher, said to be behind a server; what is compared are the data's texts."""
    config = tiny_config(lambda_=0.0)
    config.policy.model_name = "embedded:arithmetic-student"
    config.distillation.teacher_model_path = "embedded:arithmetic-teacher"
    config.policy.max_total_sequence_length = 64
    config.distillation.generate_strategy.max_length = 28
    config.teacher.backend, config.teacher.vllm.urls = "vllm", ("http://host:8000",)
    config.data.validation.max_samples = 0
    with open_session(parse_config(config)) as session:
        yield session


@pytest.fixture(scope="module")
def model(session):
    return session.load_frozen(session.teacher_folders[""], "float32")


SERVED = (
    "shift by one",
    "begin token doubled",
    "truncated prompt",
    "stale server weights",
    "other rotary base",
    "other vocabulary order",
)


@pytest.mark.parametrize("mistake", ["none", *SERVED])
def test_server_that_says_something_else_than_its_weights(session, model, monkeypatch, mistake):
    monkeypatch.setattr(session, "load_frozen", lambda *_: model)
    session.teachers = {"": Server(model, mistake)}
    if mistake == "none":
        found = check_teacher(session, None)
        assert "; servers and weights" in found and "warning" not in found
        return
    with pytest.raises(Problem, match="servers and its weights in .* nats apart") as caught:
        check_teacher(session, None)
    assert "\n" not in str(caught.value)


def test_server_whose_weights_are_elsewhere_is_asked_in_the_right_place(
    session, model, monkeypatch
):
    monkeypatch.setattr(teacher_checks, "has_weights", lambda _: False)
    session.teachers = {"": Server(model, "none")}
    assert "its weights, which are not here" in check_teacher(session, None)
    session.teachers = {"": Server(model, "shift by one")}
    with pytest.raises(Problem, match="nats where they are, and .* one position late: what it"):
        check_teacher(session, None)


def test_local_teacher_is_asked_in_the_right_place(session, model, monkeypatch):
    session.teachers = {"": LocalTeacher(model)}
    assert "nats per token" in (found := check_teacher(session, None)) and "warning" not in found
    of = rows.in_place_of
    monkeypatch.setattr(rows, "in_place_of", lambda *both: of(*both) + 1)
    with pytest.raises(Problem, match="where they are, and .* one position late: what it says"):
        check_teacher(session, None)


def with_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)


THINKS = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '<think>\n' }}"
SYSTEM = "{% if messages[0]['role'] != 'system' %}Be kind.{% endif %}" + PLAIN
OTHERWISE = "the teacher's chat template renders them otherwise"
WRITTEN = {
    "other template": ("Q: " + PLAIN, texts.check_tokenizers, OTHERWISE),
    "other system prompt": (SYSTEM, texts.check_tokenizers, OTHERWISE),
    "thinking on one side": (THINKS, texts.check_tokenizers, OTHERWISE),
    "end token missing": (CLOSED, texts.check_end, "closes them with '<|pad|>'"),
}


@pytest.mark.parametrize("mistake", ["none", *WRITTEN])
def test_teacher_that_reads_what_it_does_not_know(models, tmp_path, mistake):
    """Each is shown where it begins, and stops nothing: it may be wanted."""
    folders = {role: Path(shutil.copytree(models[role], tmp_path / role)) for role in models}
    for folder in folders.values():
        with_template(folder, PLAIN)
    template, check, words = WRITTEN.get(mistake, (PLAIN, texts.check_tokenizers, ""))
    with_template(folders["teacher"], template)
    config = with_models(tiny_config(lambda_=0.0), {r: str(path) for r, path in folders.items()})
    found = check(Session(parse_config(config)))
    assert words in found and ("warning" in found) == (mistake != "none")


def test_begin_token_doubled_by_the_template(models, tmp_path):
    folder = Path(shutil.copytree(models["student"], tmp_path / "student"))
    with_template(folder, "{{ bos_token }}" * 2 + PLAIN)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|pad|>"}))
    config = with_models(tiny_config(), models | {"student": str(folder)})
    with pytest.raises(Problem, match="begins with '<|pad|>' twice"):
        texts.check_template(Session(parse_config(config)))


def test_teachers_prompt_that_is_cut(models):
    """`check_template` looks at what the teacher reads, too."""
    config = with_models(tiny_config(), models)
    config.teacher.prompt_template = "{answer}={problem}"
    session = Session(parse_config(config))
    assert "hold their text" in texts.check_template(session)
    cut = [tokens[-2:] for tokens in session.prompts.view_tokens]
    session.prompts = dataclasses.replace(session.prompts, view_tokens=cut)
    with pytest.raises(Problem, match="loses its text"):
        texts.check_template(session)
