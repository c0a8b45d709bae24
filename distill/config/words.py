"""The schema in words: for --help, for completion in a shell, and as a page of the docs.

python -m distill.config.words > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from distill.config.schema import schema_keys

# What most runs set; --help shows these.
COMMON = (
    "distillation.teacher_model_path",
    "distillation.lambda_",
    "distillation.kl_type",
    "distillation.max_steps",
    "distillation.eval_steps",
    "distillation.save_steps",
    "distillation.generate_strategy.max_length",
    "distillation.generate_strategy.temperature",
    "policy.model_name",
    "policy.max_total_sequence_length",
    "policy.train_global_batch_size",
    "policy.train_micro_batch_size",
    "policy.activation_checkpointing",
    "policy.optimizer.learning_rate",
    "policy.generation.backend",
    "teacher.precision",
    "data.name",
    "data.path",
    "mesh.fsdp",
    "plugins",
)

_PAGE = """\
# Configuration

All keys, written from [distill/config/schema.py](../distill/config/schema.py) by
`python -m distill.config.words > docs/configuration.md`. A file in `configs/` edits what
`default_config()` returns; the command line overrides single keys:

    python -m distill.main --config=configs/gsm8k.py --workdir=runs/jsd \\
        --config.distillation.kl_type=jsd --config.plugins="('my_data','my_losses')"

Unknown keys, wrong types, values out of range and combinations that cannot work end a command with
one line, before anything is loaded. `python -m distill.main --config=... --dry_run` prints the
values that a run would have.

The last column says what becomes of a run that is continued with another value of the key:

| on resume | the key changes | what happens |
|---|---|---|
| free | nothing in the result, up to rounding | the run goes on |
| content | where something is found | it goes on if that is the same |
| named | the rest of the run | it goes on if `checkpointing.allow_changes` names the key |
| fixed | what the run is | it is refused |

`distillation.max_steps` is free while `policy.optimizer.schedule=constant`.
`checkpointing.allow_changes` may also name contents: `student`, `teacher`, `data`, `template` and
`validation`. What was allowed is kept in the checkpoint and shown in the student's model card.

To complete keys with the Tab key in bash:

    eval "$(python -m distill.config.completion)"
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the schema: its dotted name, and the rest in words."""

    name: str
    kind: str
    default: str
    allowed: str
    help: str
    changes: str
    about: str  # its section

    @property
    def section(self) -> str:
        """The section's name; the top level has none."""
        return self.name.rpartition(".")[0]


def all_keys() -> Iterator[Key]:
    """Those of the schema, in its order."""
    for name, field, kind, section in schema_keys():
        default, limits = show_value(field.default), field.metadata
        words = _allowed(limits), limits["help"], limits["changes"], _documentation(section)
        yield Key(name, _kind(kind), default, *words)


def show_value(value: Any) -> str:
    """As it may stand behind --config.KEY=."""
    if isinstance(value, (tuple, list)):
        return str(tuple(value))
    return str(value) if value != "" else "''"


def _documentation(cls: type) -> str:
    text = inspect.getdoc(cls) or ""
    return "" if text.startswith(f"{cls.__name__}(") else text  # which dataclasses would make


def _kind(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return f"{typing.get_args(kind)[0].__name__} or None"
    return "texts" if typing.get_origin(kind) is tuple else kind.__name__


def _allowed(limits: typing.Mapping[str, Any]) -> str:
    choices, low, high = limits["choices"], limits["low"], limits["high"]
    if choices is not None:
        return ", ".join(choice or "''" for choice in choices)
    if high is not None:
        return f"{_number(low)} to {_number(high)}"
    return "" if low is None else f"at least {_number(low)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def help_lines() -> Iterator[str]:
    """The common keys as options, for a terminal."""
    by_name = {key.name: key for key in all_keys()}
    for key in map(by_name.__getitem__, COMMON):
        yield f"  --config.{key.name}={key.default}"
        yield f"      {key.help} ({key.kind}{key.allowed and f': {key.allowed}'})"


def page() -> str:
    """docs/configuration.md."""
    blocks, sections = [_PAGE], dict[str, list[Key]]()
    for key in all_keys():
        sections.setdefault(key.section, []).append(key)
    for name, keys in sections.items():
        heading, about = f"\n## {name or 'Top level'}\n", keys[0].about
        blocks += [heading, f"{about}\n"] if about else [heading]
        blocks += ["| key | type | default | allowed | what it does | on resume |"]
        blocks += ["|---|---|---|---|---|---|"]
        blocks += map(_row, keys)
    return "\n".join(blocks) + "\n"


def _row(key: Key) -> str:
    name = key.name.rpartition(".")[2]
    return (
        f"| `{name}` | {key.kind} | `{key.default}` | {key.allowed} | {key.help} | {key.changes} |"
    )


if __name__ == "__main__":
    print(page(), end="")
