"""The train step: one golden step, and what must not change its result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import model_config, random_model

from benchmarks.objectives import objective_of
from distill.base import sharding
from distill.base.errors import UserError
from distill.base.mesh import make_mesh, sampler_mesh_sizes
from distill.base.sharding import (
    RULES,
    SPREAD_RULES,
    batch_parts,
    optimizer_shardings,
    param_shardings,
    partition_spec,
)
from distill.batches.packing import Layout, Shape
from distill.batches.rows import make_batch
from distill.build.devices import put_batch
from distill.data import sequences
from distill.data.sequences import Column, Sequences, declare_column
from distill.kernels.linear_divergence import TopK
from distill.losses import weights
from distill.models.facts import Experts
from distill.models.transformer import Transformer
from distill.sampling.request import Rollout
from distill.step import TeacherInStep, TrainState, make_loss, make_train_step

VOCAB_SIZE = 29
ROWS, PROMPT, RESPONSE = 8, 5, 7
PAD = 0


def make_model(
    width: int,
    layers: int,
    vocab_size: int,
    seed: int,
    tied: bool = True,
    dtype=jnp.float32,
    **changes,
):
    sizes = dict(vocab_size=vocab_size, num_layers=layers, model_width=width, ffn_width=2 * width)
    config = model_config(**sizes, tied=tied, **changes)
    model = Transformer(config, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model, nnx.Param)
    # Larger than at initialisation, so that the distributions are far from uniform.
    return graph, jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Prompts with responses, padded."""

    prompts_bp: np.ndarray
    prompt_lengths_b: np.ndarray
    rollout: Rollout
    on_policy_b: np.ndarray
    scores: TopK | None = None
    view_prompts: tuple[np.ndarray, ...] | None = None  # what the teacher reads instead

    @property
    def lengths_b(self) -> np.ndarray:
        return self.prompt_lengths_b + self.rollout.lengths_b

    @property
    def tokens_bt(self) -> np.ndarray:
        return self.batch(padded(1))[0].tokens_bt[0]

    @property
    def sequences(self) -> Sequences:
        columns = self.rollout.columns | {"sampled": np.tile(self.on_policy_b, (RESPONSE, 1)).T}
        if self.scores is not None:
            columns["teacher_ids"] = self.scores.ids_tk
            columns["teacher_log_probs"] = self.scores.log_probs_tk
        lengths = zip(self.prompts_bp, self.prompt_lengths_b, strict=True)
        prompts = Sequences.of_tokens([tokens_p[:length] for tokens_p, length in lengths])
        return dataclasses.replace(self.rollout, columns=columns).sequences(prompts)

    @property
    def view(self) -> Sequences | None:
        if self.view_prompts is None:
            return None
        responses = self.sequences.behind(self.prompt_lengths_b)
        return Sequences.of_tokens(self.view_prompts).join(responses)

    def batch(self, layout: Layout):
        return make_batch(self.sequences, layout=layout, pad_id=PAD, view=self.view)


