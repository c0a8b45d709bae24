"""What the teacher says of responses, by the way of the run, and whether it can be that."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base.sharding import bytes_per_device, constrain_whole
from distill.batches.rows import Rows, teacher_hidden
from distill.build.devices import make_put
from distill.build.models import abstract_model, frozen_options
from distill.build.session import Session
from distill.checks import Problem
from distill.checks.layout import device_memory
from distill.checks.numbers import RESPONSE_TOKENS, laid_out, short_sequences
from distill.config.schema import all_teachers
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.evaluation.rows import of_responses
from distill.models.checkpoints.source import load_model_config
from distill.models.checkpoints.tensors import has_weights
from distill.models.model import Model
from distill.step import TrainState
from distill.teachers.alignment import Alignment
from distill.teachers.base import Teacher

SHIFTS = {"where they are": 0, "one position late": 1, "one position early": -1}
CLEARLY = 1.0  # nats per token by which a shift says better what the responses are
SURPRISING = 5.0  # nats of a first token, on the mean: something else was expected there


def check_teacher(session: Session, state: TrainState) -> str:
    """Teachers predict responses best where they are, and servers say what their weights do."""
    sequences, found = short_sequences(session, state), []
    for (name, teacher), prompts in zip(
        session.teachers.items(), session.prompts.by_teacher, strict=True
    ):
        about = np.flatnonzero(np.isin(sequences["row"], prompts.rows))
        said = "asked about none of these responses"
        if len(about):
            model = teacher.at(state)
            said = _check_one(session, name, teacher, model, prompts, sequences.take(about))
        found.append(f"{name}: {said}" if name else said)
    return "; ".join(found)


def _check_one(
    session: Session,
    name: str,
    teacher: Teacher,
    model: Model | None,
    prompts: Prompts,
    sequences: Sequences,
) -> str:
    view = prompts.view(sequences)
    seen, found, vocabulary = sequences if view is None else view, "", session.vocabulary
    if alignment := session.alignments.get(name):
        vocabulary, found = alignment.teacher, _cuts(alignment, sequences, seen)
        # As the teacher's own sequences: what it says of them in the student's places follows.
        prompts, sequences = prompts.of_view(vocabulary.pad_id), seen
        if not seen["weight"].any():
            return found
    if model is not None:
        log_probs_sn, first_n = _of_model(session, model, prompts, sequences, seen, vocabulary.size)
    elif teacher.graph is not None:
        return "known by hidden states on disk, which were compared by their digests"
    else:
        columns = dict(teacher.score(seen))
        if not columns:
            return "none takes part"
        log_probs_sn, first_n = _of_scores(seen, columns)
        found = _compare_with_weights(session, name, prompts, sequences, seen, columns)
    means = dict(zip(SHIFTS, log_probs_sn.mean(axis=1).tolist(), strict=True))
    best = max(means, key=lambda name: means[name])
    here = means["where they are"]
    # Random models say much of the token that they have just read, and know nothing of others.
    knows = means[best] > -np.log(vocabulary.size) / 2
    if knows and means[best] > here + CLEARLY:
        raise Problem(
            f"the teacher gives the tokens of responses {here:.2f} nats where they are, and "
            f"{means[best]:.2f} {best}: what it says is compared in another place"
        )
    first = float(log_probs_sn[0, first_n].mean())
    warning = ""
    if first < -SURPRISING:
        warning = (
            "; warning: it expects something else where a response begins: another template, "
            "thinking or system prompt"
        )
    return f"{here:.2f} nats per token, {first:.2f} for the first of a response{found}{warning}"


def _of_model(
    session: Session,
    model: Model,
    prompts: Prompts,
    sequences: Sequences,
    view: Sequences,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the trained tokens, for each shift, and which are a response's first."""
    own = None if "piece" in view.columns else view  # of another tokenizer: no places to look up
    rows = laid_out(session, prompts, sequences, packed=False, view=own)
    placed = jax.tree.map(make_put(session.mesh), rows)
    log_prob = functools.partial(session.objective.log_probs, vocab_size=vocab_size)
    log_probs_sbt = jax.device_get(_shifted(log_prob, model.graph, model.fetch(), placed))
    trained_bt = np.asarray(rows.mask_bt)
    first_bt = trained_bt & (np.cumsum(trained_bt, axis=1) == 1)
    return log_probs_sbt[:, trained_bt], first_bt[trained_bt]


