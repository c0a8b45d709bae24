"""The training objective: a sum of terms, or one loss of whole rows, over the tokens with weight.

The objective is a sum of token losses divided by the number of valid tokens over all hosts and
microbatches (`weights.token_weights`): neither it nor its gradient depends on how the batch was
cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from distill.base.errors import UserError
from distill.base.sharding import flatten_tokens, split_tokens
from distill.config.method import Distillation
from distill.kernels.linear_divergence import (
    DivergenceTerm,
    RowLoss,
    SharedIds,
    Term,
    TermSum,
    TokenValues,
    TopK,
    check_pointwise,
    linear_loss,
    reads_teacher,
    resolve_implementation,
    weighted_first,
    weights_of,
)
from distill.kernels.linear_divergence import cross_entropy as CROSS_ENTROPY
from distill.kernels.linear_divergence.token_losses import TokenWeight
from distill.losses.advantages import Advantage
from distill.losses.divergences import (
    Clipped,
    PointwiseDivergence,
    Proximal,
    get_divergence,
    get_loss,
    get_term,
    is_pointwise,
)
from distill.losses.interpolation import Target
from distill.losses.weights import (
    CutAlike,
    TruncatedImportance,
    UnsureTeacher,
    WrittenBy,
    get_weight,
)

_NONE, _WHOLE = Advantage(), Target()


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective as a hashable function; build it with `make_objective`.

    The divergence is its first term, if it has one. `importance_clip`: 0 without such weights;
    `estimate`: the advantage for a teacher with another tokenizer.
    """

    loss: TermSum | RowLoss
    needs_teacher: bool
    scale: float
    importance_clip: float
    implementation: str | None
    chunk: int | None
    target: Target = _WHOLE
    estimate: Advantage = _NONE

    @property
    def divergence(self) -> PointwiseDivergence | None:
        """The divergence; None where it has no weight, and for losses of rows."""
        return getattr(self.loss.terms[0].function, "divergence", None)

    @property
    def alone(self) -> Objective:
        """The first term, without weights."""
        loss = dataclasses.replace(self.loss, weights=())
        if isinstance(loss, TermSum):
            loss = dataclasses.replace(loss, terms=(Term(loss.terms[0].function),))
        estimate = Advantage(spans=1.0)
        return dataclasses.replace(self, loss=loss, importance_clip=0.0, estimate=estimate)

    def aligned(self, spans: bool) -> Objective:
        """For a teacher with another tokenizer: divergences are of the tokens that both cut alike.

        `spans`: whether those between are trained on by the policy gradient of their
        log-probability.
        """
        assert isinstance(self.loss, TermSum)  # no loss of whole rows
        terms = [
            dataclasses.replace(term, weight=CutAlike(term.weight))
            if isinstance(term.function, DivergenceTerm)
            else term
            for term in self.loss.terms
            if not isinstance(term.weight, Advantage)
        ]
        estimate = self.estimate if spans else dataclasses.replace(self.estimate, spans=0.0)
        loss = dataclasses.replace(self.loss, terms=_with_advantage(terms, estimate))
        return dataclasses.replace(self, loss=loss)

    def __call__(
        self,
        hidden_s_btd: jax.Array,
        head_s: jax.Array,
        hidden_t_btd: jax.Array | None,
        head_t: jax.Array | None,
        targets_bt: jax.Array,
        weights_bt: jax.Array,
        *,
        vocab_size: int,
        scores: TopK | None = None,
        columns: Mapping[str, jax.Array] | None = None,
        shared: SharedIds | None = None,
    ) -> tuple[jax.Array, TokenValues]:
        """Weighted sum of the token losses, differentiable by the student's hidden states and head.

        Args:
          hidden_s_btd, hidden_t_btd: final hidden states; the teacher's and its head are None for
            hard labels, and where `scores` (b, t, k) are known instead.
          head_s, head_t: output heads (d, v) in the compute dtype.
          targets_bt: anything where their weight is 0.
          weights_bt: from `token_weights`.
          vocab_size: ids that student and teacher share; further head columns are padding.
          columns: (b, t, ...) by name, what the objective's own weights read.
          shared: where the teacher has other ids; `vocab_size` is then the student's.

        Returns:
          float32 scalar, and TokenValues of shape (b, t) that carry no gradient.
        """
        order = weighted_first(flatten_tokens(weights_bt))

        def flatten(values):
            return order.apply(jax.tree.map(flatten_tokens, values))

        teacher = None
        if scores is not None:
            teacher, head_t = flatten(scores), None
        elif self.needs_teacher:
            teacher = flatten(hidden_t_btd)
        loss, values = linear_loss(
            self.loss,
            flatten(hidden_s_btd),
            head_s,
            teacher,
            head_t if self.needs_teacher else None,
            flatten(self.scale * weights_bt),
            targets=flatten(targets_bt),
            columns=flatten(dict(columns or {})) if weights_of(self.loss) else None,
            shared=shared,
            vocab_size=vocab_size,
            implementation=self.implementation,
            chunk=self.chunk,
        )
        values = order.undo(values)
        return loss, jax.tree.map(lambda x_n: split_tokens(x_n, targets_bt.shape), values)

    def log_probs(
        self,
        hidden_btd: jax.Array,
        head: jax.Array,
        targets_bt: jax.Array,
        weights_bt: jax.Array,
        *,
        vocab_size: int,
    ) -> jax.Array:
        """log q(target) at temperature 1, float32 (b, t), 0 where there is no weight."""
        plain = dataclasses.replace(self, loss=TermSum.of(CROSS_ENTROPY), needs_teacher=False)
        arrays = hidden_btd, head, None, None, targets_bt, weights_bt
        return plain(*arrays, vocab_size=vocab_size)[1].log_prob_s