def padded(num_microbatches: int) -> Layout:
    return Layout((Shape(ROWS // num_microbatches, PROMPT + RESPONSE),))


def make_rows(on_policy: bool = True) -> Rows:
    rng = np.random.default_rng(0)
    rollout = Rollout(
        tokens_br=rng.integers(1, VOCAB_SIZE, (ROWS, RESPONSE)).astype(np.int32),
        lengths_b=rng.integers(1, RESPONSE + 1, ROWS).astype(np.int32),
        log_probs_br=np.zeros((ROWS, RESPONSE), np.float32),
        sampled_log_probs_br=np.zeros((ROWS, RESPONSE), np.float32),
        stopped_b=rng.integers(0, 2, ROWS).astype(bool),
    )
    prompts_bp = rng.integers(1, VOCAB_SIZE, (ROWS, PROMPT)).astype(np.int32)
    lengths_b = rng.integers(1, PROMPT + 1, ROWS).astype(np.int32)
    return Rows(prompts_bp, lengths_b, rollout, np.full(ROWS, on_policy))


# Positions are cut, too, and of every row a device has some.
CONTEXT = dict(data=1, fsdp=2, context=4)


def on_devices(sizes):
    return make_mesh(**sizes) if isinstance(sizes, dict) else make_mesh(*sizes)


def run_step(
    student,
    teacher,
    rows,
    *,
    kl_type="forward",
    hard_labels=False,
    num_microbatches=1,
    layout=None,
    optimizer=None,
    mesh=None,
    teacher_rules=RULES,
    **of_objective,
):
    optimizer = optimizer or optax.adamw(1e-2)
    graph, params = student
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    step = make_train_step(
        graph,
        [TeacherInStep(None if hard_labels else teacher[0])],
        objective_of(kl_type, hard_labels=hard_labels, **of_objective),
        optimizer,
        vocab_size=VOCAB_SIZE,
    )
    # The step donates its state; the caller's parameters must survive.
    state = jax.tree.map(jnp.copy, state)
    teacher_params = None if hard_labels else teacher[1]
    batch = rows.batch(layout or padded(num_microbatches))
    if mesh is None:
        return step(state, [teacher_params], batch)
    with jax.set_mesh(mesh):
        params = jax.device_put(state.params, param_shardings(state.params, mesh))
        abstract = jax.eval_shape(optimizer.init, params)
        moments = optimizer_shardings(abstract, params, mesh)
        state = TrainState(state.step, params, jax.device_put(state.opt_state, moments))
        if teacher_params is not None:
            layout = param_shardings(teacher_params, mesh, teacher_rules)
            teacher_params = jax.device_put(teacher_params, layout)
        return step(state, [teacher_params], put_batch(mesh, batch))


@pytest.fixture(scope="module")
def student():
    return make_model(32, 2, 32, seed=1)


@pytest.fixture(scope="module")
def teacher():
    return make_model(64, 2, 40, seed=2, tied=False)


def assert_same(ours, theirs, tolerance=2e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=str(path))


def test_golden_step(student, teacher):
    """If a change of the mathematics is intended, put the new numbers here and say why."""
    _, metrics = run_step(student, teacher, make_rows())
    golden = {"loss": 0.4646948, "grad_norm": 1.861236, "update_norm": 1.401662}
    measured = {name: float(metrics[name]) for name in golden}
    assert measured == pytest.approx(golden, rel=1e-4)


def test_loss_is_the_mean_over_response_tokens(student, teacher):
    """Against log-softmax of full logits and explicit positions, row by row."""
    batch = make_rows()
    _, metrics = run_step(student, teacher, batch)

    @jax.jit
    def token_losses(student_params, teacher_params):
        def log_probs(graph, params):
            # Causal: what follows a row's end does not matter.
            module = nnx.merge(graph, params)
            logits_btv = module.logits(module(batch.tokens_bt))
            return jax.nn.log_softmax(logits_btv[..., :VOCAB_SIZE])

        q, p = log_probs(student[0], student_params), log_probs(teacher[0], teacher_params)
        return (jnp.exp(p) * (p - q)).sum(-1)

    losses_bt = np.asarray(token_losses(student[1], teacher[1]))
    losses = []
    for row in range(ROWS):
        length, prompt = int(batch.lengths_b[row]), int(batch.prompt_lengths_b[row])
        # The first response token is predicted at the last position of the prompt.
        losses += losses_bt[row, prompt - 1 : length - 1].tolist()
    assert float(metrics["tokens"]) == len(losses)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_update_does_not_depend_on_microbatches(student, teacher, num_microbatches):
    # SGD: the update is the gradient, without Adam's division that hides or blows up errors.
    options = dict(optimizer=optax.sgd(1.0))
    whole, whole_metrics = run_step(student, teacher, make_rows(), **options)
    parts, metrics = run_step(
        student, teacher, make_rows(), num_microbatches=num_microbatches, **options
    )
    assert_same(parts.params, whole.params)
    for name in ("loss", "grad_norm", "log_prob_gap", "teacher_log_prob"):
        assert float(metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-5)


def with_scores(rows: Rows, teacher, top_k: int) -> Rows:
    """The rows with the teacher's likeliest tokens, in place of a teacher in the step."""

    @jax.jit
    def log_probs(params, tokens_bt):
        module = nnx.merge(teacher[0], params)
        return jax.nn.log_softmax(module.logits(module(tokens_bt))[..., :VOCAB_SIZE])

    log_probs_btv = log_probs(teacher[1], rows.tokens_bt)
    position_br = rows.prompt_lengths_b[:, None] - 1 + np.arange(RESPONSE)
    log_probs_brv = np.take_along_axis(
        np.asarray(log_probs_btv), np.minimum(position_br, PROMPT + RESPONSE - 1)[..., None], axis=1
    )
    log_probs_brk, ids_brk = jax.lax.top_k(log_probs_brv, top_k)
    # What a server leaves beyond a response.
    known_br1 = (np.arange(RESPONSE) < rows.rollout.lengths_b[:, None])[..., None]
    scores = TopK(
        np.where(known_br1, ids_brk, -1).astype(np.int32),
        np.where(known_br1, log_probs_brk, -100.0).astype(np.float32),
    )
    return dataclasses.replace(rows, scores=scores)


@pytest.mark.parametrize("kl_type", ["forward", "jsd"])
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_teacher_known_by_all_its_tokens_is_the_teacher(
    student, teacher, kl_type, num_microbatches
):
    options = dict(optimizer=optax.sgd(1.0), kl_type=kl_type)
    local, local_metrics = run_step(student, teacher, make_rows(), **options)
    batch = with_scores(make_rows(), teacher, VOCAB_SIZE)
    remote, metrics = run_step(
        student, (None, None), batch, num_microbatches=num_microbatches, **options
    )
    assert_same(remote.params, local.params)
    for name in ("loss", "grad_norm", "teacher_log_prob"):
        assert float(metrics[name]) == pytest.approx(float(local_metrics[name]), rel=1e-4)


def test_teacher_known_by_few_tokens_gives_a_lower_bound(student, teacher):
    losses = [
        float(run_step(student, (None, None), with_scores(make_rows(), teacher, k))[1]["loss"])
        for k in (1, 4, 16, VOCAB_SIZE)
    ]
    assert 0 < losses[0] < losses[1] < losses[2] < losses[3]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), CONTEXT])
