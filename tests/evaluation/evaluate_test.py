"""Evaluation against explicit formulas, and the printed table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import model_config

from benchmarks.objectives import objective_of
from distill.config import schema
from distill.data.arithmetic import CHARACTERS
from distill.data.base import DatasetInterface, Example
from distill.data.tokenizer import Vocabulary, character_tokenizer, vocabulary_size
from distill.data.tokenizing import tokenize_prompts
from distill.evaluation import evaluator as evaluator_module
from distill.evaluation.evaluator import Evaluator
from distill.evaluation.table import format_table
from distill.evaluation.token_values import TokenReader
from distill.models.model import Model
from distill.models.transformer import Transformer
from distill.sampling.engine import Engine, EngineConfig

MAX_LENGTH = 6


class Sums(DatasetInterface):
    """Graded by the dataset itself: right when the answer contains the digit asked for."""

    def __init__(self, with_answers: bool = True):
        self.with_answers = with_answers

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Example:
        return Example(f"{i}+{i}", None, str(i) if self.with_answers else None, str(i))

    def is_correct(self, example: Example, response: str) -> bool:
        return example.answer in response


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(CHARACTERS)


def make_model(seed: int, vocab_size: int) -> Model:
    config = model_config(vocab_size=vocab_size, num_layers=1, num_heads=2, ffn_width=32)
    model = Transformer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model, nnx.Param)
    return Model(graph, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params))


def make_evaluator(tokenizer, dataset: DatasetInterface, batch_size: int) -> Evaluator:
    return Evaluator(
        dataset,
        tokenize_prompts(dataset, tokenizer, max_prompt_length=10),
        Vocabulary(tokenizer, vocabulary_size(tokenizer), (tokenizer.eos_token_id,)),
        schema.Evaluation(),
        max_length=MAX_LENGTH,
        make_engine=lambda graph: Engine(
            graph,
            EngineConfig(max_length=32),
            eos_ids=(tokenizer.eos_token_id,),
            pad_id=tokenizer.pad_token_id,
            vocab_size=vocabulary_size(tokenizer),
        ),
        read=TokenReader(
            objective_of("forward"),
            vocab_size=vocabulary_size(tokenizer),
            batch_size=batch_size,
            put=jnp.asarray,
        ),
    )


def test_numbers_against_one_prompt_at_a_time(tokenizer):
    """Greedy answers, divergences, length and accuracy by a plain loop over full forwards."""
    dataset, student, teacher = Sums(), make_model(1, 24), make_model(2, 32)
    size = vocabulary_size(tokenizer)

    @jax.jit
    def log_probs(tokens_bt):
        models = (nnx.merge(model.graph, model.params) for model in (student, teacher))
        return [jax.nn.log_softmax(m.logits(m(tokens_bt))[0, :, :size]) for m in models]

    forward, reverse, lengths, right = 0.0, 0.0, [], 0
    for i in range(len(dataset)):
        prompt = tokenizer(f"{dataset[i].prompt}\n", add_special_tokens=False).input_ids
        row = np.zeros((1, len(prompt) + MAX_LENGTH), np.int32)
        row[0, : len(prompt)] = prompt
        answer = []
        while len(answer) < MAX_LENGTH and tokenizer.eos_token_id not in answer:
            position = len(prompt) + len(answer) - 1
            q, p = (np.asarray(x[position], np.float64) for x in log_probs(row))
            forward += (np.exp(p) * (p - q)).sum()
            reverse += (np.exp(q) * (q - p)).sum()
            answer.append(int(q.argmax()))
            row[0, position + 1] = answer[-1]
        lengths.append(len(answer))
        right += dataset.is_correct(dataset[i], tokenizer.decode(answer, skip_special_tokens=True))

    # Five prompts in batches of two: the last batch is filled up, and must not count twice.
    evaluation = make_evaluator(tokenizer, dataset, batch_size=2)(student, teacher)[0]
    assert evaluation.examples == 5
    assert evaluation.accuracy == right / 5
    assert evaluation.mean_length == pytest.approx(np.mean(lengths))
    assert evaluation.forward_kl == pytest.approx(forward / sum(lengths), rel=1e-4)
    assert evaluation.reverse_kl == pytest.approx(reverse / sum(lengths), rel=1e-4)


def test_without_teacher_or_answers_those_numbers_are_absent(tokenizer):
    evaluator = make_evaluator(tokenizer, Sums(with_answers=False), batch_size=5)
    evaluation, _ = evaluator(make_model(1, 24), None)
    assert evaluation.accuracy is None and evaluation.accuracy_low is None
    assert evaluation.forward_kl is None and evaluation.reverse_kl is None
    assert 1 <= evaluation.mean_length <= MAX_LENGTH
    assert evaluator.summary().endswith("; 5 have no answer and do not count for accuracy")


class SomeAnswers(Sums):
    def __getitem__(self, i):
        example = super().__getitem__(i)
        return example if i % 2 else dataclasses.replace(example, answer=None)


def test_accuracy_is_of_the_prompts_with_an_answer(tokenizer):
    evaluator = make_evaluator(tokenizer, SomeAnswers(), batch_size=5)
    assert evaluator.grade(["0", "1", "2", "", "4"]) == [None, True, None, False, None]
    evaluation, _ = evaluator(make_model(1, 24), None)
    assert (evaluation.examples, evaluation.graded) == (5, 2)
    assert evaluator.num_graded == 2 and "3 have no answer" in evaluator.summary()


def test_what_a_template_begins_to_think_is_no_answer(tokenizer, monkeypatch):
    evaluator = make_evaluator(tokenizer, Sums(), batch_size=5)
    monkeypatch.setattr(evaluator_module, "opens_thinking", lambda tokenizer, tokens: True)
    assert evaluator.grade([str(i) for i in range(5)]) == 5 * [False]
    assert evaluator.grade([f"no</think>{i}" for i in range(5)]) == 5 * [True]


def test_table_shows_the_three_models_side_by_side():
    row = dict(
        accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6, examples=100, forward_kl=0.125,
        reverse_kl=0.25, mean_length=12.0, truncated=0.01,
    )  # fmt: skip
    missing = {**row, "accuracy": None, "forward_kl": None}
    lines = format_table({"teacher": missing, "base": row}).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "base", "teacher"]
    assert "50.0%" in lines[1] and "40.0% - 60.0%" in lines[1] and "0.1250" in lines[1]
    assert "0.1250" not in lines[2]
    assert lines[1].index("12.0") == lines[2].index("12.0") == lines[0].index("length")
