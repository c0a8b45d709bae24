"""What a sampler answers, as sequences."""

import numpy as np

from distill.data.sequences import Sequences
from distill.sampling.request import Rollout


def test_sequences_of_a_rollout():
    prompts = Sequences.of_tokens([[1, 2, 3], [4]], row=[7, 8])
    rollout = Rollout(
        tokens_br=np.array([[5, 6], [7, 8]]),
        lengths_b=np.array([1, 2]),
        log_probs_br=np.array([[-1, -2], [-3, -4]]),
        sampled_log_probs_br=np.zeros((2, 2)),
        stopped_b=np.array([True, False]),
        columns={"weight": np.array([[1, 1], [0, 1]]), "truncated": np.array([True, True])},
    )
    sequences = rollout.sequences(prompts)
    assert sequences["tokens"].tolist() == [1, 2, 3, 5, 4, 7, 8]
    assert sequences["log_prob"].tolist() == [0, 0, 0, -1, 0, -3, -4]
    assert sequences["sampled"].tolist() == [False] * 3 + [True, False, True, True]
    assert sequences["weight"].tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert sequences["row"].tolist() == [7, 8] and sequences["truncated"].all()
    other = rollout.sequences(sequences)["tokens"]  # in place of the responses that stand there
    assert other.tolist() == [1, 2, 3, 5, 4, 7, 7, 8]
