"""Which responses a step is trained on: the student's own, or the data's."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

# Folded into the seed first, so that the coins share no random numbers with the sampler.
_COIN_STREAM = 0x636F696E


def lambda_coin(seed: int, step: int, lambda_: float) -> bool:
    """Whether this step trains on student-generated responses, with probability lambda_.

    A function of (seed, step) alone: the same on every host and after a resume.
    """
    if lambda_ in (0, 1):
        return bool(lambda_)  # a toss would make the host wait for the device's queue every step
    return bool(jax.random.uniform(_coin_key(seed, step)) < lambda_)


def sample_coins(seed: int, step: int, prompt_index_b: ArrayLike, lambda_: float) -> jax.Array:
    """One coin per prompt, bool (b,): a function of (seed, step, prompt index) alone."""
    keys_b = jax.vmap(jax.random.fold_in, (None, 0))(_coin_key(seed, step), prompt_index_b)
    return jax.vmap(jax.random.uniform)(keys_b) < lambda_


def _coin_key(seed: int, step: int) -> jax.Array:
    # threefry by name: a flag may change the default generator, a resumed run must not notice.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, _COIN_STREAM), step)