def test_scores_on_a_mesh(student, teacher, sizes):
    rows = with_scores(make_rows(), teacher, 4)
    options = dict(optimizer=optax.sgd(1.0))
    single, single_metrics = run_step(student, (None, None), rows, **options)
    state, metrics = run_step(student, (None, None), rows, mesh=on_devices(sizes), **options)
    assert_same(jax.device_get(state.params), jax.device_get(single.params))
    assert float(metrics["loss"]) == pytest.approx(float(single_metrics["loss"]), rel=1e-5)


@pytest.mark.parametrize(
    "teacher_rules, packed", [(RULES, False), (SPREAD_RULES, True)], ids=["padded", "spread"]
)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2), CONTEXT])
def test_update_does_not_depend_on_mesh(sizes, teacher_rules, packed):
    student = make_model(32, 2, 32, seed=1, num_kv_heads=4)
    teacher = make_model(64, 2, 40, seed=2, tied=False, num_kv_heads=4)
    rows, options = make_rows(), dict(optimizer=optax.sgd(1.0, momentum=0.9))
    if sizes == (2, 2, 2):
        rows, more = with_advantages(rows)
        options |= more
    single, single_metrics = run_step(student, teacher, rows, **options)
    options |= dict(mesh=on_devices(sizes), teacher_rules=teacher_rules)
    options |= dict(layout=PACKED if packed else padded(1))
    state, metrics = run_step(student, teacher, rows, **options)
    assert_same(jax.device_get(state.params), jax.device_get(single.params))
    assert float(metrics["loss"]) == pytest.approx(float(single_metrics["loss"]), rel=1e-5)
    if sizes != (8, 1, 1):
        shard = state.params["embedding"].get_value().addressable_shards[0].data
        assert shard.size < state.params["embedding"].get_value().size


# Eight sequences of up to 12 tokens, several to a row; rows of three lengths, some never filled.
PACKED = Layout((Shape(ROWS, 20),), packed=True)
LAYOUTS = {
    "packed": PACKED,
    "packed into microbatches": Layout((Shape(2, 15),), packed=True),
    "rows of three lengths": Layout((Shape(4, 4), Shape(2, 8), Shape(1, 12))),
    "rows that nothing fills": Layout((Shape(2, 12), Shape(2, 20))),
}


def with_advantages(rows: Rows):
    """Half of the rows sampled, by another sampler; advantages, weights; an objective of all."""
    rng = np.random.default_rng(1)
    shape = rows.rollout.tokens_br.shape
    on_policy_b = np.arange(ROWS) % 2 == 0
    rollout = dataclasses.replace(
        rows.rollout,
        log_probs_br=-rng.uniform(0, 6, shape).astype(np.float32),
        columns={"advantage": rng.standard_normal(shape), "weight": 0.9 ** np.indices(shape)[1]},
    )
    options = dict(reward_advantage=1.0, teacher_advantage=0.5, ratio_clip=0.5)
    options |= dict(own_importance_clip=2.0, proximal_share=0.5, divergence=0.5, cross_entropy=0.1)
    options |= dict(entropy_threshold=1.0, target_start=0.5, max_steps=1, kl_type_on_data="jsd")
    return dataclasses.replace(rows, rollout=rollout, on_policy_b=on_policy_b), options


