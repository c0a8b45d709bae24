"""What the engine's responses are, against plain forward passes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_models import model_config, random_model

from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import Rollout, RolloutRequest

VOCAB = 29  # the head has three more rows
PAD = 0
PROMPT_SIZE, MAX_LENGTH, BATCH = 7, 12, 8
LOG_PROB_TOLERANCE = 2e-5  # float32: products of another shape reduce in another order


@functools.cache
def tiny_model():
    return random_model(model_config())


@jax.jit
def forward(tokens_bt):
    """Logits of the training form, which knows nothing of the cache."""
    model = nnx.merge(*tiny_model())
    return model.logits(model(tokens_bt))


def request(seed=0, **options) -> RolloutRequest:
    """Prompts of lengths 1 to PROMPT_SIZE."""
    random = np.random.default_rng(0)
    prompts = tuple(
        random.integers(1, VOCAB, i % PROMPT_SIZE + 1).astype(np.int32) for i in range(BATCH)
    )
    params = SamplingParams(**{"max_length": MAX_LENGTH, **options})
    return RolloutRequest(prompts, np.arange(BATCH), params, seed=seed)


@functools.cache
def engine(eos_ids=(), pad_id=PAD) -> Engine:
    sizes = EngineConfig(max_length=32, num_slots=BATCH)
    return Engine(tiny_model()[0], sizes, eos_ids=eos_ids, pad_id=pad_id, vocab_size=VOCAB)


def responses(asked: RolloutRequest, **options) -> Rollout:
    return engine(**options).generate(tiny_model()[1], asked)[0]


def test_log_probs_are_those_of_one_full_forward():
    asked = request(temperature=0.7, top_k=9)
    rollout = responses(asked)
    tokens_bt = np.zeros((BATCH, PROMPT_SIZE + MAX_LENGTH), np.int32)
    for row, prompt, tokens_r in zip(tokens_bt, asked.prompts, rollout.tokens_br, strict=True):
        row[: len(prompt) + MAX_LENGTH] = [*prompt, *tokens_r]
    logits_btv = forward(tokens_bt)[:, :, :VOCAB]
    log_probs_btv = jax.nn.log_softmax(logits_btv)
    cooled_btv = logits_btv / 0.7
    kept_btv = cooled_btv >= jnp.sort(cooled_btv)[:, :, -9:][:, :, :1]
    sampled_btv = jax.nn.log_softmax(jnp.where(kept_btv, cooled_btv, -jnp.inf))
    for row, prompt in enumerate(asked.prompts):
        before = np.arange(MAX_LENGTH) + len(prompt) - 1
        tokens_r = rollout.tokens_br[row]
        for actual, expected_btv in (
            (rollout.log_probs_br, log_probs_btv),
            (rollout.sampled_log_probs_br, sampled_btv),
        ):
            expected_r = expected_btv[row, before, tokens_r]
            np.testing.assert_allclose(actual[row], expected_r, atol=LOG_PROB_TOLERANCE)


def test_other_keys_give_other_tokens():
    first, second = (responses(request(seed)) for seed in (0, 1))
    assert (first.tokens_br != second.tokens_br).mean() > 0.5


def test_any_eos_ends_a_row_and_nothing_else_does():
    """Against the same request without an EOS; the second EOS is also the padding."""
    endless = responses(request())
    assert endless.lengths_b.tolist() == [MAX_LENGTH] * BATCH
    assert not endless.stopped_b.any()
    eos_ids = telling_eos_ids(endless.tokens_br)
    rollout = responses(request(), eos_ids=eos_ids, pad_id=eos_ids[1])
    lengths_b, stopped_b = end_lengths(endless.tokens_br, eos_ids)
    assert rollout.lengths_b.tolist() == lengths_b.tolist()
    assert rollout.stopped_b.tolist() == stopped_b.tolist()
    inside_br = np.arange(MAX_LENGTH) < lengths_b[:, None]
    for name, padding in dict(tokens_br=eos_ids[1], log_probs_br=0, sampled_log_probs_br=0).items():
        expected_br = np.where(inside_br, getattr(endless, name), padding)
        actual_br = getattr(rollout, name)
        np.testing.assert_allclose(actual_br, expected_br, rtol=0, atol=LOG_PROB_TOLERANCE)


def test_prefill_never_holds_logits_of_all_positions():
    graph, params = random_model(model_config(vocab_size=44))  # a width that nothing else has
    shapes, sizes = jax.eval_shape(lambda: params), EngineConfig(max_length=32, num_slots=BATCH)
    made = Engine(graph, sizes, eos_ids=(), pad_id=PAD, vocab_size=44)
    program = made.slots.lower_prefill(shapes, (1, BATCH, 16)).as_text()
    assert f"{BATCH}x1x44xf32" in program
    assert f"{BATCH}x16x44xf32" not in program and f"{BATCH * 16}x44xf32" not in program


def end_lengths(tokens_br, eos_ids):
    """Length up to and with the first EOS, and whether there is one."""
    is_eos_br = np.isin(tokens_br, eos_ids)
    stopped_b = is_eos_br.any(axis=1)
    return np.where(stopped_b, is_eos_br.argmax(axis=1) + 1, tokens_br.shape[1]), stopped_b


def telling_eos_ids(tokens_br):
    """Two ids that both end rows: one row at its last position, and some row not at all."""

    def telling(pair):
        lengths_b, stopped_b = end_lengths(tokens_br, pair)
        enders = set(tokens_br[np.arange(BATCH), lengths_b - 1][stopped_b])
        return len(enders) == 2 and not stopped_b.all() and MAX_LENGTH in lengths_b[stopped_b]

    return next(filter(telling, itertools.permutations(range(VOCAB), 2)))
