"""Whole runs with a teacher of the student's tokenizer and one of another."""

import itertools
import shutil

import pytest
from tiny_runs import random_model, read_metrics, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import distill
from distill.base.errors import UserError
from distill.build.scratch import make_random_model
from distill.build.session import Session
from distill.checks import texts
from distill.config.parse import parse_config
from distill.data.tokenizer import END_OF_TEXT, PLAIN_CHAT_TEMPLATE

SIZES = dict(num_layers=1, model_width=32, num_heads=2, num_kv_heads=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model whose tokenizer has all numbers of two digits."""
    pairs = list(itertools.product("0123456789", repeat=2))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [END_OF_TEXT, *alphabet, *map("".join, pairs)]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, chat_template=PLAIN_CHAT_TEMPLATE
    )
    folder = tmp_path_factory.mktemp("models") / "other"
    make_random_model(folder, tokenizer, max_positions=96, **SIZES)
    return str(folder)


def two_teachers(other):
    config = tiny_config(max_steps=3)
    config.distillation.teacher_model_path, config.teacher.precision = "", "bfloat16"
    same = random_model(model_width=32, vocab_size=24, seed=1)
    config.teachers = {
        "same": dict(model=same, precision="float32", weight=0.5),
        "other": dict(model=other, precision="float32", alignment="spans"),
    }
    return config


def test_a_run_resumes_to_the_same_bits(other, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = distill.train(two_teachers(other), whole)
    lines = read_metrics(whole)
    steps = [line for line in lines if "loss" in line]
    for step in steps:
        cuts = [step[f"teacher/other/{cut}"] for cut in ("cut_alike", "in_spans", "left_out")]
        assert sum(cuts) == pytest.approx(1) and min(cuts[:2]) > 0
        assert "teacher/same/cut_alike" not in step and step["teacher/other/loss"] != 0
    roles = [*result.results]
    assert roles == ["base", "teacher/other", "teacher/same", "student"]
    assert result.results["teacher/other"]["forward_kl"] == 0
    assert result.results["base"]["other/forward_kl"] > 0
    shutil.copytree(whole / "checkpoints" / "2", resumed / "checkpoints" / "2")
    again = distill.train(two_teachers(other), resumed)
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (result.student / weights).read_bytes()
    assert read_metrics(resumed)[-1] == lines[-1]


def test_what_is_said_before_a_run(other, tmp_path):
    config = two_teachers(other)
    config.teachers.same.alignment = "none"
    session = Session(parse_config(config), tmp_path)
    found = texts.check_tokenizers(session)
    assert "texts are the same tokens for both" in found
    assert "the teacher other has another tokenizer, 357 ids of which 16 are strings" in found
    assert "are cut alike" in found and " 0% left out" in found
    assert "'<|endoftext|>' is to the teacher other what '<|endoftext|>' is" in texts.check_end(
        session
    )


@pytest.mark.parametrize(
    ("alignment", "positions", "words"),
    [
        ("none", 96, "different tokenizers: .*or set teacher.alignment=spans"),
        ("spans", 40, r"alignment needs rows of up to \d+ of the teacher's own tokens, .* 40 pos"),
    ],
)
def test_what_cannot_work_is_refused_before_models_are_loaded(
    other, alignment, positions, words, tmp_path, monkeypatch
):
    folder = tmp_path / "teacher"
    shutil.copytree(other, folder)
    path = folder / "config.json"
    positioned = path.read_text().replace(
        '"max_position_embeddings": 96', f'"max_position_embeddings": {positions}'
    )
    path.write_text(positioned)
    config = two_teachers(str(folder))
    config.teachers.other.alignment = alignment
    del config.teachers["same"]
    monkeypatch.setattr("distill.build.teachers.load_teacher", None)
    session = Session(parse_config(config), tmp_path)
    with pytest.raises(UserError, match=words) as error:
        session.load_teachers()
    assert "\n" not in str(error.value)
