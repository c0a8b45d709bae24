"""GPU kernels against their definition: interpreted, lowered for an H200, and compiled on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import needs_hopper
from jax.experimental.pallas import mosaic_gpu as plgpu

from distill.kernels.linear_divergence import (
    DivergenceTerm,
    TermSum,
    cross_entropy,
    pallas_gpu,
    sweeps,
)
from distill.kernels.linear_divergence.pallas_gpu import Config, Sweeps
from distill.losses.divergences import get_divergence

# Relative to the largest value of a result: sums of float32 in another order, exponents rounded
# once more (a logit of 80 has a spacing of 8e-6), and one rounding to bfloat16.
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}


def hellinger(log_p, log_q):
    return 0.5 * (jnp.exp(log_p / 2) - jnp.exp(log_q / 2)) ** 2


def everything(log_p, log_q):
    """Not a divergence: functions that Mosaic GPU has no lowering for."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    smooth = jnp.log1p(p * q) + jnp.expm1(-q) / (1.0 + p) + jax.nn.softplus(log_q)
    roots = jnp.sqrt(q) + (q**0.3) * (p**0.7)
    return smooth * jax.lax.stop_gradient(q) + jnp.where(jnp.isfinite(log_q), roots * p, 0.0)


def likely(log_p, log_q, is_target):
    """A term that looks at the target."""
    return jnp.where(is_target, jnp.exp(log_q - log_p), 0.0)


JSD = DivergenceTerm(get_divergence("jsd", jsd_beta=0.2))
SUM = DivergenceTerm(get_divergence("forward")), cross_entropy, likely, JSD


def loss_of(*terms, temperature=1.0):
    """Of pointwise terms, or of one divergence (by name or as a function)."""
    terms = [get_divergence(term) if term in BUILT_IN else term for term in terms]
    known = (cross_entropy, likely)
    return TermSum.of(
        *(x if x in known or isinstance(x, DivergenceTerm) else DivergenceTerm(x) for x in terms),
        temperature=temperature,
    )


BUILT_IN = "forward", "reverse", "mixed", "jsd", "skew_forward", "skew_reverse"


def make_problem(num_tokens, width_s, width_t, num_columns, *, scale=3.0, soft_cap=None):
    """Arrays of every sweep, and weights; columns that do not exist are NaN."""
    rng = np.random.default_rng(0)

    def logits(width):
        if width is None:
            return None
        logits_cv = (scale * rng.uniform(-1.0, 1.0, (num_tokens, width))).astype(np.float32)
        logits_cv[:, num_columns:] = np.nan
        return logits_cv

    logits_s_cv, logits_t_cv = logits(width_s), logits(width_t)
    targets_c = rng.integers(0, num_columns, num_tokens).astype(np.int32)
    targets_c[1::3], targets_c[2::3] = -1, 1 << 20
    weights_c = rng.uniform(0.2, 1.0, num_tokens).astype(np.float32)
    columns = np.int32(num_columns)
    logits = sweeps.Logits(logits_s_cv, logits_t_cv, targets_c, columns, soft_cap)
    return logits, weights_c


def sums_and_gradient(implementation, loss, dtype, logits, statistics, weights_c):
    sums = implementation.term_sums(loss, logits, statistics)
    factors = [(slope_sum_c, weights_c / (1 + i)) for i, (_, slope_sum_c) in enumerate(sums)]
    gradient_cv = implementation.gradient(loss, logits, statistics, factors, dtype=dtype)
    return sums, gradient_cv


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def all_sweeps(implementation, loss, dtype, logits, weights_c):
    # The entropy with sums of terms, whose weights may ask for it.
    options = dict(temperature=loss.temperature, entropy=len(loss.terms) > 1)
    statistics = implementation.statistics(logits, **options)
    rest = sums_and_gradient(implementation, loss, dtype, logits, statistics, weights_c)
    return statistics, *rest


def assert_agree(implementation, loss, problem, dtype):
    actual = all_sweeps(implementation, loss, dtype, *problem)
    expected = all_sweeps(sweeps.XlaSweeps(), loss, dtype, *problem)
    for field in dataclasses.fields(sweeps.Statistics):
        values = (getattr(statistics, field.name) for statistics in (actual[0], expected[0]))
        assert_close(*values, jnp.float32, field.name)
    for values in zip(*map(jax.tree.leaves, (actual[1], expected[1])), strict=True):
        assert_close(*values, jnp.float32, "terms and slopes")
    assert actual[2].dtype == dtype
    assert_close(actual[2], expected[2], dtype, "gradient")
    assert not np.asarray(actual[2][:, int(problem[0].num_columns) :], np.float32).any()


def assert_close(actual, expected, dtype, name):
    if expected is None:
        assert actual is None, name
        return
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale, err_msg=name
    )


def interpreted(config: Config) -> Sweeps:
    parameters = getattr(plgpu, "InterpretGPUParams", None)
    if parameters is None:  # jax 0.10 has it, but does not export it
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as parameters
    return Sweeps(config=config, interpret=parameters())


SMALL, LARGE = (38, 45, 33), (1187 + 5, 1187 + 12, 1187)
ONE_PIECE, TWO_PIECES = Config(256, 256, 3), Config(256, 128, 2)