@pytest.mark.parametrize(
    "objective, name",
    [("forward", name) for name in LAYOUTS]
    + [(name, "packed into microbatches") for name in ("hard labels", "importance", "scores")]
    + [("advantages", "packed into microbatches")],
)
def test_update_does_not_depend_on_layout(student, teacher, objective, name):
    """Loss, gradient and every metric but the padding are those of padded rows."""
    rows = make_rows()
    options = dict(optimizer=optax.sgd(1.0))
    if objective == "scores":
        rows, teacher = with_scores(rows, teacher, 4), (None, None)
    elif objective == "advantages":
        rows, more = with_advantages(rows)
        options |= more
    elif objective == "importance":
        options["importance_clip"] = 1.5
    elif objective == "hard labels":
        options["hard_labels"] = True
    whole, whole_metrics = run_step(student, teacher, rows, **options)
    state, metrics = run_step(student, teacher, rows, layout=LAYOUTS[name], **options)
    assert_same(state.params, whole.params)
    for metric in whole_metrics.keys() - {"padding"}:
        expected = pytest.approx(float(whole_metrics[metric]), rel=1e-5, abs=1e-7)
        assert float(metrics[metric]) == expected, metric


def test_policy_gradient_is_that_of_the_expected_reward():
    """Over all responses of up to two tokens, 0 being the end: of sum_y q(y) R(y), by autodiff."""
    graph, params = make_model(8, 1, 4, seed=3)
    responses = [[0], *([a, b] for a in (1, 2, 3) for b in range(4))]
    rewards = np.random.default_rng(0).standard_normal(len(responses)).astype(np.float32)
    tokens_bt = np.array([[2, *response, 0][:3] for response in responses])
    is_second_b = np.array([len(response) == 2 for response in responses])

    @jax.jit
    def probabilities(params):
        module = nnx.merge(graph, params)
        log_q_btv = jax.nn.log_softmax(module.logits(module(jnp.asarray(tokens_bt))))
        first_b, second_b = (
            jnp.take_along_axis(log_q_btv[:, t], tokens_bt[:, t + 1, None], axis=1)[:, 0]
            for t in (0, 1)
        )
        return jnp.exp(first_b + jnp.where(is_second_b, second_b, 0.0))

    q_b = np.asarray(probabilities(params))
    assert q_b.sum() == pytest.approx(1, abs=1e-5)
    expected = jax.jit(jax.grad(lambda params: -probabilities(params) @ rewards))(params)
    advantages = [np.full(len(y), q * r) for y, q, r in zip(responses, q_b, rewards, strict=True)]
    sequences = Sequences.of_tokens([[2]] * len(responses)).join(
        Sequences.of_tokens(responses, sampled=True, weight=1, advantage=np.concatenate(advantages))
    )
    (rows,) = make_batch(sequences, layout=Layout((Shape(len(responses), 3),)), pad_id=PAD)
    objective = objective_of(divergence=0.0, reward_advantage=1.0)
    loss_fn = make_loss(graph, None, objective, vocab_size=4)
    rows = jax.tree.map(lambda x: x[0], rows)
    found = jax.jit(jax.grad(lambda params: loss_fn(params, None, rows, jnp.ones(()))[0]))(params)
    assert_same(found, expected)


def test_packing_leaves_less_padding(student, teacher):
    rows, layout = make_rows(), LAYOUTS["packed into microbatches"]
    _, metrics = run_step(student, teacher, rows)
    tokens = rows.lengths_b.sum()
    assert float(metrics["padding"]) == pytest.approx(1 - tokens / (ROWS * (PROMPT + RESPONSE)))
    _, packed = run_step(student, teacher, rows, layout=layout)
    # An empty microbatch is not computed: whole ones of 30 tokens each.
    microbatches = tokens / 30 / (1 - float(packed["padding"]))
    assert microbatches == pytest.approx(round(microbatches), abs=1e-4)
    assert float(packed["padding"]) < float(metrics["padding"])


@pytest.mark.parametrize(
    "kl_type", ["forward", "reverse", "mixed", "jsd", "skew_forward", "skew_reverse"]
)
def test_student_that_is_the_teacher_has_nothing_to_learn(student, kl_type):
    _, metrics = run_step(student, student, make_rows(), kl_type=kl_type)
    assert abs(float(metrics["loss"])) < 1e-5
    assert float(metrics["grad_norm"]) < 1e-4


