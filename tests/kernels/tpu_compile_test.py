"""The fused loss at real sizes, compiled by the real TPU compiler; no TPU is needed for that."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import needs_tpu_compiler, num_kernels, temporary_bytes, tpu_mesh

from benchmarks import harness
from benchmarks import linear_divergence as benchmark
from distill.base.sharding import named_sharding
from distill.kernels.linear_divergence import (
    DivergenceTerm,
    Head,
    Term,
    TermSum,
    cross_entropy,
    linear_divergence,
    linear_loss,
    pallas_tpu,
    per_token_divergences,
)
from distill.kernels.linear_divergence.sweeps import Projection
from distill.losses.divergences import get_divergence

pytestmark = [pytest.mark.slow, needs_tpu_compiler]

NUM_TOKENS, WIDTH_S, WIDTH_T, COLUMNS_S, COLUMNS_T = 16384, 1536, 5120, 151936, 152064
VOCAB_SIZE = 151665  # of Qwen2.5
GB = 1e9


def shapes(mesh, width_s=WIDTH_S, width_t=WIDTH_T):
    """hidden_s, head_s, hidden_t, head_t, weights: bfloat16, tokens and vocabulary sharded."""
    hidden, head = ("token", None), ("embed", "vocab")
    models = [
        ((NUM_TOKENS, width_s), hidden),
        ((width_s, COLUMNS_S), head),
        ((NUM_TOKENS, width_t), hidden),
        ((width_t, COLUMNS_T), head),
    ]
    arrays = [(*model, jnp.bfloat16) for model in models]
    arrays.append(((NUM_TOKENS,), ("token",), jnp.float32))
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))
        for shape, axes, dtype in arrays
    ]


def value_and_gradients(divergence, implementation=None, soft_cap=None, **options):
    options |= dict(divergence=get_divergence(divergence), vocab_size=VOCAB_SIZE)

    def loss(hidden_s, head_s, hidden_t, head_t, weights):
        models = hidden_s, Head(head_s, soft_cap), hidden_t, Head(head_t, soft_cap)
        return linear_divergence(*models, weights, implementation=implementation, **options)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def evaluation(*arrays):
    divergences = get_divergence("forward"), get_divergence("jsd")
    return per_token_divergences(*arrays[:4], divergences=divergences, vocab_size=VOCAB_SIZE)


def compiled_for(mesh, function, **sizes):
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes(mesh, **sizes)).compile()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
class TestOneChip:
    def test_value_and_gradients(self, topology):
        program = compiled_for(tpu_mesh(topology, 1, 1, 1), value_and_gradients("jsd"))
        assert num_kernels(program) == 3
        assert temporary_bytes(program) < 3.5 * GB

    def test_forward_only(self, topology):
        program = compiled_for(tpu_mesh(topology, 1, 1, 1), evaluation)
        assert num_kernels(program) == 2  # the forward KL needs the first sweep only
        assert temporary_bytes(program) < 3.5 * GB


# Of a chunk whose gradient is fused with its products, and of one whose gradient is stored.
@pytest.mark.parametrize("topology, width_s", [("v6e:2x2", WIDTH_S), ("v6e:2x2", 8192)])
def test_capped_logits(topology, width_s):
    function = value_and_gradients("jsd", soft_cap=30.0)
    program = compiled_for(tpu_mesh(topology, 1, 1, 1), function, width_s=width_s)
    assert num_kernels(program) == 3


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_fits_into_fast_memory_with_a_wide_teacher_and_many_blocks(topology):
    function = value_and_gradients("jsd", temperature=2.0, chunk=2048)
    program = compiled_for(tpu_mesh(topology, 1, 1, 1), function, width_t=8192)
    assert num_kernels(program) == 3


@pytest.mark.parametrize("divergence", benchmark.DIVERGENCES)
def test_estimated_time_is_at_most_that_of_all_logits_at_once(divergence):
    """Where arithmetic is fastest relative to memory, whose traffic is what chunks add to."""
    mesh = tpu_mesh("v6e:2x2", 1, 1, 1)
    problem = dataclasses.replace(benchmark.TPU_PROBLEM, divergence=divergence)
    with jax.set_mesh(mesh):
        naive, ours = (
            harness.estimate(benchmark.value_and_gradients(problem, name), *shapes(mesh))
            for name in ("naive", "pallas")
        )
    assert 0.9 < ours.seconds / naive.seconds < 1.0  # far below 1, it would have missed a part
    assert ours.flops >= problem.product_flops


@pytest.mark.parametrize("width_s, chunk", [(3584, 1664), (8192, 1024)])
def test_chunks_fit_into_fast_memory_with_wide_students(width_s, chunk):
    """Unless the chunk gets too short: of the widest, the gradient is stored instead."""
    mesh = tpu_mesh("v6e:2x2", 1, 1, 1)
    hidden_s, head_s, hidden_t, head_t, _ = shapes(mesh, width_s=width_s)
    models = Projection(hidden_s, head_s), Projection(hidden_t, head_t)
    with jax.set_mesh(mesh):
        assert pallas_tpu.Sweeps().largest_chunk(*models, COLUMNS_S) == chunk
    program = compiled_for(mesh, value_and_gradients("forward"), width_s=width_s)
    assert num_kernels(program) == 2


def test_forward_kl_needs_two_sweeps_only():
    program = compiled_for(tpu_mesh("v6e:2x2", 1, 1, 1), value_and_gradients("forward"))
    assert num_kernels(program) == 2


@pytest.mark.parametrize("closed, kernels", [(True, 2), (False, 3)])
def test_sums_of_terms_need_no_more_sweeps(closed, kernels):
    """Weights from both models' statistics, the entropy among them, cost none either."""

    def certain(statistics, columns):
        return jnp.exp(-statistics.teacher_entropy) * statistics.forward_kl

    certain.teacher_entropy = True
    divergence = DivergenceTerm(get_divergence("forward" if closed else "jsd"))
    terms = Term(divergence), Term(cross_entropy, 0.1, lambda _, columns: columns["advantage"])

    def loss(hidden_s, head_s, hidden_t, head_t, weights):
        rows = hidden_s, head_s, hidden_t, head_t, weights
        options = dict(columns={"advantage": weights}, vocab_size=VOCAB_SIZE)
        return linear_loss(TermSum(terms, 2.0, (certain,)), *rows, **options)

    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    program = compiled_for(tpu_mesh("v6e:2x2", 1, 1, 1), function)
    assert num_kernels(program) == kernels
    assert temporary_bytes(program) < 3.5 * GB


def test_without_chunks_it_needs_four_times_that_memory():
    mesh = tpu_mesh("v5p:2x2x1", 1, 1, 1)  # of the three the one where it fits
    program = compiled_for(mesh, value_and_gradients("jsd", "reference"))
    assert temporary_bytes(program) > 14 * GB


def test_sharded():
    mesh = tpu_mesh("v5p:2x2x2", 2, 2, 2)
    program = compiled_for(mesh, value_and_gradients("jsd"))
    assert num_kernels(program) == 3
    assert temporary_bytes(program) < 4 * GB  # 1 GB of it are the two heads, gathered
