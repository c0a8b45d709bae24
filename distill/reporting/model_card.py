"""The card of an exported student: README.md, as the Hugging Face hub shows and reads it.

It says how the student was made, as far as the run's settings tell. Folders of this machine are
named by their last part only; what nobody but the user can know is there to be filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill.base.errors import printable
from distill.config.method import OF_STUDENT, Objective
from distill.data import gsm8k, math_cl
from distill.evaluation.table import format_table
from distill.models.checkpoints.hub import EMBEDDED, is_hub_id, split_revision

_HUB_DATASETS = {"gsm8k": gsm8k.HUB_ID, "math_cl": math_cl.HUB_ID}
# kl_type: the key that sets its parameter.
_PARAMETERS = {
    "mixed": "mixed_kl_weight",
    "jsd": "jsd_beta",
    "skew_forward": "skew_alpha",
    "skew_reverse": "skew_alpha",
}
_SETTINGS = (
    "distillation.lambda_",
    "distillation.kl_temperature",
    "distillation.generate_strategy.temperature",
    "distillation.generate_strategy.top_k",
    "distillation.generate_strategy.top_p",
    "distillation.generate_strategy.max_length",
    "distillation.max_steps",
    "policy.train_global_batch_size",
    "policy.max_total_sequence_length",
    "policy.precision",
    "policy.optimizer.learning_rate",
    "policy.optimizer.schedule",
    "seed",
)
_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
response = model.generate(**inputs, max_new_tokens=MAX_LENGTH)
print(tokenizer.decode(response[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def model_card(
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    step: int,
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of the card.

    Args:
      settings: the run's config, as from `config.to_flat_dict`, before models were made.
      results: evaluations by role, as in results.json; {} where there are none.
      step: updates of the student.
      history: what was changed at which step of the run, as its checkpoints keep it.
    """
    sections = [
        f"---\n{_metadata(settings)}\n---",
        f"# {_title(settings)}",
        _summary(settings, step),
        f"## How it was trained\n\n{_settings_table(settings)}",
        *(_change(entry) for entry in history),
    ]
    if results:
        sections.append(f"## Held-out results\n\n{_results(settings, results)}")
    max_length = str(settings["distillation.generate_strategy.max_length"])
    sections.append(f"## Use\n\n{_LOADING.replace('MAX_LENGTH', max_length)}")
    sections.append(f"## Licence\n\n{_licence(settings)}")
    return "\n\n".join(sections) + "\n"


def _metadata(settings: Mapping[str, Any]) -> str:
    """YAML; the hub takes ids of its own only."""
    from huggingface_hub import ModelCardData

    base, dataset = settings["policy.model_name"], _hub_dataset(settings)
    kind = "sft" if settings["distillation.hard_labels"] else "on-policy-distillation"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="unknown",
        base_model=split_revision(base)[0] if _is_on_hub(base) else None,
        datasets=[split_revision(dataset)[0]] if dataset else None,
        tags=[kind, "distill", "jax"],
    )
    return data.to_yaml()


def _title(settings: Mapping[str, Any]) -> str:
    kind = "fine-tuned" if settings["distillation.hard_labels"] else "distilled"
    return f"{_model(settings['policy.model_name'])}, {kind}"


def _summary(settings: Mapping[str, Any], step: int) -> str:
    student, data = _model(settings["policy.model_name"]), _data(settings)
    if settings["distillation.hard_labels"]:
        return f"{student}, after {step} updates of fine-tuning on the responses in {data}."
    objective, further = _objective(settings), []
    if objective.reads_advantages:
        reward = settings["reward.function"]
        named = f" of the reward `{_plain(reward)}`" if reward else ""
        further.append(f"the policy gradient{named}")
    if objective.cross_entropy or "cross_entropy" in objective.parts:
        further.append("cross-entropy")
    lambda_ = settings["distillation.lambda_"]
    source = (
        "on its own responses"
        if lambda_ == 1
        else "on given responses"
        if lambda_ == 0
        else f"on its own responses with probability {lambda_:g}, else on given ones,"
    )
    if not objective.reads_teacher:
        return (
            f"{student}, after {step} updates {source} to the prompts of {data}, by "
            f"{' and '.join(further)}."
        )
    beside = f", beside {' and '.join(further)}" if further else ""
    return (
        f"{student}, after {step} updates of distillation {source} to the prompts of {data}. "
        f"At every response token it learned the next-token distribution of {_teacher(settings)}, "
        f"by the divergence {_divergence(settings)}{beside}."
    )


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = [f"| `{key}` | {settings[key]} |" for key in _SETTINGS]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _change(entry: Mapping[str, Any]) -> str:
    changes = entry["changes"].items()
    listed = ", ".join(
        f"`{key}` from {_plain(f'{a}')} to {_plain(f'{b}')}" for key, (a, b) in changes
    )
    return f"Changed at step {entry['step']}: {listed}."