def test_hard_labels_are_cross_entropy_and_learnable(student):
    batch = make_rows(on_policy=False)
    state, first = run_step(student, None, batch, hard_labels=True)
    _, second = run_step((student[0], state.params), None, batch, hard_labels=True)
    assert float(first["loss"]) == pytest.approx(-float(first["student_log_prob"]), rel=1e-5)
    assert float(second["loss"]) < float(first["loss"])


def test_gap_compares_sampler_and_trainer_on_student_rows_only(student, teacher):
    batch = make_rows()
    _, metrics = run_step(student, teacher, batch)
    # make_rows claims log-probability 0 for every token, so the gap is -log q itself.
    assert float(metrics["log_prob_gap"]) == pytest.approx(
        -float(metrics["student_log_prob"]), rel=1e-5
    )
    assert float(metrics["log_prob_gap_max"]) >= float(metrics["log_prob_gap"])
    _, metrics = run_step(student, teacher, make_rows(on_policy=False))
    assert float(metrics["log_prob_gap"]) == 0.0


def response_log_probs(model, batch: Rows) -> list[jax.Array]:
    """log_softmax at the positions that predict a response token, (length, v) for every row."""
    graph, params = model
    module = nnx.merge(graph, params)
    log_probs_btv = jax.nn.log_softmax(module.logits(module(batch.tokens_bt))[..., :VOCAB_SIZE])
    lengths = zip(batch.prompt_lengths_b.tolist(), batch.lengths_b.tolist(), strict=True)
    return [log_probs_btv[row, p - 1 : length - 1] for row, (p, length) in enumerate(lengths)]


def responses(batch: Rows) -> list[np.ndarray]:
    lengths = zip(batch.prompt_lengths_b.tolist(), batch.lengths_b.tolist(), strict=True)
    return [np.asarray(batch.tokens_bt)[row, p:n] for row, (p, n) in enumerate(lengths)]


def with_log_probs(batch: Rows, rows: list[np.ndarray]) -> Rows:
    log_probs_br = np.zeros((ROWS, RESPONSE), np.float32)
    for row, values in enumerate(rows):
        log_probs_br[row, : len(values)] = values
    rollout = dataclasses.replace(batch.rollout, log_probs_br=log_probs_br)
    return dataclasses.replace(batch, rollout=rollout)


def test_importance_weights_of_fresh_rollouts_change_nothing(student, teacher):
    batch = make_rows()
    log_q = response_log_probs(student, batch)
    chosen = [q[jnp.arange(len(r)), r] for q, r in zip(log_q, responses(batch), strict=True)]
    batch = with_log_probs(batch, chosen)
    options = dict(optimizer=optax.sgd(1.0))
    plain, plain_metrics = run_step(student, teacher, batch, **options)
    state, metrics = run_step(student, teacher, batch, importance_clip=2.0, **options)
    assert_same(state.params, plain.params)
    assert float(metrics["loss"]) == pytest.approx(float(plain_metrics["loss"]), rel=1e-5)
    assert float(metrics["importance_weight"]) == pytest.approx(1, rel=1e-5)
    assert float(metrics["importance_clipped"]) == 0
    assert "importance_weight" not in plain_metrics


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_importance_weights_of_stale_rollouts_follow_the_formula(
    student, teacher, num_microbatches
):
    """Half of the rows are fixed data: weight 1. Update and metrics against plain autodiff."""
    clip, rng = 1.5, np.random.default_rng(3)
    batch = make_rows()
    on_policy_b = np.arange(ROWS) % 2 == 0
    stale = [rng.normal(-3, 2, len(row)) for row in responses(batch)]
    batch = dataclasses.replace(with_log_probs(batch, stale), on_policy_b=on_policy_b)
    log_p = response_log_probs(teacher, batch)
    log_q = response_log_probs(student, batch)
    ratios = [
        np.exp(np.asarray(q)[np.arange(len(row)), row] - then)
        for q, row, then in zip(log_q, responses(batch), stale, strict=True)
    ]
    weights = [
        np.minimum(row, clip) if sampled else np.ones(len(row))
        for row, sampled in zip(ratios, on_policy_b, strict=True)
    ]

    def loss(params):
        log_q = response_log_probs((student[0], params), batch)
        terms = zip(weights, log_p, log_q, strict=True)
        sums = [(w * (jnp.exp(p) * (p - q)).sum(-1)).sum() for w, p, q in terms]
        return sum(sums) / sum(len(row) for row in weights)

    state, metrics = run_step(
        student,
        teacher,
        batch,
        importance_clip=clip,
        num_microbatches=num_microbatches,
        optimizer=optax.sgd(1.0),
    )
    value, gradients = jax.value_and_grad(loss)(student[1])
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert_same(state.params, jax.tree.map(jnp.subtract, student[1], gradients))
    sampled = np.concatenate([r for r, coin in zip(ratios, on_policy_b, strict=True) if coin])
    mean = np.minimum(sampled, clip).mean()
    assert float(metrics["importance_weight"]) == pytest.approx(mean, rel=1e-5)
    assert 0 < float(metrics["importance_clipped"]) == pytest.approx((sampled > clip).mean())


