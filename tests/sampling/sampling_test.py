"""What the sampler's responses become."""

import jax
import jax.numpy as jnp
import numpy as np

from distill.sampling.request import Rollout, to_sequences


class TestToSequences:
    def test_layout(self):
        prompts_bp = np.array([[1, 2, 3], [4, 9, 9]], np.int32)  # 9: stale ids in the padding
        rollout = Rollout(
            tokens_br=jnp.array([[5, 6], [7, 8]], jnp.int32),
            lengths_b=jnp.array([1, 2]),
            log_probs_br=jnp.zeros((2, 2)),
            sampled_log_probs_br=jnp.zeros((2, 2)),
            stopped_b=jnp.array([True, False]),
        )
        join = jax.jit(to_sequences, static_argnums=3)
        tokens_bt, lengths_b = join(prompts_bp, np.array([3, 1]), rollout, 0)
        assert tokens_bt.tolist() == [[1, 2, 3, 5, 0], [4, 7, 8, 0, 0]]
        assert lengths_b.tolist() == [4, 3]