def _results(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    name = settings["data.validation.name"] or settings["data.name"]
    examples = max(result["examples"] for result in results.values())
    return (
        f"Greedy responses to {examples} prompts of `{_plain(name)}`, split "
        f"`{_plain(settings['data.validation.split'])}`. The interval is Wilson's. Divergences "
        "from the teacher are in nats per token of a model's own responses.\n"
        f"\n```\n{format_table(results)}\n```"
    )


def _licence(settings: Mapping[str, Any]) -> str:
    """What only the user can know."""
    lines = ["- of this model, also above as `license`: FILL IN"]
    lines.append(f"- of the student, {_model(settings['policy.model_name'])}: FILL IN")
    if _objective(settings).reads_teacher and not settings["distillation.hard_labels"]:
        teacher = _teacher(settings)
        lines.append(f"- of the teacher, {teacher}, and its terms for training on it: FILL IN")
    lines.append(f"- of the data, {_data(settings)}: FILL IN")
    return "\n".join(lines)


def _objective(settings: Mapping[str, Any]) -> Objective:
    prefix = "distillation.objective."
    keys = [key for key in settings if key.startswith(prefix)]
    return Objective(**{key.removeprefix(prefix): settings[key] for key in keys})


def _divergence(settings: Mapping[str, Any]) -> str:
    kl_type = settings["distillation.kl_type"]
    if kl_type not in _PARAMETERS:
        return f"`{_plain(kl_type)}`"
    key = _PARAMETERS[kl_type]
    return f"`{kl_type}` with `{key}={settings['distillation.' + key]:g}`"


def _teacher(settings: Mapping[str, Any]) -> str:
    names = sorted({key.split(".")[1] for key in settings if key.startswith("teachers.")})
    if names:
        keys = [f"teachers.{name}." for name in names]
        each = [_one_teacher(settings[f"{k}model"], settings[f"{k}backend"]) for k in keys]
        return " and ".join(dict.fromkeys(each))
    path = settings["distillation.teacher_model_path"]
    return _one_teacher(path, settings["teacher.backend"])


def _one_teacher(path: str, backend: str) -> str:
    if path in OF_STUDENT:
        return f"the student itself (`{path}`)"
    if not path and backend != "local":
        return "the model that a vLLM server served"
    return _model(path)


def _model(path: str) -> str:
    if not path:
        return "a model made from scratch"
    if path.startswith(EMBEDDED):
        return f"the built-in `{_plain(path.removeprefix(EMBEDDED))}`"
    if _is_on_hub(path):
        return _link(path)
    return f"`{_last_part(path)}`"


def _data(settings: Mapping[str, Any]) -> str:
    if dataset := _hub_dataset(settings):
        return _link(dataset, "datasets/")
    path = settings["data.path"]
    of = f" of `{_last_part(path)}`" if path else ""
    return f"`{_plain(settings['data.name'])}`{of}"


def _hub_dataset(settings: Mapping[str, Any]) -> str | None:
    name, path = settings["data.name"], settings["data.path"]
    if name == "hf":
        return path if _is_on_hub(path) else None
    return None if path else _HUB_DATASETS.get(name)


def _link(name: str, kind: str = "") -> str:
    hub_id, revision = split_revision(name)
    tree = f"/tree/{revision}" if revision else ""
    return f"[{name}](https://huggingface.co/{kind}{hub_id}{tree})"


def _is_on_hub(name: str) -> bool:
    return "/" in name and is_hub_id(name)


def _last_part(path: str) -> str:
    return _plain(re.split(r"[/\\]", path.rstrip("/\\"))[-1])


def _plain(text: str) -> str:
    """Fit for a code span."""
    return printable(text).replace("`", "'")
