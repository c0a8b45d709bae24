"""The student as folders that vLLM loads: every refit is one, whole or not there.

Exported with its own output head even if the student ties it to the embedding, because vLLM 0.32
keeps the old head of a tied model when it reloads weights (seen on CPU); and without the rows that
pad a vocabulary, so that a server neither samples padding ids nor gives them probability.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from distill.base import processes
from distill.data.tokenizer import Vocabulary
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.source import load_model_config
from distill.models.lora import merged

_VERSION = re.compile(r"\d{8}")
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class ServerExport:
    """Writes a student's parameters as a model folder for vLLM, with its tokenizer.

    A server that scores needs one token more than `max_length`.
    """

    student_folder: Path
    vocabulary: Vocabulary
    max_length: int
    dtype: jax.typing.DTypeLike

    def write(self, folder: Path, params: nnx.State, transform=None) -> None:
        """Replaces `folder`; `transform` as in `export_model`."""
        model_config, hf_config = load_model_config(self.student_folder)
        served = {
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary.size,
            # vLLM refuses a longer context than this; positions are not embedded, only rotated.
            # Scalings of them depend on it, so it only grows where it must.
            "max_position_embeddings": max(
                hf_config.get("max_position_embeddings", model_config.max_positions),
                self.max_length + 1,
            ),
        }
        export_model(
            folder,
            params,
            model_config,
            hf_config | served,
            self.vocabulary.tokenizer,
            self.dtype,
            {"eos_token_id": list(self.vocabulary.end_ids)},
            untied_rows=self.vocabulary.size,
            transform=transform,
        )


@dataclasses.dataclass(frozen=True)
class WeightsFolder:
    """The folder through which refits pass; it holds the versions that servers may have to load.

    Absolute, and the same path for the servers. `num_held` versions wait for a batch, and one more
    is kept: a server may be loading the last while the next is written.
    """

    folder: Path
    export: ServerExport
    num_held: int = 1

    def merged(self, params: nnx.State) -> nnx.State:
        """The parameters as servers hold them, without adapters."""
        return merged(params, self.export.dtype)

    def write(self, params: nnx.State, version: int) -> Path:
        """Writes a version and drops older ones; called by all processes."""
        target = self.folder / f"{version:08d}"
        self.export.write(target, params)
        if processes.is_first():
            self._drop_all_but(target)
        return target

    def _drop_all_but(self, target: Path) -> None:
        """Those that came before the last ones."""
        others = [path for path in self.folder.iterdir() if _VERSION.fullmatch(path.name)]
        newest_first = sorted(others, key=lambda path: (path.stat().st_mtime, path.name))[::-1]
        for path in [path for path in newest_first if path != target][self.num_held :]:
            shutil.rmtree(path)

    def write_rehearsal(self, params: nnx.State) -> Path:
        """Writes the weights that `rehearse` describes; called by all processes."""
        target = self.folder / "rehearsal"
        self.export.write(target, params, transform=rehearse)
        return target

    def drop_rehearsal(self) -> None:
        shutil.rmtree(self.folder / "rehearsal", ignore_errors=True)


def rehearse(key: str, value: np.ndarray) -> np.ndarray:
    """Every weight changed, exactly in any precision, and the head most visibly."""
    return -value if key == HEAD else value * value.dtype.type(0.5)
