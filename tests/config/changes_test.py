"""What may differ when a run goes on: every key and content, by the class beside it."""

import ast
import json

import pytest

from distill.base.errors import UserError
from distill.config.changes import CONTENTS, check_changes, classes, find_changes
from distill.config.keys import CONTENT, FIXED, FREE, NAMED
from distill.config.method import OneTeacher, Teachers
from distill.config.parse import default_config, parse_config, to_flat_dict
from distill.config.schema import Config, PluginKeys

FLAT = to_flat_dict(Config(teachers=Teachers(NAME=OneTeacher())))
# A wrong class here means something else than its user thinks, or a workdir that is a dead end:
# whoever adds a key to one of these lists says so.
EXPECTED_FIXED = {
    "seed",
    "policy.lora.rank",
    "policy.lora.alpha",
    "policy.lora.targets",
    "policy.lora.base_dtype",
    "policy.optimizer.name",
    "teacher.ema_decay",
    "teachers.NAME.ema_decay",
    "policy.train_global_batch_size",
    "distillation.generate_strategy.num_generations",
    "data.shuffle",
}
REMEDIES = [  # of docs/troubleshooting.md, which change nothing in the result
    "policy.generation.cache_memory",
    "policy.generation.num_slots",
    "policy.generation.max_log_prob_gap",
    "policy.activation_checkpointing",
    "policy.train_micro_batch_size",
    "policy.sequence_packing.enabled",
    "evaluation.batch_size",
    "mesh.fsdp",
    "teacher.offload",
    "teacher.split_over_data",
    "logger.warn.truncated",
]
ALTER = [  # remedies that change the rest of the run
    "evaluation.answer_timeout",
    "policy.optimizer.learning_rate",
    "policy.precision",
    "distillation.lambda_",
    "distillation.kl_type",
    "distillation.generate_strategy.max_length",
    "teacher.precision",
    "policy.generation.cache_dtype",
    "policy.generation.async_steps",
]


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return ["x"] if isinstance(value, list) else "x"


def outcome(key: str, allowed=()) -> str:
    saved = dict.fromkeys(CONTENTS, "a") | FLAT
    try:
        check_changes(find_changes(saved, {**saved, key: other(saved[key])}), allowed)
    except UserError as error:
        assert key in str(error) and "\n" not in str(error)
        return "advised" if f"allow_changes={key}" in str(error) else "refused"
    return "goes on"


@pytest.mark.parametrize(("key", "changes"), classes().items())
def test_every_key_is_as_its_class_says(key, changes):
    if key == "distillation.max_steps":
        return  # has a test of its own
    alone, named = {
        FREE: ("goes on", "goes on"),
        CONTENT: ("goes on", "goes on"),
        NAMED: ("advised", "goes on"),
        FIXED: ("refused", "refused"),
    }[changes]
    assert (outcome(key), outcome(key, (key,))) == (alone, named)


def test_classes_are_what_they_should_be():
    found = classes()
    assert set(found) == set(FLAT) | set(CONTENTS)
    assert {key for key, changes in found.items() if changes == FIXED} == EXPECTED_FIXED
    assert {found[key] for key in REMEDIES} == {FREE}
    assert {found[key] for key in (*ALTER, *CONTENTS)} == {NAMED}
    # Whatever names a model, or a row or its rendering, is compared by what it leads to.
    ends = ("_path", "model_name", "data.name", ".path", ".split", "_column", ".subset", "_prompt")
    assert {found[key] for key in FLAT if key.endswith(ends)} == {CONTENT}


def test_more_steps_need_no_name_where_the_schedule_does_not_look_at_them():
    assert outcome("distillation.max_steps") == "goes on"
    saved = FLAT | {"policy.optimizer.schedule": "cosine"}
    with pytest.raises(UserError, match="allow_changes=distillation.max_steps"):
        check_changes(find_changes(saved, saved | {"distillation.max_steps": 9}), ())


def test_advice_names_all_that_differs_and_parses():
    changes = find_changes(
        FLAT, FLAT | {"distillation.lambda_": 0.5, "policy.precision": "float32"}
    )
    with pytest.raises(UserError) as error:
        check_changes(changes, ("data",))
    value = str(error.value).rpartition("=")[2]
    assert value == "\"('data','distillation.lambda_','policy.precision')\""
    config = default_config()
    config.policy.model_name = config.distillation.teacher_model_path = "model"
    config.checkpointing.allow_changes = ast.literal_eval(value.strip('"'))
    check_changes(changes, parse_config(config).checkpointing.allow_changes)


@pytest.mark.parametrize("name", ["seed", "logger.progress_bar", "data.path", "nosuch", "policy"])
def test_only_what_may_be_named_is(name):
    config = default_config()
    config.policy.model_name = config.distillation.teacher_model_path = "model"
    config.checkpointing.allow_changes = (name,)
    with pytest.raises(UserError, match=f"allow_changes names '{name}': it takes student, teacher"):
        parse_config(config)


def test_a_key_that_is_newer_than_the_checkpoint_had_its_default_there():
    older = {key: value for key, value in FLAT.items() if key != "evaluation.metrics"}
    assert not find_changes(older, FLAT)
    assert find_changes(older, FLAT | {"evaluation.metrics": ["x"]}) == {
        "evaluation.metrics": [(), ["x"]]
    }


def test_a_key_that_is_gone_is_another_run():
    with pytest.raises(UserError, match="removed.key"):
        check_changes(find_changes(FLAT | {"removed.key": 1}, FLAT), ("removed.key",))


def test_several_values_of_a_plugins_key_are_those_of_the_checkpoint():
    flat = to_flat_dict(Config(plugin=PluginKeys(levels=("easy", "hard"))))
    assert find_changes(json.loads(json.dumps(flat)), flat) == {}