def make_objective(
    section: Distillation,
    *,
    importance_clip: float = 0.0,
    top_k_teacher: bool = False,
    other_ids: bool = False,
    chunk: int | None = None,
) -> Objective:
    """The objective that a section of the config describes.

    With hard labels it is the cross-entropy with the response tokens, without a teacher, at
    temperature 1. `kl_temperature_squared` keeps the size of the gradient (Hinton et al.,
    arXiv:1503.02531).

    Args:
      importance_clip: multiplies a token's loss by `TruncatedImportance` of at most this; 0: not.
      top_k_teacher, other_ids: the teacher will be a TopK, or has another tokenizer.
      chunk: see kernels/linear_divergence/api.py.

    Raises:
      UserError: an unknown name, a parameter out of range, parts that do not go together, or an
        implementation that cannot run.
    """
    parts, temperature = section.objective, section.kl_temperature
    if section.hard_labels:
        temperature, parts = 1.0, dataclasses.replace(parts, divergence=0.0, cross_entropy=1.0)
        section = dataclasses.replace(section, objective=parts)
    if not temperature > 0:
        raise UserError(f"kl_temperature={temperature} is not positive")
    sums_vocabulary = is_pointwise(section.kl_type) or not parts.divergence
    by_outcomes = top_k_teacher or other_ids
    all_logits = section.has_teacher and not by_outcomes  # of the teacher are there, id by id
    implementation = None if section.loss_implementation == "auto" else section.loss_implementation
    try:
        resolve_implementation(implementation, fused=sums_vocabulary and not by_outcomes)
    except ValueError as error:
        raise UserError(f"loss_implementation: {error}") from None
    if parts.entropy_threshold or parts.target_start < 1:
        _check_interpolates(all_logits and parts.divergence and sums_vocabulary)
    advantage = Advantage(
        parts.reward_advantage,
        parts.teacher_advantage,
        parts.ratio_clip,
        parts.importance_clip,
        parts.proximal_share,
    )
    factors = tuple(_get_weight(name, all_logits) for name in parts.weights)
    factors += (TruncatedImportance(float(importance_clip)),) if importance_clip else ()
    cross_entropy = [f"cross_entropy:{parts.cross_entropy}"] if parts.cross_entropy else []
    added = [*cross_entropy, *parts.terms]
    loss: TermSum | RowLoss
    if sums_vocabulary:
        named = [(text, get_term(text, **_parameters(section))) for text in added]
        named = [*_divergence_terms(section), *named]
        found = [_checked(*pair, all_logits, by_outcomes) for pair in named]
        loss = TermSum(_with_advantage(found, advantage), temperature, factors)
    else:
        _check_alone(section, [*added, *(["policy_gradient"] if advantage else [])], by_outcomes)
        loss = RowLoss(get_loss(section.kl_type), temperature, factors)
    return Objective(
        loss,
        needs_teacher=section.has_teacher,
        scale=temperature**2 if section.kl_temperature_squared else 1.0,
        importance_clip=float(importance_clip or advantage.importance_clip),
        implementation=implementation,
        chunk=chunk,
        target=Target(parts.target_start, section.max_steps, parts.target_pace),
        estimate=dataclasses.replace(advantage, spans=parts.divergence + advantage.teacher),
    )


