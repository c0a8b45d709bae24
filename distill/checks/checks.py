"""What the preflight checks, each check a function of the run's parts (see preflight.py).

A check returns what it saw, in words, or raises `Problem`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from distill.base.sharding import bytes_per_device, num_shards
from distill.batches.packing import Layout
from distill.batches.rows import Rows, make_batch
from distill.build.data import Vocabulary
from distill.build.devices import put_batch
from distill.build.layout import build_layout
from distill.build.sampler import build_engine, build_sampling_params
from distill.config.schema import Config
from distill.data.base import DatasetInterface
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.data.tokenizer import load_tokenizer
from distill.kernels.platform import platform
from distill.losses.objective import Objective, make_objective
from distill.models.model import Model
from distill.models.quantization import without_scales
from distill.rollout.base import RolloutBackend
from distill.sampling.request import RolloutRequest
from distill.step import TrainState, make_loss

RESPONSE_TOKENS = 16
SAMPLED_PROMPTS = 8
# Nats per token, and norm of the gradient, of a student that is its own teacher: rounding.
ZERO_LOSS, ZERO_GRADIENT = 1e-4, 1e-3
# Mean nats per token between two exact float32 computations of the same model.
FLOAT32_GAP = 2e-4
LARGE_BYTES = 1 << 20  # an array from here on must not be on every device


class Problem(Exception):
    """What a check found wrong: one line with the likely cause and the remedy."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The parts of a run that is about to begin.

    Attributes:
      config: of the run.
      mesh: the trainer's, which is also the current one.
      dataset, prompts: what is trained on, as text and as tokens.
      vocabulary: the student's.
      teacher_folder: where the teacher came from; None where nothing of it is here.
      graph, state: the student.
      teacher: on the mesh; None where it is not.
      objective: of the run.
      backend: started.
      step: updates made before.
    """

    config: Config
    mesh: Mesh
    dataset: DatasetInterface
    prompts: Prompts
    vocabulary: Vocabulary
    teacher_folder: Path | None
    graph: Any
    state: TrainState
    teacher: Model | None
    objective: Objective
    backend: RolloutBackend
    step: int = 0


# ------------------------------------------------------------------------- texts and tokenizers


def check_tokenizers(subject: Subject) -> str:
    """Student and teacher cut the same prompts into the same tokens, template included."""
    if subject.teacher_folder is None:
        return "no teacher's tokenizer to compare with"
    texts = _texts(subject)
    tokenizers = subject.vocabulary.tokenizer, load_tokenizer(subject.teacher_folder)
    ours, theirs = (
        tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers
    )
    for text, mine, other in zip(texts, ours, theirs, strict=True):
        if mine != other:
            raise Problem(
                f"student and teacher cut {_short(text)} into other tokens, "
                f"{_difference(mine, other)}: their merges or normalisation differ; pick a pair "
                "from one model family"
            )
    if not subject.vocabulary.tokenizer.chat_template:
        return f"{len(texts)} texts are the same tokens for both"
    return (
        f"{len(texts)} texts are the same tokens for both{_compare_templates(subject, tokenizers)}"
    )


def _compare_templates(subject: Subject, tokenizers) -> str:
    """A warning where the teacher knows prompts in another form: it may be wanted."""
    ours, theirs = (_rendered(subject, tokenizer) for tokenizer in tokenizers)
    if ours == theirs:
        return ", with the same chat template"
    return (
        "; warning: the teacher's chat template renders them otherwise, and it will see the "
        f"student's ({_difference(ours[0], theirs[0])}): set data.system_prompt, or use a student "
        "with the teacher's template"
    )


def check_template(subject: Subject) -> str:
    """Prompts hold their problem's text and leave the answer open."""
    tokenizer, ends = subject.vocabulary.tokenizer, subject.vocabulary.end_ids
    for row, tokens in _first_prompts(subject):
        prompt = subject.dataset[int(row)].prompt
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        rendered = tokenizer.decode(tokens, skip_special_tokens=False)
        if _squeezed(text) not in _squeezed(rendered):
            raise Problem(
                f"the prompt {_short(text)} becomes {_short(rendered)}: the chat template or the "
                "tokenizer loses its text; check tokenizer_config.json, chat_template.jinja and "
                "data.prompt_template"
            )
        if int(tokens[-1]) in ends:
            raise Problem(
                f"the prompt {_short(text)} ends with {tokenizer.decode([tokens[-1]])!r}, which "
                "ends an answer before it has begun: the chat template ignores "
                "add_generation_prompt, or the tokenizer adds its end token to prompts"
            )
    return f"{len(_first_prompts(subject))} prompts hold their text and leave the answer open"


