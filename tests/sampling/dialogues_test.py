"""Dialogues in the engine's slots against dialogues as they are defined: a forward pass a token."""

import numpy as np
import pytest
from simple_decode import simple_decode
from tiny_models import model_config, random_model

from distill.models.facts import Recurrent
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

VOCAB, PAD, ENDS = 29, 0, (3, 4, 5, 6)
MAX_LENGTH, MOST_TURNS = 70, 4
MODELS = {
    "full": {},
    # A window's ring and a state must not remember what a slot computes while its row waits.
    "sliding": dict(pattern=("sliding", "full"), window=9),
    "recurrent": dict(
        pattern=("recurrent", "full"), recurrent=Recurrent(2, 4, 8, 8, taps=4), num_layers=2
    ),
}


class Others:
    """Says tokens that depend on what was said, ends among them; with `lag`, some after a while."""

    def __init__(self, lag=0):
        self.lag, self.turns, self.waiting, self.said = lag, {}, {}, []

    def ask(self, row, tokens_t):
        self.said.append((row, tokens_t.tolist()))
        self.turns[row] = self.turns.get(row, 0) + 1
        length = (int(tokens_t.sum()) + row) % 40
        tokens = None if self.turns[row] == MOST_TURNS or not length else np.arange(length) % VOCAB
        self.waiting[row] = [self.lag * (row % 3), tokens]

    def replies(self, wait):
        for reply in self.waiting.values():
            reply[0] = 0 if wait else reply[0] - 1
        ready = [row for row, (lag, _) in self.waiting.items() if lag <= 0]
        return [(row, self.waiting.pop(row)[1]) for row in sorted(ready)]


def make_request(turns) -> RolloutRequest:
    random = np.random.default_rng(0)
    sizes = [1, 5, 9, 20, 33]
    prompts = tuple(random.integers(7, VOCAB, size).astype(np.int32) for size in sizes)
    return RolloutRequest(
        prompts,
        np.arange(len(sizes)),
        SamplingParams(max_length=MAX_LENGTH),
        num_generations=3,
        max_lengths=random.integers(40, MAX_LENGTH + 1, 3 * len(sizes)).astype(np.int32),
        turns=turns,
    )


@pytest.mark.parametrize("lag", [0, 2], ids=["at_once", "late"])
@pytest.mark.parametrize("facts", MODELS.values(), ids=MODELS)
def test_same_dialogues_as_defined(facts, lag):
    graphdef, weights = random_model(model_config("qwen3", max_positions=256, **facts))
    ends = dict(eos_ids=ENDS, pad_id=PAD, vocab_size=VOCAB)
    engine = Engine(graphdef, EngineConfig(max_length=104, num_slots=6), **ends)
    others, as_defined = Others(lag), Others()
    rollout, _ = engine.generate(weights, make_request(others))
    expected = simple_decode(graphdef, weights, make_request(as_defined), **ends)
    for name in ("lengths_b", "stopped_b", "tokens_br"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name), name)
    for name in ("sampled", "weight"):
        np.testing.assert_array_equal(rollout.columns[name], expected.columns[name])
    np.testing.assert_allclose(rollout.log_probs_br, expected.log_probs_br, rtol=0, atol=2e-5)
    assert sorted(others.said) == sorted(as_defined.said)
    # Some end by the other side and some by their limit, after several turns; ends that are only
    # read end nothing.
    assert 0 < rollout.stopped_b.sum() < len(rollout.stopped_b)
    assert max(others.turns.values()) > 2
    read_br = ~rollout.columns["sampled"]
    assert np.isin(rollout.tokens_br[read_br], ENDS).any()
    assert rollout.num_sampled == rollout.lengths_b.sum() - read_br.sum()