def _cuts(alignment: Alignment, sequences: Sequences, view: Sequences) -> str:
    """How a teacher with another tokenizer cuts the responses, and the first of them as it does."""
    alike, spans, left_out = alignment.shares(int((sequences["weight"] != 0).sum()), view)
    ours, theirs = (each.tokenizer.decode for each in (alignment.student, alignment.teacher))
    tokens_t, seen_t = sequences.split("tokens")[0], view.split("tokens")[0]
    piece_t, size_t = (view.split(name)[0] for name in ("piece", "piece_size"))
    shown = []
    for first in dict.fromkeys(piece_t[piece_t >= 0].tolist()):
        theirs_too = seen_t[piece_t == first]
        number = max(int(size_t[piece_t == first][0]), 1)
        mine = "|".join(str(ours([token])) for token in tokens_t[first : first + number])
        other = "|".join(str(theirs([token])) for token in theirs_too)
        shown.append(f"{mine!r}" if mine == other else f"{mine!r} as {other!r}")
    return (
        f"; cut alike {alike:.0%}, in spans {spans:.0%}, left out {left_out:.0%}; the first "
        f"response: {' '.join(shown) or 'not read'}"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _shifted(log_prob, graph: nnx.GraphDef, params, rows: Rows) -> jax.Array:
    model = nnx.merge(graph, params)
    hidden_btd, head = teacher_hidden(model, rows), model.head()
    weights_bt = rows.mask_bt.astype(jnp.float32)
    targets = (jnp.roll(rows.targets_bt, -shift, axis=1) for shift in SHIFTS.values())
    return constrain_whole(
        jnp.stack([log_prob(hidden_btd, head, target_bt, weights_bt) for target_bt in targets])
    )


def _of_scores(
    sequences: Sequences, columns: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`_of_model`, where the likeliest tokens are known; others get what these leave."""
    trained_n = sequences["weight"] != 0
    ids_nk, log_probs_nk = (
        columns[name][trained_n] for name in ("teacher_ids", "teacher_log_probs")
    )
    mass_n = np.where(ids_nk >= 0, np.exp(log_probs_nk), 0.0).sum(axis=1)
    rest_n = np.log(np.maximum(1 - mass_n, 1e-6))
    log_probs = []
    for shift in SHIFTS.values():
        is_target_nk = ids_nk == np.roll(sequences["tokens"], -shift)[trained_n][:, None]
        listed_n = np.where(is_target_nk, log_probs_nk, 0.0).sum(axis=1)
        log_probs.append(np.where(is_target_nk.any(axis=1), listed_n, rest_n))
    first = [np.cumsum(weight_t != 0) == 1 for weight_t in sequences.split("weight")]
    return np.stack(log_probs), np.concatenate(first)[trained_n]


def _compare_with_weights(
    session: Session,
    name: str,
    prompts: Prompts,
    sequences: Sequences,
    view: Sequences,
    columns: dict[str, np.ndarray],
) -> str:
    """Whether servers say of responses what the teacher's weights do, if those are here.

    Other weights, another configuration or order of the vocabulary, another place, and a prompt
    that is cut or begins with a token more: each says something else.
    """
    folder, config = session.teacher_folders.get(name), session.config
    if folder is None or not has_weights(folder):
        return "; its servers are not compared with its weights, which are not here"
    dtype = all_teachers(config)[name].dtype
    options = frozen_options(config.policy, dtype)
    shapes = abstract_model(load_model_config(folder)[0], folder, session.mesh, **options).params
    if (memory := device_memory()) is not None and bytes_per_device(shapes) > memory / 4:
        return "; its servers are not compared with its weights, which are large beside the run"
    model = session.load_frozen(folder, dtype)
    rows = laid_out(session, prompts, sequences, packed=False, view=view)
    placed = jax.tree.map(make_put(session.mesh), rows)
    size = session.vocabulary.size
    log_probs_brv = jax.device_get(_log_probs(model.graph, model.params, placed, size))
    # An environment's tokens may stand between those that are trained.
    places = [np.flatnonzero(mask_t) - mask_t.argmax() for mask_t in np.asarray(rows.mask_bt)]
    ours_nv = np.concatenate([log_probs_brv[i, place] for i, place in enumerate(places)])
    trained = np.flatnonzero(view["weight"])[: len(ours_nv)]
    ids_nk, theirs_nk = columns["teacher_ids"][trained], columns["teacher_log_probs"][trained]
    ours_nk = np.take_along_axis(ours_nv, np.maximum(ids_nk, 0), axis=1)
    shares_nk = np.where(ids_nk >= 0, np.exp(theirs_nk), 0.0)
    gap = float((shares_nk * np.abs(ours_nk - theirs_nk)).sum(axis=1).mean())
    if not gap <= (limit := config.policy.generation.max_log_prob_gap):
        raise Problem(
            f"the teacher's servers and its weights in {folder} say of the same tokens "
            f"log-probabilities {gap:.3g} nats apart (at most {limit:g}): the servers have other "
            "weights, another configuration or vocabulary, or read the tokens otherwise (cut, or "
            "with a begin token more); serve that folder, or name the one that is served"
        )
    return f"; servers and weights {gap:.1e} nats apart"


@functools.partial(jax.jit, static_argnums=(0, 3))
def _log_probs(graph: nnx.GraphDef, params, rows: Rows, vocab_size: int) -> jax.Array:
    """Of the whole vocabulary, in the places of the responses' tokens, (b, r, v)."""
    model = nnx.merge(graph, params)
    hidden_brd = of_responses(rows, teacher_hidden(model, rows), RESPONSE_TOKENS)
    return constrain_whole(jax.nn.log_softmax(model.logits(hidden_brd)[..., :vocab_size]))