def test_importance_weights_cost_no_product_with_the_head(student, teacher):
    """They come from the sums of the pass that makes the gradients."""

    def products(clip):
        optimizer = optax.sgd(1.0)
        objective = objective_of("forward", importance_clip=clip)
        step = make_train_step(
            student[0], [TeacherInStep(teacher[0])], objective, optimizer, vocab_size=VOCAB_SIZE
        )
        state = TrainState(jnp.zeros((), jnp.int32), student[1], optimizer.init(student[1]))
        return str(jax.make_jaxpr(step)(state, [teacher[1]], make_rows().batch(padded(1)))).count(
            "dot_general"
        )

    assert products(2.0) == products(0.0)


def test_importance_weights_without_sampled_rows_are_one(student, teacher):
    batch = make_rows(on_policy=False)
    _, plain = run_step(student, teacher, batch)
    _, metrics = run_step(student, teacher, batch, importance_clip=1.0)
    assert float(metrics["loss"]) == float(plain["loss"])
    assert float(metrics["importance_weight"]) == 1 and float(metrics["importance_clipped"]) == 0


VIEW_EXCESS = 8


@pytest.fixture(scope="module")
def update_with_a_view(student, teacher):
    """Rows, and one step by the definition: every response behind each model's own prompt."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, PROMPT + 4, ROWS)
    prompts = tuple(rng.integers(1, VOCAB_SIZE, length).astype(np.int32) for length in lengths)
    rows = dataclasses.replace(make_rows(), view_prompts=prompts)
    seen_bt = np.zeros((ROWS, PROMPT + 4 + RESPONSE), np.int32)
    for row, (prompt, length) in enumerate(zip(prompts, rows.rollout.lengths_b, strict=True)):
        tokens = [*prompt, *rows.rollout.tokens_br[row, :length]]
        seen_bt[row, : len(tokens)] = tokens

    def log_probs(model, params, tokens_bt):
        module = nnx.merge(model[0], params)
        return jax.nn.log_softmax(module.logits(module(tokens_bt))[..., :VOCAB_SIZE])

    def loss(params):
        q_btv = log_probs(student, params, rows.tokens_bt)
        p_btv = log_probs(teacher, teacher[1], seen_bt)
        losses = []
        for row in range(ROWS):
            for r in range(int(rows.rollout.lengths_b[row])):
                q_v = q_btv[row, rows.prompt_lengths_b[row] - 1 + r]
                p_v = p_btv[row, len(prompts[row]) - 1 + r]
                losses.append((jnp.exp(p_v) * (p_v - q_v)).sum())
        return jnp.stack(losses).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(student[1])
    return rows, float(value), jax.tree.map(jnp.subtract, student[1], gradients)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (padded(4), None),
        (LAYOUTS["packed into microbatches"], None),
        (PACKED, (2, 2, 2)),
        (PACKED, CONTEXT),
    ],
)
def test_teacher_with_its_own_prompts(student, teacher, update_with_a_view, layout, sizes):
    rows, loss, params = update_with_a_view
    layout = dataclasses.replace(layout, view_excess=VIEW_EXCESS)
    options = dict(optimizer=optax.sgd(1.0), layout=layout, mesh=sizes and on_devices(sizes))
    state, metrics = run_step(student, teacher, rows, **options)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert_same(jax.device_get(state.params), params)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_without_a_finite_gradient_changes_only_its_number(student, teacher, bad):
    """One bad weight of the teacher, in one of two microbatches' rows."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(bad), teacher[1])
    options = dict(optimizer=optimizer, num_microbatches=2)
    state, metrics = run_step(student, (teacher[0], broken), make_rows(), **options)
    assert float(metrics["skipped"]) == 1 and float(metrics["update_norm"]) == 0
    assert not np.isfinite(float(metrics["loss"]))
    before = TrainState(jnp.ones((), jnp.int32), student[1], optimizer.init(student[1]))
    jax.tree.map(np.testing.assert_array_equal, state, before)
    state, metrics = run_step(student, teacher, make_rows(), **options)
    assert float(metrics["skipped"]) == 0 and float(metrics["update_norm"]) > 0
    assert int(optax.tree.get(state.opt_state, "count")) == 1


