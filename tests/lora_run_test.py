"""Whole runs with adapters: resumed, exported, planned, refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import num_bytes
from tiny_runs import tiny_config

import distill
from distill.base.errors import UserError
from distill.build.run import build_checkpoints
from distill.build.session import open_session
from distill.config.parse import parse_config


def small_config(**lora):
    config = tiny_config(max_steps=3)
    config.policy.lora.rank = 2
    config.policy.lora.update(lora)
    config.data.validation.max_samples = 0
    config.checkpointing.export_dtype = "float32"
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three updates on a base in 8 bits, with checkpoints of two and three."""
    folder = tmp_path_factory.mktemp("lora")
    distill.train(small_config(base_dtype="int8"), folder)
    return folder


def state_of(run: Path, step: int):
    config = parse_config(small_config(base_dtype="int8"))
    with open_session(config, run) as session:
        checkpoints = build_checkpoints(config, run)
        state = session.restore_state(checkpoints, step)
        return state, session.evaluated(state).params


def test_resumed_run_ends_with_the_same_bits(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    distill.train(small_config(base_dtype="int8"), tmp_path)
    (ours, _), (theirs, _) = state_of(tmp_path, 3), state_of(run, 3)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(one, other)
    name = "student/model.safetensors"
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_a_checkpoint_is_as_large_as_the_adapters_and_the_export_is_merged(run):
    state, merged = state_of(run, 3)
    assert num_bytes(state.saved) == 3 * num_bytes(state.trainable) + 12
    written = json.loads((run / "checkpoints" / "3" / "state" / "_METADATA").read_text())
    names = [
        name
        for name, array in written["tree_metadata"].items()
        if not array["value_metadata"]["skip_deserialize"]
    ]
    assert len(names) == len(jax.tree.leaves(state.saved)) and not any("frozen" in x for x in names)
    exported = load_file(run / "student" / "model.safetensors")
    ours = exported["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(ours.T, merged["layers"]["up_proj"].get_value()[0])
    base = load_file(Path(small_config().policy.model_name) / "model.safetensors")
    assert 1e-4 < np.abs(ours - base["model.layers.0.mlp.up_proj.weight"]).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy.lora.targets": ()}, "'policy.lora.targets' is empty"),
        ({"policy.lora.rank": 0, "policy.lora.base_dtype": "int8"}, "policy.lora.rank=0 trains"),
        ({"policy.lora.rank": 0, "checkpointing.export_format": "peft"}, "export_format is about"),
    ],
)
def test_keys_that_mean_nothing_are_refused(changes, message):
    config = small_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        parse_config(config)