@pytest.mark.parametrize(
    "config, num_tokens, shape, loss, dtype, scale",
    [
        (TWO_PIECES, 7, LARGE, loss_of(JSD), jnp.float32, 3.0),
        (ONE_PIECE, 1, LARGE, loss_of(JSD, temperature=1.7), jnp.bfloat16, 80.0),
        (ONE_PIECE, 7, SMALL, loss_of("forward", temperature=1.7), jnp.float32, 3.0),
        (ONE_PIECE, 7, SMALL, loss_of(everything), jnp.float32, 3.0),
        # The student's array the wider one: its last columns are zeros of a further tile.
        (ONE_PIECE, 2, (1600, 1192, 1187), loss_of(hellinger), jnp.bfloat16, 80.0),
        (ONE_PIECE, 20, SMALL, loss_of(hellinger), jnp.float32, 80.0),
        (ONE_PIECE, 7, (1192, None, 1187), loss_of(cross_entropy), jnp.float32, 80.0),
        (ONE_PIECE, 7, SMALL, loss_of(*SUM, temperature=1.7), jnp.float32, 3.0),
        (TWO_PIECES, 1, (38, None, 33), loss_of(cross_entropy, temperature=1.7), jnp.bfloat16, 3.0),
    ],
)
def test_interpreted_agrees_with_definition(config, num_tokens, shape, loss, dtype, scale):
    problem = make_problem(num_tokens, *shape, scale=scale)
    assert_agree(interpreted(config), loss, problem, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gradient_goes_through_the_cap(dtype):
    problem = make_problem(7, *SMALL, soft_cap=3.5)
    assert_agree(interpreted(ONE_PIECE), loss_of(*SUM, temperature=1.7), problem, dtype)


def test_no_columns():
    """A shard of the vocabulary may be all padding: it adds nothing, and no NaN."""
    logits, _ = make_problem(2, 64, 64, 33)
    statistics = jax.jit(interpreted(ONE_PIECE).statistics, static_argnames="temperature")(
        dataclasses.replace(logits, num_columns=np.int32(0)), temperature=1.0
    )
    assert (statistics.max_s <= sweeps.MASKED).all() and (statistics.max_t <= sweeps.MASKED).all()
    for name in ("sum_s", "sum_t", "target_s", "target_t", "cross_forward", "cross_reverse"):
        assert not np.asarray(getattr(statistics, name)).any(), name


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered_for_h200(function, width_s, width_t, *more, soft_cap=None) -> str:
    """The program of jitted function(logits, *more) at a real size."""
    logits_t = array(1024, width_t) if width_t else None
    integers = array(1024, dtype=jnp.int32), array(dtype=jnp.int32)
    logits = sweeps.Logits(array(1024, width_s), logits_t, *integers, soft_cap)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "cuda")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(logits, *more)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "terms, soft_cap",
    [*(((name,), None) for name in BUILT_IN), ((hellinger,), None), ((everything,), None)]
    + [(SUM, None), (SUM, 30.0)],
)
def test_lowers_for_h200(terms, soft_cap):
    loss = loss_of(*terms, temperature=1.7)
    function = functools.partial(sums_and_gradient, Sweeps(), loss, jnp.bfloat16)
    statistics = sweeps.Statistics(*[array(1024)] * 10)
    more = statistics, array(1024)
    text = lowered_for_h200(function, 151936, 152064, *more, soft_cap=soft_cap)
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("width_s, width_t", [(151936, 152064), (152064, 151936), (151936, None)])
def test_float32_gradient_is_written_over_the_logits(width_s, width_t):
    loss = loss_of(JSD) if width_t else loss_of(cross_entropy)
    function = functools.partial(all_sweeps, Sweeps(), loss, jnp.float32)
    text = lowered_for_h200(function, width_s, width_t, array(1024))
    assert text.count("custom_call @mosaic_gpu") == 3
    assert text.count("output_operand_alias<") == 1


@pytest.mark.parametrize("sweep", ["statistics", "term_sums", "gradient"])
@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("output_bytes", [0, 2, 4])
def test_four_blocks_share_a_multiprocessor(sweep, num_models, output_bytes):
    config = pallas_gpu.choose_config(sweep, num_models, output_bytes)
    tiles = 4 * num_models * config.stages + output_bytes * pallas_gpu.OUTPUT_SLOTS
    assert config.stages >= 2
    assert 4 * (tiles * config.tile + (3 << 10)) <= 228 << 10


@pytest.mark.parametrize("tile, lanes, stages", [(256, 64, 2), (384, 256, 2), (256, 256, 0)])
def test_bad_config(tile, lanes, stages):
    with pytest.raises(ValueError, match="128 must divide lanes"):
        Config(tile, lanes, stages)


@needs_hopper
@pytest.mark.parametrize(
    "num_tokens, shape, scale, temperature, dtype",
    [
        (7, SMALL, 3.0, 1.0, jnp.float32),
        (1, LARGE, 80.0, 1.7, jnp.bfloat16),
        (300, (151936, 152064, 151665), 80.0, 1.0, jnp.bfloat16),
        (300, (152064, 151936, 151665), 3.0, 1.7, jnp.float32),
    ],
)
@pytest.mark.parametrize("terms", [*((name,) for name in BUILT_IN), (hellinger,), SUM])
def test_compiled_agrees_with_definition(terms, num_tokens, shape, scale, temperature, dtype):
    problem = make_problem(num_tokens, *shape, scale=scale)
    assert_agree(Sweeps(), loss_of(*terms, temperature=temperature), problem, dtype)


@needs_hopper
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_cross_entropy_agrees_with_definition(dtype):
    problem = make_problem(300, 151936, None, 151665, scale=80.0)
    assert_agree(Sweeps(), loss_of(cross_entropy), problem, dtype)