def test_step_donates_its_state(student, teacher):
    graph, params = student
    optimizer = optax.adamw(1e-2)
    state = jax.tree.map(
        jnp.copy, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    )
    step = make_train_step(
        graph, [TeacherInStep(teacher[0])], objective_of("forward"), optimizer,
        vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    step(state, [teacher[1]], make_rows().batch(padded(1)))
    assert jax.tree.leaves(state.params)[0].is_deleted()
    assert not jax.tree.leaves(teacher[1])[0].is_deleted()


def test_gradients_of_microbatches_add_up_in_float32():
    """Eight times the same row in bfloat16: partial sums of 3, 5, 7 would be rounded in that."""
    (student, params), (teacher, teacher_params) = (
        make_model(width, 1, VOCAB_SIZE, seed, dtype=jnp.bfloat16)
        for width, seed in ((16, 0), (32, 1))
    )
    row = jax.tree.map(lambda x: x[:1], vars(make_rows()) | {"scores": None})
    shape = Layout((Shape(1, PROMPT + RESPONSE),))

    def gradients(repeats: int):
        rows = Rows(**jax.tree.map(lambda x: np.repeat(x, repeats, axis=0), row))
        assert len(rows.batch(shape)[0].tokens_bt) == repeats
        optimizer = optax.trace(decay=0.0)  # its state is the gradient
        state, _ = run_step(
            (student, params), (teacher, teacher_params), rows, layout=shape, optimizer=optimizer
        )
        return optax.tree.get(state.opt_state, "trace")

    for one, eight in zip(*map(jax.tree.leaves, (gradients(1), gradients(8))), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-9)


def test_mesh_errors_name_what_works():
    for sizes in ((3, 1, 1), (3, 2, 1), (-1, 3, 1)):
        works = "must be 8, e.g. mesh.data=8 mesh.fsdp=1 mesh.tensor=1 mesh.context=1 mesh.expert=1"
        with pytest.raises(UserError, match=works):
            make_mesh(*sizes)
    with pytest.raises(UserError, match="at most one is -1"):
        make_mesh(-1, -1, 1)
    assert batch_parts(make_mesh(-1, 2, 2)) == 4


def test_an_axis_of_the_mesh_is_a_row_of_the_table(monkeypatch):
    """A model runs on a mesh with an axis that no other code knows."""
    monkeypatch.setitem(sharding.MESH_AXES, "slice", 1)
    monkeypatch.setitem(sharding.RULES, "batch", ("data", "slice"))
    monkeypatch.setitem(sharding.RULES, "mlp_batch", ("data", "slice"))
    monkeypatch.setitem(sharding.RULES, "mlp", ("tensor", "fsdp"))
    monkeypatch.setitem(sharding.RULES, "embed", None)
    graph, params = make_model(32, 2, 32, seed=1)
    tokens = np.arange(32).reshape(4, 8)
    expected = nnx.merge(graph, params)(tokens)
    mesh = make_mesh(fsdp=2, slice=2)
    sizes = dict(data=2, fsdp=2, tensor=1, context=1, expert=1, slice=2, width=1)
    assert dict(mesh.shape) == sizes
    assert batch_parts(mesh) == 4
    found = sampler_mesh_sizes(mesh.shape, 6)
    assert found == sizes | dict(data=3, slice=1)
    params = jax.device_put(params, param_shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params: nnx.merge(graph, params)(tokens))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="no axis 'pipeline', only data, .* expert, slice"):
        make_mesh(pipeline=2)


def test_two_dimensions_may_not_share_a_mesh_axis():
    with pytest.raises(
        ValueError, match="'heads' and 'ffn' of one array .* one mesh axis 'tensor'"
    ):
        partition_spec(("heads", "ffn"))
    with pytest.raises(ValueError, match="'batch' and 'embed' .* one mesh axis 'fsdp'"):
        partition_spec(("batch", None, "embed"))


