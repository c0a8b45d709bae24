"""The decode loop against plain forward passes and against itself in other company."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_models import model_config, random_model

from distill.base.sharding import make_mesh, named_sharding
from distill.sampling.choice import SamplingParams, row_keys
from distill.sampling.decode import decode, make_generate
from distill.sampling.request import Rollout, to_sequences

VOCAB = 29  # the head has three more rows
PAD = 0
PROMPT_SIZE, MAX_LENGTH, BATCH = 7, 12, 8
LOG_PROB_TOLERANCE = 2e-5  # float32: products of another shape reduce in another order

CONFIG = model_config()


@functools.cache
def tiny_model():
    return random_model(CONFIG)


@jax.jit
def forward(tokens_bt):
    """Logits of the training form, which knows nothing of the cache."""
    model = nnx.merge(*tiny_model())
    return model.logits(model(tokens_bt))


def requests(seed=0):
    """Ragged prompts, lengths 1 to PROMPT_SIZE, and one key per row."""
    random = np.random.default_rng(seed)
    lengths_b = np.arange(BATCH, dtype=np.int32) % PROMPT_SIZE + 1
    prompts_bp = random.integers(1, VOCAB, (BATCH, PROMPT_SIZE)).astype(np.int32)
    prompts_bp[np.arange(PROMPT_SIZE) >= lengths_b[:, None]] = PAD
    return prompts_bp, lengths_b, row_keys(seed, 0, np.arange(BATCH), np.zeros(BATCH, np.int64))


@functools.cache
def generator(eos_ids=(), pad_id=PAD, **options):
    return make_generate(
        tiny_model()[0],
        SamplingParams(**{"max_length": MAX_LENGTH, **options}),
        eos_ids=eos_ids,
        pad_id=pad_id,
        vocab_size=VOCAB,
    )


def assert_same_rollout(actual: Rollout, expected: Rollout):
    """Integers equal, log-probabilities to float tolerance."""
    for field in dataclasses.fields(Rollout):
        x, y = getattr(actual, field.name), getattr(expected, field.name)
        tolerance = LOG_PROB_TOLERANCE if x.dtype == jnp.float32 else 0
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=field.name)


def pick_rows(rollout: Rollout, rows) -> Rollout:
    return jax.tree.map(lambda x: x[rows], rollout)


class TestGenerate:
    def run(self, **options) -> Rollout:
        return generator(**options)(tiny_model()[1], *requests())

    def test_greedy_is_an_argmax_loop_over_full_forwards(self):
        rollout = self.run(greedy=True)
        prompts_bp, lengths_b, _ = requests()
        tokens_bt = np.pad(prompts_bp, ((0, 0), (0, MAX_LENGTH)))
        rows = np.arange(BATCH)
        for end_b in lengths_b + np.arange(MAX_LENGTH)[:, None]:
            logits_bv = forward(tokens_bt)[rows, end_b - 1, :VOCAB]
            tokens_bt[rows, end_b] = logits_bv.argmax(axis=-1)
        sequences_bt, _ = to_sequences(prompts_bp, lengths_b, rollout, PAD)
        np.testing.assert_array_equal(sequences_bt, tokens_bt)
        assert len(np.unique(rollout.tokens_br)) > 3

    def test_log_probs_are_those_of_one_full_forward(self):
        prompts_bp, lengths_b, _ = requests()
        rollout = self.run(temperature=0.7, top_k=9)
        tokens_bt, _ = to_sequences(prompts_bp, lengths_b, rollout, PAD)
        logits_btv = forward(tokens_bt)[:, :, :VOCAB]
        log_probs_btv = jax.nn.log_softmax(logits_btv)
        cooled_btv = logits_btv / 0.7
        kept_btv = cooled_btv >= jnp.sort(cooled_btv)[:, :, -9:][:, :, :1]
        sampled_btv = jax.nn.log_softmax(jnp.where(kept_btv, cooled_btv, -jnp.inf))
        for row in range(BATCH):
            before = np.arange(MAX_LENGTH) + lengths_b[row] - 1
            tokens_r = rollout.tokens_br[row]
            for actual, expected_btv in (
                (rollout.log_probs_br, log_probs_btv),
                (rollout.sampled_log_probs_br, sampled_btv),
            ):
                expected_r = expected_btv[row, before, tokens_r]
                np.testing.assert_allclose(actual[row], expected_r, atol=LOG_PROB_TOLERANCE)

    def test_a_request_alone_and_unpadded_gives_the_same_tokens(self):
        row = 2
        prompts_bp, lengths_b, keys_b = (x[row : row + 1] for x in requests())
        alone = generator()(tiny_model()[1], prompts_bp[:, : lengths_b[0]], lengths_b, keys_b)
        assert_same_rollout(alone, pick_rows(self.run(), slice(row, row + 1)))

    def test_row_order_does_not_matter(self):
        order = np.array([4, 0, 5, 7, 2, 1, 6, 3])
        shuffled = generator()(tiny_model()[1], *(x[order] for x in requests()))
        assert_same_rollout(shuffled, pick_rows(self.run(), order))

    def test_other_keys_give_other_tokens(self):
        prompts_bp, lengths_b, _ = requests()
        again = generator()(tiny_model()[1], prompts_bp, lengths_b, requests(seed=1)[2])
        assert (again.tokens_br != self.run().tokens_br).mean() > 0.5

    def test_any_eos_ends_a_row_and_nothing_else_does(self):
        """Against the same requests without an EOS; the second EOS is also the padding."""
        endless = self.run()
        assert endless.lengths_b.tolist() == [MAX_LENGTH] * BATCH
        assert not endless.stopped_b.any()
        eos_ids = telling_eos_ids(np.asarray(endless.tokens_br))
        rollout = self.run(eos_ids=eos_ids, pad_id=eos_ids[1])
        assert rollout.lengths_b.tolist() == end_lengths(endless.tokens_br, eos_ids)[0].tolist()
        assert rollout.stopped_b.tolist() == end_lengths(endless.tokens_br, eos_ids)[1].tolist()
        inside_br = np.arange(MAX_LENGTH) < rollout.lengths_b[:, None]
        assert_same_rollout(
            rollout,
            dataclasses.replace(
                rollout,
                tokens_br=jnp.where(inside_br, endless.tokens_br, eos_ids[1]),
                log_probs_br=jnp.where(inside_br, endless.log_probs_br, 0),
                sampled_log_probs_br=jnp.where(inside_br, endless.sampled_log_probs_br, 0),
            ),
        )

    def test_loop_ends_with_the_last_row(self):
        eos_ids = tuple(range(0, VOCAB, 2))  # half of the vocabulary: every row stops soon
        state = jax.jit(
            lambda *args: decode(
                nnx.merge(*tiny_model()),
                *args,
                SamplingParams(max_length=500),
                eos_ids=eos_ids,
                pad_id=PAD,
                vocab_size=VOCAB,
            )
        )(*requests())
        assert state.rollout.stopped_b.all()
        assert state.position == state.rollout.lengths_b.max() < 30

    def test_compiles_once_per_prompt_shape(self):
        generate = generator(greedy=True)
        for seed in range(3):
            generate(tiny_model()[1], *requests(seed=seed))
        assert generate._cache_size() == 1

    def test_sharded_batch_gives_the_same_rollout(self):
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        with jax.set_mesh(mesh):
            arguments = jax.device_put(requests(), named_sharding(mesh, "batch"))
            sharded = generator()(tiny_model()[1], *arguments)
        assert_same_rollout(sharded, self.run())

    def test_prefill_never_holds_logits_of_all_positions(self):
        program = generator().lower(tiny_model()[1], *requests()).as_text()
        assert f"{BATCH}x1x32xf32" in program
        assert f"{BATCH}x{PROMPT_SIZE}x32xf32" not in program

    def test_cache_is_updated_in_place(self):
        """Inside its loops the compiled program copies nothing of the cache's shape."""
        program = generator().lower(tiny_model()[1], *requests()).compile().as_text()
        size = PROMPT_SIZE + MAX_LENGTH
        cache = f"f32[{CONFIG.num_layers},{BATCH},{size},{CONFIG.num_kv_heads},8]"
        loops, _ = program.split("\nENTRY ")
        assert cache in loops
        assert not [x for x in loops.splitlines() if f"= {cache}" in x and " copy(" in x]


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
