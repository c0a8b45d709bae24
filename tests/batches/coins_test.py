import math

import jax.numpy as jnp
import numpy as np

from distill.batches.coins import lambda_coin, sample_coins


def within_binomial_bounds(heads, tosses, probability):
    deviation = math.sqrt(tosses * probability * (1 - probability))
    return abs(heads - tosses * probability) <= 4 * deviation  # 6 in 100000 fail, for a fixed seed


class TestCoins:
    def test_frequency_over_steps(self):
        heads = sum(lambda_coin(0, step, 0.3) for step in range(200))
        assert within_binomial_bounds(heads, 200, 0.3)

    def test_frequency_over_prompts(self):
        coins_b = sample_coins(0, 7, jnp.arange(20_000), 0.7)
        assert within_binomial_bounds(int(coins_b.sum()), 20_000, 0.7)

    def test_certain_coins(self):
        assert all(lambda_coin(1, step, 1.0) is True for step in range(100))
        assert all(lambda_coin(1, step, 0.0) is False for step in range(100))
        assert sample_coins(1, 0, jnp.arange(20_000), 1.0).all()
        assert not sample_coins(1, 0, jnp.arange(20_000), 0.0).any()

    def test_a_function_of_seed_and_step(self):
        def tosses(seed):
            return [lambda_coin(seed, step, 0.5) for step in range(40)]

        assert tosses(3) == tosses(3)
        assert tosses(3) != tosses(4)

    def test_a_function_of_the_prompt_not_of_its_place_in_the_batch(self):
        coins_b = sample_coins(0, 5, jnp.arange(64), 0.5)
        np.testing.assert_array_equal(
            sample_coins(0, 5, jnp.arange(63, -1, -1), 0.5), coins_b[::-1]
        )
        assert (coins_b != sample_coins(0, 6, jnp.arange(64), 0.5)).any()