def test_indivisible_parameter_is_named():
    _, params = make_model(32, 1, 31, seed=0)
    with pytest.raises(UserError, match="embedding.*31"):
        param_shardings(params, make_mesh(1, 1, 8))


@pytest.mark.parametrize(
    ("changes", "sizes", "expected"),
    [
        ({}, (1, 1, 8), "layers/k_bias .* 'kv_heads' of 2, which mesh.tensor=8 .* be 1 or 2$"),
        ({"num_kv_heads": 4}, (1, 1, 8), "'kv_heads' of 4, which mesh.tensor=8 .* be 1 or 2 or 4$"),
        ({"vocab_size": 30}, (2, 1, 4), "'vocab' of 30, which mesh.tensor=4 .* be 1 or 2$"),
        ({"model_width": 12}, (1, 8, 1), "'embed' of 12, which mesh.fsdp=8 .* be 1 or 2 or 4$"),
        (
            {"experts": Experts(6, 2, 12)},
            (1, 1, 2, 1, 4),
            "'expert' of 6, which mesh.expert=4 .* be 1 or 2$",
        ),
    ],
)
def test_error_says_which_sizes_work(changes, sizes, expected):
    with pytest.raises(UserError, match=expected):
        param_shardings(random_model(model_config(**changes))[1], make_mesh(*sizes))


def test_frozen_parameters_stay_and_take_part(student, teacher):
    """The others move as in full training, and the moments are theirs only."""
    graph, params = student
    frozen, trainable = nnx.split_state(params, lambda path, _: path[0] == "embedding", ...)
    optimizer = optax.sgd(0.1, momentum=0.9)
    objective, batch = objective_of("forward"), make_rows().batch(padded(2))
    teachers = [TeacherInStep(teacher[0])]
    step = make_train_step(graph, teachers, objective, optimizer, vocab_size=VOCAB_SIZE)

    def run(trainable, *frozen):
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, trainable, optimizer.init(trainable), *frozen)
        return step(jax.tree.map(jnp.copy, state), [teacher[1]], batch)[0]

    whole, part = run(params), run(trainable, frozen)
    assert jax.tree.structure(part.params) == jax.tree.structure(params)
    assert len(jax.tree.leaves(part.opt_state)) == len(jax.tree.leaves(trainable))
    for path, array in nnx.to_flat_state(part.params):
        source = params if path[0] == "embedding" else whole.params
        np.testing.assert_array_equal(array[...], dict(nnx.to_flat_state(source))[path][...])


def test_a_weight_reads_a_column_of_ones_own(student, teacher, monkeypatch):
    """What a plugin knows of tokens, by a column that it declares, multiplies their loss."""
    monkeypatch.setattr(sequences, "_columns", dict(sequences._columns))
    monkeypatch.setattr(weights._WEIGHTS, "_parts", dict(weights._WEIGHTS._parts))
    declare_column("trust", Column(np.float32, fill=1))

    @weights.register_weight("trusted")
    def trusted(statistics, columns):
        return columns["trust"]

    rows = make_rows()
    trust_br = np.random.default_rng(1).integers(0, 3, rows.rollout.tokens_br.shape)
    trusting = dataclasses.replace(
        rows, rollout=dataclasses.replace(rows.rollout, columns={"trust": trust_br})
    )
    batch, plain = trusting.batch(padded(2)), objective_of("forward")
    total = float(rows.rollout.lengths_b.sum())

    def loss_and_gradient(objective, batch):
        loss_fn = make_loss(student[0], teacher[0], objective, vocab_size=VOCAB_SIZE)
        value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        pieces = [
            value_and_grad(student[1], teacher[1], jax.tree.map(lambda x, i=i: x[i], part), total)
            for part in batch
            for i in range(len(part.tokens_bt))
        ]
        return jax.tree.map(lambda *x: sum(x), *[(loss, grads) for (loss, _), grads in pieces])

    # By the definition: the tokens' weights themselves are what the column says.
    as_weights = tuple(
        dataclasses.replace(part, columns=part.columns | {"weight": by_hand})
        for part in batch
        for by_hand in [part.columns["weight"] * part.columns["trust"]]
    )
    ours = loss_and_gradient(objective_of("forward", weights=("trusted",)), batch)
    assert_same(ours, loss_and_gradient(plain, as_weights))
    assert abs(float(ours[0] - loss_and_gradient(plain, batch)[0])) > 0.01
