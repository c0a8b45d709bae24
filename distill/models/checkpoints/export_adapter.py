"""Writing a student's adapters as PEFT has them: the inverse of adapters.py, by the key table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base import processes
from distill.base.errors import UserError
from distill.config.policy import Lora
from distill.models.checkpoints.adapters import ADAPTER_WEIGHTS, PREFIX
from distill.models.checkpoints.export import (
    Exported,
    Part,
    begin_folder,
    check_replaceable,
    copy_tokenizer,
    replace_folder,
    save_tensors,
    write_json,
)
from distill.models.checkpoints.hub import ADAPTER, CARD
from distill.models.checkpoints.keys import Weight, key_table, mapped_params
from distill.models.facts import ModelConfig


def export_adapter(
    folder: Path,
    params: nnx.State,
    adapters: nnx.State,
    config: ModelConfig,
    lora: Lora,
    *,
    base: dict[str, Any],
    name: Callable[[str], str],
    tokenizer: Path,
    card: str | None = None,
) -> None:
    """Writes a folder that peft loads on the base model; `adapters.merge_adapter` is its inverse.

    Of the base are `params`, arrays or shapes, `config`, the fields `base` that say where it is,
    and `name`, which makes its own keys of a text model's. See `export_model` for the rest.

    Raises:
      UserError: see `check_modules`; or the folder is no export.
    """
    check_replaceable(folder)
    check_modules(config, adapters)
    found = _find_factors(config, params, adapters)
    partial, dtype = begin_folder(folder), np.dtype(np.float32)
    tensors, parts = {}, {}
    for (module, factor), exported in found.items():
        module = name(f"{module}.weight").removesuffix(".weight")
        value = exported.gather(dtype)
        if value is not None:
            tensors[f"{PREFIX}{module}.lora_{factor}.weight"] = value
        parts[module.rpartition(".")[2]] = exported.shape[1 if factor == "B" else 0] // lora.rank
    # A matrix that is several of ours has their ranks together, and the same scale.
    joined = {module: number for module, number in parts.items() if number > 1}
    if jax.process_index() == 0:
        save_tensors(partial / ADAPTER_WEIGHTS, tensors)
        fields = dict(
            peft_type="LORA",
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=sorted(parts),
            rank_pattern={module: number * lora.rank for module, number in joined.items()},
            alpha_pattern={module: number * lora.alpha for module, number in joined.items()},
            inference_mode=True,
        )
        write_json(partial / ADAPTER, base | fields)
        copy_tokenizer(tokenizer, partial)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        replace_folder(folder, partial)
    processes.sync(f"exported {folder}")


def check_modules(config: ModelConfig, adapters: nnx.State) -> None:
    """Raises UserError if an adapted matrix is in a tensor that is no linear module's weight."""
    table = key_table(config)
    for path in ("/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(adapters)):
        if len(table[path].theirs) != 2 or not table[path].key.endswith(".weight"):
            raise UserError(
                f"checkpointing.export_format=peft has no place for adapters of {path}, which "
                f"{config.family} keeps in tensors of several matrices: set export_format=merged, "
                "or choose other policy.lora.targets"
            )


def _find_factors(
    config: ModelConfig, params: nnx.State, adapters: nnx.State
) -> dict[tuple[str, str], Exported]:
    """Both factors of each adapted module, in their layout, by its name and 'A' or 'B'."""
    mapped, found = mapped_params(config, params), {}
    factors = {"/".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(adapters)}
    for path, (weight, _) in mapped.items():
        paths = weight.parts or (path,)
        adapted = [part for part in paths if f"{part}/a" in factors]
        if path not in adapted[:1]:
            continue
        made: dict[str, list[tuple[Weight, jax.Array]]] = {"A": [], "B": []}
        for part in paths:
            row, value = mapped[part]
            a, b = _as_one(factors, adapted, part, value.shape, len(row.stacked))
            inputs, outputs = row.theirs[1], row.theirs[0]
            if a is not None:
                made["A"].append((row._replace(axes=f"{inputs}r -> r {inputs}"), a))
            made["B"].append((row._replace(axes=f"r{outputs} -> {outputs} r"), b))
        for index, key in weight.tensors(mapped[path][1].shape):
            for factor, rows in made.items():
                parts = [Part(row, array, index) for row, array in rows]
                found[key.removesuffix(".weight"), factor] = Exported(key, parts)
    return found


def _as_one(
    factors: dict[str, Any], adapted: list[str], path: str, shape: tuple[int, ...], leading: int
) -> tuple[Any, jax.Array]:
    """A parameter's factors in a tensor of several: b has columns for the ranks of all of them.

    One that is not adapted has no a, and zeros for b.
    """
    rank = factors[f"{adapted[0]}/a"].shape[-1]
    total = rank * len(adapted)
    if path not in adapted:
        outputs = shape[leading + 1 :]  # what is joined reads the stream
        return None, jnp.zeros((*shape[:leading], total, *outputs), jnp.float32)
    a, b = factors[f"{path}/a"], factors[f"{path}/b"]
    before = rank * adapted.index(path)
    padding = [(0, 0)] * b.ndim
    padding[leading] = before, total - before - rank
    return a, jnp.pad(b, padding) if len(adapted) > 1 else b
