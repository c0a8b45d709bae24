"""The card beside an exported student, and exports of checkpoints: what is written and refused."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_runs import tiny_config, with_models

import distill
from distill.base.errors import UserError
from distill.config.parse import parse_config, to_flat_dict
from distill.evaluation.table import format_table
from distill.export import export_checkpoint
from distill.reporting.model_card import model_card


def evaluation(accuracy: float | None = 0.5) -> dict:
    has = accuracy is not None
    return {
        "accuracy": accuracy,
        "accuracy_low": 0.4 if has else None,
        "accuracy_high": 0.6 if has else None,
        "examples": 8,
        "forward_kl": 0.25,
        "reverse_kl": 0.75,
        "mean_length": 9.0,
        "truncated": 0.125,
    }


def card_of(results=None, **changes) -> ModelCard:
    config = tiny_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return ModelCard(model_card(to_flat_dict(parse_config(config)), results or {}, 6))


def test_hub_ids_are_metadata_and_links():
    card = card_of(
        **{
            "policy.model_name": "Qwen/Qwen2.5-1.5B-Instruct@main",
            "distillation.teacher_model_path": "Qwen/Qwen2.5-32B-Instruct@v1",
            "distillation.kl_type": "jsd",
            "distillation.jsd_beta": 0.3,
            "data.name": "math_cl",
        }
    )
    assert card.data.library_name == "transformers" and card.data.license == "unknown"
    assert card.data.base_model == "Qwen/Qwen2.5-1.5B-Instruct"
    assert card.data.datasets == ["pe-nlp/math-cl"]
    assert "on-policy-distillation" in card.data.tags
    assert "(https://huggingface.co/Qwen/Qwen2.5-32B-Instruct/tree/v1)" in card.text
    assert "`jsd` with `jsd_beta=0.3`" in card.text
    assert card.text.count("FILL IN") == 4


def test_results_stand_as_in_the_log_and_only_where_there_are_any():
    results = {"base": evaluation(), "student": evaluation(None)}
    assert format_table(results) in card_of(results).text
    assert "Held-out results" not in card_of().text


def test_supervised_student_has_no_teacher():
    card = card_of(**{"distillation.hard_labels": True, "distillation.lambda_": 0.0})
    assert "updates of fine-tuning" in card.text and "teacher" not in card.text
    assert "sft" in card.data.tags and "on-policy-distillation" not in card.data.tags


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"reward_advantage": 1.0},
            "on its own responses to .*, by the policy gradient",
        ),
        ({"terms": ("policy_gradient",)}, ", by the policy gradient of the reward `r`"),
        ({"cross_entropy": 0.5, "reward_advantage": 1.0}, "reward `r` and cross-entropy"),
    ],
)
def test_student_of_rewards_has_no_teacher(changes, words):
    changes = {f"distillation.objective.{key}": value for key, value in changes.items()}
    changes |= {"distillation.objective.divergence": 0.0, "reward.function": "r"}
    changes |= {"distillation.generate_strategy.num_generations": 2}
    card = card_of(**changes)
    assert re.search(words, card.text) and "teacher" not in card.text


@pytest.mark.parametrize(
    ("lambda_", "words"), [(0.0, "on given responses"), (0.25, "with probability 0.25, else")]
)
def test_card_says_whose_answers(lambda_, words):
    assert words in card_of(**{"distillation.lambda_": lambda_}).text


def test_folders_are_named_by_their_last_part_and_hostile_names_stay_text():
    card = card_of(
        **{
            "policy.model_name": "/home/somebody/models/student",
            "distillation.teacher_model_path": "/secret/place/teach`er\n---\nlicense: mit",
            "data.path": "/secret/data.jsonl",
        }
    )
    text = str(card)
    assert "secret" not in text and "somebody" not in text
    assert "`student`" in text and "`data.jsonl`" in text
    assert card.data.base_model is None and card.data.license == "unknown"
    assert "`teach'er --- license: mit`" in text


# ---- of whole runs ----


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> tuple[Path, distill.Result]:
    workdir = tmp_path_factory.mktemp("finished")
    config = with_models(tiny_config(max_steps=4, eval_steps=3), models)
    return workdir, distill.train(config, workdir)


def test_run_writes_a_card_that_gives_no_folder_away(finished):
    workdir, result = finished
    text = (result.student / "README.md").read_text()
    assert format_table(result.results) in text and "after 4 updates" in text
    assert not re.search(r"(?<!:/)/(tmp|home|work)", text) and str(workdir) not in text


def test_card_says_how_to_load_the_student(finished):
    pytest.importorskip("torch")
    text = (finished[1].student / "README.md").read_text()
    [source] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    source = source.replace('"."', repr(str(finished[1].student))).replace('"..."', '"3+4="')
    values: dict = {}
    exec(compile(source, "README.md", "exec"), values)
    assert values["response"].shape[1] > values["inputs"]["input_ids"].shape[1]


def test_export_of_an_earlier_checkpoint_has_no_results_of_a_later_student(
    models, finished, tmp_path
):
    config = with_models(tiny_config(max_steps=4, eval_steps=3), models)
    assert export_checkpoint(config, finished[0], tmp_path / "out", "2") == 2
    text = (tmp_path / "out" / "README.md").read_text()
    assert "after 2 updates" in text and "\nbase " in text and "\nstudent " not in text


@pytest.mark.parametrize(
    ("workdir", "output", "checkpoint", "words"),
    [
        ("nowhere", "out", "best", "there is no checkpoint in .*nowhere/checkpoints: pass the"),
        ("foreign", "out", "best", "there is no checkpoint in .*foreign/checkpoints: pass the"),
        ("half", "out", "3", "no checkpoint in .*half/checkpoints"),
        ("", "out", "best", "pass --config.checkpointing.best_metric=eval.* or --checkpoint=4"),
        ("", "out", "3", "--checkpoint=3 is not there: pass best, or one of 2, 4"),
        ("", "foreign", "4", "is not empty and holds no config.json"),
        ("", "foreign/file", "4", "is a file: export to a folder"),
        ("damaged", "out", "4", "4 is damaged .*put back a copy"),
    ],
)
def test_bad_exports_are_one_line(models, finished, tmp_path, workdir, output, checkpoint, words):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("mine")
    (tmp_path / "half" / "checkpoints" / "3.partial").mkdir(parents=True)
    (tmp_path / "damaged" / "checkpoints" / "4").mkdir(parents=True)
    config = with_models(tiny_config(max_steps=4, eval_steps=3), models)
    with pytest.raises(UserError, match=words) as error:
        folder = tmp_path / workdir if workdir else finished[0]
        export_checkpoint(config, folder, tmp_path / output, checkpoint)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "foreign" / "file").read_text() == "mine"
