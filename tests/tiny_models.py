"""Models of toy size with random weights, for the tests that need no more."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.models.facts import ModelConfig
from distill.models.rope import Rope
from distill.models.transformer import Transformer


def model_config(family: str = "qwen2", **changes) -> ModelConfig:
    """Two narrow layers; with the biases or norms that tell the families apart."""
    facts = dict(
        family=family,
        vocab_size=32,
        num_layers=2,
        model_width=16,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        ffn_width=24,
        tied=True,
        qkv_bias=family == "qwen2",
        qk_norm="head" if family == "qwen3" else None,
        rms_eps=1e-6,
        rope=Rope(1e4),
        max_positions=64,
    )
    return ModelConfig(**(facts | changes))


def random_model(config: ModelConfig, *, seed: int = 0, std: float = 0.6, dtype=jnp.float32):
    """(graph, parameters) whose logits vary by about 1 and depend on the whole context.

    Parameters are float32, `dtype` is computed in.
    """
    options = {"dtype": dtype, "param_dtype": jnp.float32}
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))
    graph, abstract = nnx.split(shapes, nnx.Param)
    random = np.random.default_rng(seed)  # numpy compiles nothing
    return graph, jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, std, x.shape), x.dtype), abstract
    )


def num_programs(engine) -> int:
    """Programs that an engine has compiled so far."""
    slots = engine.slots
    made = slots.make_loop_weights, slots.prefill, slots._insert, slots._decode, slots._move
    return sum(program._cache_size() for program in made)


def num_bytes(tree) -> int:
    """Of all arrays, or of shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
