"""Models of random weights, and their tokenizers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from configs import math_cl, moe, qwen35
from distill.base.errors import UserError
from distill.build.data import build_dataset
from distill.build.plugins import import_plugins
from distill.build.scratch import make_random_model, make_tokenizer
from distill.config.parse import parse_config
from distill.data.arithmetic import CHARACTERS
from distill.data.base import get_dataset
from distill.data.tokenizer import (
    character_tokenizer,
    load_tokenizer,
    save_tokenizer,
    vocabulary_size,
)
from distill.models.checkpoints.source import load_model_config

ROOT = Path(__file__).parents[2]
SIZES = dict(num_layers=1, model_width=16, num_heads=2, num_kv_heads=2, max_positions=8)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(vocab_size=5), "vocab_size=5 is smaller than the tokenizer's 17 ids"),
        (dict(num_heads=3), "--width=16 must be a multiple of --heads=3"),
        (dict(num_heads=4, num_kv_heads=3), "--kv_heads=3"),
    ],
)
def test_sizes_that_do_not_fit(sizes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        make_random_model(tmp_path / "model", character_tokenizer(CHARACTERS), **(SIZES | sizes))
    assert not (tmp_path / "model").exists()


def test_tokenizers_of_a_size():
    dataset = get_dataset("arithmetic", "train", max_samples=50)
    assert 256 < vocabulary_size(make_tokenizer("bpe:300", dataset)) <= 300
    with pytest.raises(UserError, match="bpe:10: write bpe:SIZE with at least 300"):
        make_tokenizer("bpe:10", dataset)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B-Instruct", "embedded:arithmetic-student"])
def test_command_takes_no_name_of_the_hub_for_a_folder(name, tmp_path):
    """Random weights in a folder Qwen/... would be found in the place of the hub's."""
    command = [
        sys.executable, "-m", "distill.scratch", f"--config={ROOT}/configs/arithmetic.py",
        f"--config.policy.model_name={name}", "--tokenizer=characters:arithmetic",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "pass --output=FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_writes_the_model_that_the_config_names(tmp_path):
    command = [
        sys.executable, "-m", "distill.scratch", "--config=configs/math_cl.py:smoke",
        f"--config.policy.model_name={tmp_path / 'student'}", "--tokenizer=bpe:400", "--width=32",
        "--vocab_size=416",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, _ = load_model_config(tmp_path / "student")
    assert (model.vocab_size, model.num_layers, model.model_width) == (416, 2, 32)
    assert vocabulary_size(load_tokenizer(tmp_path / "student")) <= 400


@pytest.mark.parametrize(
    ("config", "family"), [(math_cl, "qwen2"), (qwen35, "qwen3_5_text"), (moe, "qwen3_moe")]
)
def test_tokenizers_of_a_smoke_config_are_learned_alike(config, family, tmp_path):
    """Student's and teacher's, by commands of their own; and read so, by transformers too."""
    parsed = parse_config(config.get_config("smoke"))
    import_plugins(parsed)
    datasets = [build_dataset(parsed) for _ in range(2)]
    first, second = (make_tokenizer("bpe:400", dataset) for dataset in datasets)
    text = "Solve $7x + 11 = 74$ for $x$."
    expected = first(text)["input_ids"]
    assert len(expected) < len(text)
    save_tokenizer(second, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    for load in (load_tokenizer, AutoTokenizer.from_pretrained):
        assert load(tmp_path)(text)["input_ids"] == expected