def check_end(subject: Subject) -> str:
    """The token with which the chat template closes an answer ends an answer here."""
    tokenizer, ends = subject.vocabulary.tokenizer, subject.vocabulary.end_ids
    beyond = [end for end in ends if not 0 <= end < subject.vocabulary.size]
    if beyond:
        raise Problem(
            f"the end-of-answer id {beyond[0]} is not in the vocabulary of "
            f"{subject.vocabulary.size}, so it is never sampled: correct eos_token_id in "
            "generation_config.json"
        )
    names = ", ".join(repr(tokenizer.decode([end])) for end in ends)
    closing = _closing_token(tokenizer)
    if closing is None:
        return f"answers end at {names}; the template closes them with nothing of its own"
    if closing not in ends:
        raise Problem(
            f"the chat template closes an answer with {tokenizer.decode([closing])!r} (id "
            f"{closing}), but answers end only at {names}: they would run to max_length; add "
            f"{closing} to eos_token_id in generation_config.json"
        )
    return f"answers end at {names}, as the chat template closes them"


def _closing_token(tokenizer) -> int | None:
    """First special token that the template puts behind an answer; None if there is none."""
    if not tokenizer.chat_template:
        return None
    answer = "A7nswer"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    _, _, tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


# ------------------------------------------------------------------------------ where arrays lie


def check_layout(subject: Subject) -> str:
    """No large array is whole on every device of a mesh that should split it."""
    parts = num_shards("embed") * num_shards("ffn")
    if parts == 1:
        return "weights are whole on every device: the mesh splits batches only"
    # The scales of an 8-bit teacher are whole along what their channels sum over.
    teacher = subject.teacher and without_scales(subject.teacher.params)
    arrays = {"student and optimizer": subject.state, "teacher": teacher}
    for owner, tree in arrays.items():
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            if array.nbytes >= LARGE_BYTES and array.sharding.is_fully_replicated:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise Problem(
                    f"{owner}: {name} ({array.nbytes / 1e6:.0f} MB) is whole on every device, "
                    f"though the mesh splits weights {parts} ways: give it logical axes that "
                    "distill/base/sharding.py maps to mesh axes"
                )
    return f"all arrays of 1 MB and more are split, weights {parts} ways"


def check_memory(subject: Subject) -> str:
    """What every step will hold at least fits the device's memory.

    Weights, moments, gradients, the sampler's copy and its cache. Activations and logits come on
    top: this is a lower bound.
    """
    held = bytes_per_device(subject.state)
    teacher = 0
    if subject.teacher is not None:  # one that is fetched for a step is there then
        fetched = subject.teacher.on_devices is not None
        teacher = bytes_per_device(subject.teacher.params, fetched=fetched)
    needs = {
        "student and optimizer": held,
        "teacher": teacher,
        "gradients": bytes_per_device(subject.state.trainable),
    }
    generation = subject.config.policy.generation
    if _samples_here(subject) and generation.colocated.enabled:
        size = jnp.dtype(subject.config.policy.precision).itemsize
        params = jax.tree.leaves(subject.state.params)
        # Gathered over fsdp for the sampler.
        needs["sampler"] = sum(x.size for x in params) * size // num_shards("act_heads")
        needs["cache"] = _cache_bytes(subject)
    total, limit = sum(needs.values()), _device_memory()
    listed = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in needs.items())
    if limit is not None and total > limit:
        raise Problem(
            f"a step needs at least {total / 1e9:.3g} GB per device ({listed}) of "
            f"{limit / 1e9:.3g} GB: raise mesh.fsdp or mesh.tensor, or lower "
            "policy.generation.cache_memory"
        )
    bound = "an unknown limit" if limit is None else f"{limit / 1e9:.3g} GB"
    return f"at least {total / 1e9:.3g} GB per device ({listed}) of {bound}, without activations"