def _parameters(section: Distillation) -> dict[str, float]:
    """What `get_divergence` takes."""
    names = ("mixed_kl_weight", "jsd_beta", "skew_alpha")
    return {name: getattr(section, name) for name in names}


def _divergence_terms(section: Distillation) -> list[tuple[str, Term]]:
    """With their names: that of all tokens, or of the student's and of all others.

    Tokens that the student did not sample have `kl_type_on_data` (DistiLLM-2, arXiv:2503.07067).
    """
    parts, on_data, found = section.objective, section.kl_type_on_data, []
    if on_data and not is_pointwise(on_data, "distillation.kl_type_on_data"):
        raise UserError(f"distillation.kl_type_on_data={on_data} is a loss of whole rows")
    kinds = ((section.kl_type, True), (on_data, False)) if on_data else ((section.kl_type, None),)
    for name, by_student in kinds if parts.divergence else ():
        divergence = get_divergence(name, **_parameters(section))
        if parts.proximal_share < 1:
            divergence = Proximal(divergence, parts.proximal_share)
        if parts.divergence_clip:
            divergence = Clipped(divergence, parts.divergence_clip)
        written = None if by_student is None else WrittenBy(by_student)
        found.append((name, Term(DivergenceTerm(divergence), parts.divergence, written)))
    if parts.entropy_threshold:
        unsure = UnsureTeacher(parts.entropy_threshold)
        forward = DivergenceTerm(get_divergence("forward"))
        found.append(("forward", Term(forward, parts.divergence, unsure)))
    return found


def _check_alone(section: Distillation, added: Sequence[str], by_outcomes: bool) -> None:
    """Raises UserError unless a loss of whole rows stands alone, with all logits of a teacher."""
    name, parts = f"kl_type={section.kl_type} is a loss of whole rows", section.objective
    if by_outcomes:
        raise UserError(f"{name}, which compares id by id: choose a divergence, or {_NEEDS}")
    if added:
        raise UserError(
            f"distillation.objective.terms={', '.join(added)} cannot be added to it, since {name}: "
            "choose a divergence, or leave it empty"
        )
    changes = parts.divergence, parts.divergence_clip, parts.proximal_share
    if section.kl_type_on_data or changes != (1.0, 0.0, 1.0):
        raise UserError(
            f"{name}: it takes no kl_type_on_data, objective.divergence_clip, proximal_share or "
            "divergence"
        )


def _check_interpolates(there_are_logits: object) -> None:
    if not there_are_logits:
        raise UserError(
            "distillation.objective.entropy_threshold and target_start are about the divergence "
            f"from a teacher whose logits are here, and of no loss of whole rows: {_NEEDS}"
        )


_NEEDS = "it needs teacher.backend=local, teacher.alignment=none and hard_labels=False"


def _get_weight(name: str, all_logits: bool) -> TokenWeight:
    weight = get_weight(name)
    if getattr(weight, "teacher_entropy", False) and not all_logits:
        raise UserError(
            f"distillation.objective.weights names {name!r}, which asks for the teacher's entropy: "
            f"{_NEEDS}"
        )
    return weight


def _with_advantage(terms: list[Term], advantage: Advantage) -> tuple[Term, ...]:
    """The terms, and the policy gradient if it has a weight."""
    if advantage:
        terms = [*terms, Term(CROSS_ENTROPY, weight=advantage)]
    if not terms:
        raise UserError(
            "distillation.objective has no term: give divergence, cross_entropy, "
            "teacher_advantage or reward_advantage a weight"
        )
    return tuple(terms)


def _checked(text: str, term: Term, all_logits: bool, by_outcomes: bool) -> Term:
    """The term; UserError unless it works entry by entry and has what it reads."""
    try:
        check_pointwise(term.function)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None
    is_known = all_logits or (by_outcomes and isinstance(term.function, DivergenceTerm))
    if not is_known and reads_teacher(term.function):
        raise UserError(
            f"distillation.objective.terms={text} reads the teacher's log-probability of every "
            f"token: {_NEEDS}"
        )
    return term
