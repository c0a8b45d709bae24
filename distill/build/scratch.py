"""Models made from scratch: tokenizer, random weights, and supervised steps before distillation.

A config without a model path gets the missing models here, as Hugging Face folders in
`workdir/scratch`; everything after that sees paths only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from distill.base import processes
from distill.base.errors import UserError
from distill.base.files import write_atomically
from distill.build.data import build_dataset
from distill.config.parse import check_same_run, to_flat_dict
from distill.config.schema import RESUMABLE_CHANGES, Config, Pretrain, Shape
from distill.data.arithmetic import CHARACTERS
from distill.data.tokenizer import (
    character_tokenizer,
    load_tokenizer,
    train_bpe_tokenizer,
    vocabulary_size,
)
from distill.models.checkpoints.export import export_model, hf_config_dict
from distill.models.checkpoints.hub import read_json, resolve_model
from distill.models.facts import ModelConfig
from distill.models.transformer import Transformer

_LONGEST_TEXT = 10_000  # characters of an example that a tokenizer learns from


def make_missing_models(
    config: Config, workdir: Path, supervise: Callable[[Config, Path], object]
) -> Config:
    """Returns `config` with a path for every model.

    Args:
      config: policy.model_name and distillation.teacher_model_path may be ''.
      workdir: folder of the run; models made earlier are found again in its `scratch` folder.
      supervise: trains `config` in a folder, which gets the model as its folder `student`.

    Raises:
      UserError: the models in the folder were made with another config.
    """
    distillation, policy, teacher = config.distillation, config.policy, config.teacher
    paths = {"student": policy.model_name, "teacher": distillation.teacher_model_path}
    recipes = {
        "student": (policy.shape, policy.pretrain),
        "teacher": (teacher.shape, teacher.pretrain),
    }
    missing = missing_models(config)
    if not missing:
        return config
    tokenizer = _make_tokenizer(config)
    for role in missing:
        _check_vocabulary_fits(role, recipes[role][0], tokenizer)
    folder = workdir / "scratch"
    _check_same_models(config, folder / "config.json")
    for role in missing:
        paths[role] = _make_model(config, role, *recipes[role], tokenizer, folder / role, supervise)
    return dataclasses.replace(
        config,
        distillation=dataclasses.replace(distillation, teacher_model_path=paths["teacher"]),
        policy=dataclasses.replace(policy, model_name=paths["student"]),
    )


def missing_models(config: Config) -> list[str]:
    """Which of student and teacher the config names no path for, though the run needs one."""
    distillation = config.distillation
    needs_teacher = not distillation.hard_labels and config.teacher.backend == "local"
    missing = [] if config.policy.model_name else ["student"]
    return missing + ["teacher"] * (needs_teacher and not distillation.teacher_model_path)


def without_pretraining(config: Config) -> Config:
    """The config whose models from scratch keep their random weights."""

    def random(section):
        return dataclasses.replace(section, pretrain=dataclasses.replace(section.pretrain, steps=0))

    return dataclasses.replace(config, policy=random(config.policy), teacher=random(config.teacher))


def _make_tokenizer(config: Config):
    kind, _, argument = config.policy.tokenizer.partition(":")
    if (kind, argument) == ("characters", "arithmetic"):
        return character_tokenizer(CHARACTERS)
    if kind == "bpe":
        if not argument.isdigit() or int(argument) < 300:
            raise UserError(
                f"policy.tokenizer={config.policy.tokenizer!r}: write bpe:SIZE with at least 300 "
                "entries (256 bytes, special tokens and merges)"
            )
        dataset = build_dataset(config)
        examples = (dataset[i] for i in range(len(dataset)))
        texts = (f"{example.prompt}\n{example.response or ''}" for example in examples)
        # A word without end would take hours: their number of steps is quadratic in its length.
        return train_bpe_tokenizer((text[:_LONGEST_TEXT] for text in texts), int(argument))
    return load_tokenizer(resolve_model(config.policy.tokenizer))


def _check_vocabulary_fits(role: str, shape: Shape, tokenizer) -> None:
    size = vocabulary_size(tokenizer)
    if 0 < shape.vocab_size < size:
        raise UserError(
            f"the {role}'s shape.vocab_size={shape.vocab_size} is smaller than the tokenizer's "
            f"{size} ids: raise it, or 0 takes that number"
        )


def _make_model(
    config: Config,
    role: str,
    shape: Shape,
    pretrain: Pretrain,
    tokenizer,
    folder: Path,
    supervise: Callable[[Config, Path], object],
) -> str:
    initial = folder / "initial"
    # An export appears whole or not at all, so a folder that is there is complete.
    if not processes.from_first(initial.exists):
        _export_random_model(initial, shape, tokenizer, config, seed_offset=role == "teacher")
    if pretrain.steps == 0:
        return str(initial)
    trained = folder / "pretrain" / "student"
    if not processes.from_first(trained.exists):
        supervise(_supervised(config, initial, pretrain), folder / "pretrain")
    return str(trained)


def _check_same_models(config: Config, path: Path) -> None:
    """Refuses models that another config left in the workdir; remembers this one's."""
    current = to_flat_dict(config)
    if path.exists():
        check_same_run(read_json(path), current, (*RESUMABLE_CHANGES, "distillation."))
    elif processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(current, indent=2) + "\n")


def _export_random_model(
    folder: Path, shape: Shape, tokenizer, config: Config, *, seed_offset: int
) -> None:
    model_config = ModelConfig(
        family="qwen2",
        vocab_size=shape.vocab_size or vocabulary_size(tokenizer),
        num_layers=shape.num_layers,
        model_width=shape.model_width,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_width=shape.model_width // shape.num_heads,
        ffn_width=shape.ffn_width,
        tied=shape.tied,
        qkv_bias=True,
        qk_norm=False,
        rms_eps=1e-6,
        rope_theta=10_000.0,
        rope_scaling=None,
        max_positions=config.policy.max_total_sequence_length,
    )
    model = Transformer(
        model_config,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(2 * config.seed + seed_offset),
    )
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    export_model(
        folder,
        nnx.state(model, nnx.Param),
        model_config,
        hf_config_dict(model_config, **ids),
        tokenizer,
        jnp.float32,
    )


def _supervised(config: Config, initial: Path, pretrain: Pretrain) -> Config:
    """Plain supervised training of one model on the fixed data, without evaluation."""
    distillation, policy, data = config.distillation, config.policy, config.data
    return dataclasses.replace(
        config,
        preflight=False,  # the run itself is checked
        distillation=dataclasses.replace(
            distillation,
            teacher_model_path="",
            hard_labels=True,
            lambda_=0.0,
            generate_strategy=dataclasses.replace(
                distillation.generate_strategy, num_generations=1
            ),
            max_steps=pretrain.steps,
            eval_steps=0,
            save_steps=0,
        ),
        policy=dataclasses.replace(
            policy,
            model_name=str(initial),
            optimizer=dataclasses.replace(
                policy.optimizer, learning_rate=pretrain.learning_rate, schedule="cosine"
            ),
        ),
        data=dataclasses.replace(
            data, shuffle=True, validation=dataclasses.replace(data.validation, max_samples=0)
        ),
        checkpointing=dataclasses.replace(config.checkpointing, export_dtype="float32"),
    )