def _cache_bytes(subject: Subject) -> float:
    engine = build_engine(subject.config, subject.graph, subject.vocabulary)
    rows = subject.config.policy.train_global_batch_size
    return engine.cache_bytes(subject.state.params, rows)


def _device_memory() -> int | None:
    """Bytes that a device has for this process; None if nobody says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return None


# ------------------------------------------------------------------------- numbers that must agree


def check_numbers(subject: Subject) -> str:
    """The train step's own loss on responses that the sampler has just given.

    With the student as its own teacher, loss and gradient are zero; the log-probabilities that the
    step computes are the sampler's; what stands behind a row's end changes nothing, and neither
    does packing.
    """
    sequences = _short_sequences(subject)
    padded = _laid_out(subject, sequences, packed=False)
    own_teacher = subject.objective.divergence is not None
    loss_fn = make_loss(
        subject.graph,
        subject.graph if own_teacher else None,
        subject.objective if own_teacher else make_objective("forward", hard_labels=True),
        vocab_size=subject.vocabulary.size,
    )
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    params = subject.state.params
    total = jnp.maximum(padded.mask_bt.sum(), 1).astype(jnp.float32)

    def evaluate(rows: Rows):
        return value_and_grad(params, params if own_teacher else None, rows, total)

    (loss, sums), grads = evaluate(padded)
    details = []
    if own_teacher:
        details.append(_check_zero(float(loss), float(optax.tree.norm(grads))))
    if _samples(subject):
        details.append(_check_gap(subject, sums))
    details.append(_check_padding(sums, evaluate(_stirred(padded))[0][1]))
    if subject.config.policy.sequence_packing.enabled:
        packed = _laid_out(subject, sequences, packed=True)
        details.append(_check_packing(subject, sums, evaluate(packed)[0][1]))
    return "; ".join(details)


def _short_sequences(subject: Subject) -> Sequences:
    """The first prompts with short responses, sampled where any are.

    The sampler is asked for a whole batch, so that it compiles what the run will need anyway.
    """
    config = subject.config
    repeats = config.distillation.generate_strategy.num_generations
    number = config.policy.train_global_batch_size // repeats
    prompts = subject.prompts.sequences(np.arange(number) % len(subject.prompts))
    sequences = prompts.take(np.repeat(np.arange(number), repeats))
    starts_b = sequences.prompts().lengths_b
    if _samples(subject):
        subject.backend.refit(subject.state.params, version=subject.step)
        request = RolloutRequest(
            tuple(prompts.prompts().split("tokens")),
            np.arange(number),
            build_sampling_params(config),
            num_generations=repeats,
            seed=config.seed,
            step=subject.step,
            max_lengths=np.full(len(sequences), RESPONSE_TOKENS, np.int32),
        )
        rollout, _ = subject.backend.generate(request)
        sequences = rollout.sequences(sequences)
    return sequences.first(starts_b + RESPONSE_TOKENS)


def _laid_out(subject: Subject, sequences: Sequences, *, packed: bool) -> Rows:
    """As many sequences as a microbatch surely holds, in one microbatch on the mesh."""
    longest = subject.prompts.prompt_width + RESPONSE_TOKENS
    shape = build_layout(subject.config, longest, subject.mesh).shapes[-1]
    if not packed:
        shape = dataclasses.replace(shape, length=longest)
    batch = make_batch(
        sequences.take(np.arange(len(sequences))[: shape.rows]),
        layout=Layout((shape,), packed),
        pad_id=subject.prompts.pad_id,
    )
    return jax.tree.map(lambda x: x[0], put_batch(subject.mesh, batch)[0])


def _stirred(rows: Rows) -> Rows:
    """The rows with other tokens behind their ends."""
    t = jnp.arange(rows.tokens_bt.shape[1])
    behind_bt = t >= rows.lengths_b[:, None]
    return dataclasses.replace(
        rows, tokens_bt=jnp.where(behind_bt, rows.tokens_bt[:, :1], rows.tokens_bt)
    )


def _check_zero(loss: float, gradient: float) -> str:
    if not (abs(loss) <= ZERO_LOSS and gradient <= ZERO_GRADIENT):
        raise Problem(
            f"with the student as its own teacher the loss is {loss:.3g} and its gradient "
            f"{gradient:.3g} instead of 0: distillation.kl_type is no divergence (what is not zero "
            "for equal distributions is registered with register_loss), or the loss is computed "
            "wrongly; try distillation.loss_implementation=reference"
        )
    return f"own teacher: loss {loss:.1e}, gradient {gradient:.1e}"


def _check_gap(subject: Subject, sums: dict[str, jax.Array]) -> str:
    generation = subject.config.policy.generation
    gap = float(sums["gap_sum"] / jnp.maximum(sums["sampled_tokens"], 1))
    exact = (
        _is_exact(subject.config)
        and generation.backend == "jax"
        and generation.cache_dtype == "auto"
    )
    limit = min(FLOAT32_GAP, generation.max_log_prob_gap) if exact else generation.max_log_prob_gap
    if not gap <= limit:
        raise Problem(
            f"sampler and trainer give the same tokens log-probabilities {gap:.3g} nats apart "
            f"(at most {limit:g}): the sampler has other weights (a refit that did not arrive), "
            "computes in another precision, or the trainer looks at other positions"
        )
    return f"sampler and trainer {gap:.1e} nats apart"


def _is_exact(config: Config) -> bool:
    """Whether products are of float32: by default, accelerators round their operands."""
    unrounded = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return config.policy.precision == "float32" and (platform() == "cpu" or unrounded)


def _check_padding(sums: dict[str, jax.Array], other: dict[str, jax.Array]) -> str:
    ours, theirs = float(sums["student_log_prob"]), float(other["student_log_prob"])
    if not math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-6):
        raise Problem(
            f"what stands behind a row's end changes the mean log-probability from {ours:.6f} to "
            f"{theirs:.6f}: padding is attended to or trained on"
        )
    return "padding has no influence"


def _check_packing(
    subject: Subject, sums: dict[str, jax.Array], packed: dict[str, jax.Array]
) -> str:
    ours, theirs = float(sums["student_log_prob"]), float(packed["student_log_prob"])
    exact = _is_exact(subject.config)
    if not math.isclose(ours, theirs, rel_tol=1e-4 if exact else 1e-2, abs_tol=1e-5):
        raise Problem(
            f"packed rows have a mean log-probability of {theirs:.6f}, padded ones of {ours:.6f}: "
            "sequences that share a row see each other; set policy.sequence_packing.enabled=False"
        )
    return "packed rows are as padded ones"


# ----------------------------------------------------------------------------------------- helpers


def _samples(subject: Subject) -> bool:
    return subject.config.distillation.lambda_ > 0


def _samples_here(subject: Subject) -> bool:
    return _samples(subject) and subject.config.policy.generation.backend == "jax"


def _first_prompts(subject: Subject) -> list[tuple[int, np.ndarray]]:
    """Dataset row and tokens of the first prompts."""
    prompts = subject.prompts
    return list(zip(prompts.rows, prompts.prompt_tokens, strict=True))[:SAMPLED_PROMPTS]


def _texts(subject: Subject) -> list[str]:
    """Prompts, and responses where the data has them: what both tokenizers must cut alike."""
    examples = [subject.dataset[int(row)] for row, _ in _first_prompts(subject)]
    prompts = [e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"] for e in examples]
    return [*prompts, *(example.response for example in examples if example.response)]


def _rendered(subject: Subject, tokenizer) -> list[str]:
    """Prompts as the tokenizer's chat template renders them."""
    if not tokenizer.chat_template:
        return [""]
    system_prompt = subject.config.data.system_prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    turns = [[*system, {"role": "user", "content": text}] for text in _texts(subject)]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _difference(ours: Sequence, theirs: Sequence) -> str:
    """Where two sequences begin to differ."""
    shorter = min(len(ours), len(theirs))
    at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    window = slice(max(0, at - 10), at + 20)
    return f"from position {at} on: {ours[window]!r} and {theirs[window]!r}"


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _short(text: str, size: int = 60) -> str:
    return repr(text if len(text) <= size else text[: size - 3] + "...")


CHECKS: dict[str, Callable[[Subject], str]] = {
    "tokenizers": check_tokenizers,
    "template": check_template,
    "end of answers": check_end,
    "layout": check_layout,
    "memory": check_memory,
    "numbers": check_numbers,
}
