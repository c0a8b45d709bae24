"""Weights that are gathered in stages: what TPUs send then, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import model_config
from tpu_compiler import needs_tpu_compiler

from distill.base import sharding
from distill.base.mesh import make_mesh
from distill.base.topology import described_tpu
from distill.models.transformer import Transformer
from distill.planning.collectives import sent_bytes


def make_model(config, remat="full", dtype="float32"):
    options = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype("float32"), remat=remat)
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options)))


def loss_of(graph):
    def loss(params, tokens_bt):
        return (nnx.merge(graph, params)(tokens_bt).astype(jnp.float32) ** 2).mean()

    return loss


@needs_tpu_compiler
def test_layers_on_a_cube_of_tpus_are_gathered_and_never_reduced():
    """XLA by itself: all-reduces of twice these bytes, of arrays filled with zeros."""
    config = model_config(
        "qwen3", num_layers=3, model_width=1024, num_heads=8, head_width=128, ffn_width=4096
    )
    graph, shapes = make_model(config, dtype="bfloat16")
    mesh = make_mesh(1, 64, devices=described_tpu("v5p:4x4x4"))
    layouts = sharding.param_shardings(shapes, mesh)
    params = jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes, layouts
    )
    layout = sharding.named_sharding(mesh, "batch", None)
    tokens_bt = jax.ShapeDtypeStruct((64, 128), jnp.int32, sharding=layout)
    once = 2 * sum(x.size for x in jax.tree.leaves(shapes.layers)) * 63 / 64
    for function, passes in (loss_of(graph), 1), (jax.grad(loss_of(graph)), 2):
        with jax.set_mesh(mesh):
            program = jax.jit(function).lower(params, tokens_bt).compile()
        sent = sent_bytes(program.as_text(), mesh.size)
        assert sent["all-gather"] == pytest.approx(passes * once, rel=0.03), sent
        if passes == 1:  # gradients are reduced
            assert sent.get("all-reduce", 0) < 0.1 * once, sent


@pytest.mark.parametrize(
    ("remat", "axes"),
    [("none", dict(fsdp=8)), ("dots", dict(fsdp=8)), ("full", dict(fsdp=4, tensor=2))],
)
def test_gradients_are_those_of_weights_that_are_not_gathered(remat, axes, monkeypatch):
    graph, shapes = make_model(model_config("qwen3", model_width=32), remat)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
    tokens_bt = random.integers(1, 32, (8, 12))

    def gradient():
        mesh = make_mesh(1, **axes)
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss_of(graph))).lower(placed, tokens_bt)
        return lowered.as_text().count("sharding_constraint"), lowered.compile()(placed, tokens_bt)

    constraints, expected = gradient()
    monkeypatch.setattr(sharding, "KINDS_OF_CUBES", ("cpu",))
    monkeypatch.setattr(sharding, "SMALLEST_CUBE", 4)
    more_constraints, actual = gradient()
    assert (more_constraints > constraints) == (remat != "none")
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
