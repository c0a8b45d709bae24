"""Token choice against exact distributions; the decode loop against plain forward passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from distill.errors import UserError
from distill.models.config import ModelConfig
from distill.models.transformer import Transformer
from distill.sampling.choice import SamplingParams, choose, row_keys
from distill.sampling.decode import Rollout, decode, make_generate, to_sequences
from distill.sharding import make_mesh, named_sharding

VOCAB = 29  # the head has three more rows
EOS, OTHER_EOS, PAD = 5, 11, 0
PROMPT_SIZE, MAX_LENGTH, BATCH = 7, 12, 6
LOG_PROB_TOLERANCE = 2e-5  # float32: products of another shape reduce in another order

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=32,
    num_layers=2,
    model_width=16,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=32,
    tied=True,
    qkv_bias=True,
    qk_norm=False,
    rms_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=64,
)

TRUNCATIONS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "top_k_and_top_p": {"top_k": 5, "top_p": 0.7},
    "combined": {"temperature": 1.5, "top_k": 7, "top_p": 0.85, "min_p": 0.3},
}
each_truncation = pytest.mark.parametrize("options", TRUNCATIONS.values(), ids=TRUNCATIONS.keys())


@functools.cache
def tiny_model():
    """A random model whose logits vary by about 1 and depend on the whole context."""
    model = Transformer(CONFIG, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), params)  # but norms


@jax.jit
def forward(tokens_bt):
    """Logits of the training form, which knows nothing of the cache."""
    model = nnx.merge(*tiny_model())
    return model.logits(model(tokens_bt))


def requests(batch=BATCH, seed=0):
    """Ragged prompts, lengths 1 to PROMPT_SIZE, and one key per row."""
    random = np.random.default_rng(seed)
    lengths_b = np.arange(batch, dtype=np.int32) % PROMPT_SIZE + 1
    prompts_bp = random.integers(1, VOCAB, (batch, PROMPT_SIZE)).astype(np.int32)
    prompts_bp[np.arange(PROMPT_SIZE) >= lengths_b[:, None]] = PAD
    return prompts_bp, lengths_b, row_keys(seed, 0, np.arange(batch), np.zeros(batch, np.int64))


@functools.cache
def generator(eos_ids=(), pad_id=PAD, **options):
    return make_generate(
        tiny_model()[0],
        SamplingParams(**{"max_length": MAX_LENGTH, **options}),
        eos_ids=eos_ids,
        pad_id=pad_id,
        vocab_size=VOCAB,
        dtype=jnp.float32,
    )


def assert_same_rollout(actual: Rollout, expected: Rollout):
    """Integers equal, log-probabilities to float tolerance."""
    for field in dataclasses.fields(Rollout):
        x, y = getattr(actual, field.name), getattr(expected, field.name)
        tolerance = LOG_PROB_TOLERANCE if x.dtype == jnp.float32 else 0
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=field.name)


def pick_rows(rollout: Rollout, rows) -> Rollout:
    return jax.tree.map(lambda x: x[rows], rollout)


def reference_distribution(logits_v, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution after all warpers, in float64, one token at a time."""

    def renormalised(ids):
        weight_v = np.zeros_like(logits_v, np.float64)
        weight_v[ids] = np.exp(logits_v[ids].astype(np.float64) / temperature)
        return weight_v / weight_v.sum()

    ids = sorted(range(len(logits_v)), key=lambda i: -logits_v[i])
    ids = ids[:top_k] if top_k else ids
    prob_v, kept, total = renormalised(ids), [], 0.0
    for i in ids:
        if total < top_p:
            kept.append(i)
            total += prob_v[i]
    prob_v = renormalised(kept)
    return renormalised([i for i in kept if prob_v[i] >= min_p * prob_v.max()])


class TestSamplingParams:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("max_length", 0),
            ("max_length", 2.5),
            ("max_length", True),
            ("greedy", 1),
            ("temperature", 0.0),
            ("temperature", -1.0),
            ("temperature", float("inf")),
            ("temperature", float("nan")),
            ("top_k", -1),
            ("top_k", 1.5),
            ("top_p", 0.0),
            ("top_p", 1.01),
            ("top_p", float("nan")),
            ("min_p", -0.1),
            ("min_p", 1.1),
        ],
    )
    def test_impossible_value_is_named_with_what_is_allowed(self, name, value):
        with pytest.raises(UserError) as error:
            SamplingParams(**{"max_length": 4, name: value})
        assert f"{name}={value!r}: must be " in str(error.value)
        assert "\n" not in str(error.value)

    def test_extremes_are_allowed(self):
        SamplingParams(max_length=1, temperature=1e-6, top_k=10**6, top_p=1e-9, min_p=1.0)


class TestRowKeys:
    def test_every_index_matters(self):
        base = (0, 0, np.array([0]), np.array([0]))
        changed = [tuple(x + (i == j) for j, x in enumerate(base)) for i in range(4)]
        keys = [
            tuple(jax.random.key_data(row_keys(*args))[0].tolist()) for args in [base, *changed]
        ]
        assert len(set(keys)) == 5

    def test_row_and_batch_do_not_matter(self):
        together = row_keys(3, 7, np.array([4, 9, 4]), np.array([1, 0, 2]))
        alone = row_keys(3, 7, np.array([9]), np.array([0]))
        assert jax.random.key_data(together)[1].tolist() == jax.random.key_data(alone)[0].tolist()

    def test_wide_integers_and_traced_ones_agree(self):
        wide = row_keys(2**40 + 1, 2**33, np.array([2**31 + 5]), np.array([2**32 + 2]))
        traced = jax.jit(row_keys)(1, 0, jnp.uint32([2**31 + 5]), jnp.uint32([2]))
        assert jax.random.key_data(wide).tolist() == jax.random.key_data(traced).tolist()


DRAWS = 20_000
LOGITS_V = np.random.default_rng(1).normal(0, 1.5, 12).astype(np.float32)


def draw(**options):
    """Tokens and log-probabilities of DRAWS independent choices from LOGITS_V."""
    keys_b = jax.random.split(jax.random.key(0), DRAWS)
    params = SamplingParams(max_length=1, **options)
    return [np.asarray(x) for x in choose(jnp.tile(LOGITS_V, (DRAWS, 1)), keys_b, params, 12)]


def p_value(tokens_b, prob_v):
    """Chi-square test of the tokens' frequencies."""
    support = prob_v > 0
    counts_v = np.bincount(tokens_b, minlength=12)
    return scipy.stats.chisquare(counts_v[support], prob_v[support] * DRAWS).pvalue


class TestChoose:
    @each_truncation
    def test_frequencies_follow_the_exact_distribution(self, options):
        tokens_b = draw(**options)[0]
        prob_v = reference_distribution(LOGITS_V, **options)
        assert set(tokens_b) == set(np.flatnonzero(prob_v))
        assert p_value(tokens_b, prob_v) > 1e-3

    def test_frequencies_betray_a_wrong_temperature(self):
        wrong_v = reference_distribution(LOGITS_V, temperature=1.1)
        assert p_value(draw()[0], wrong_v) < 1e-6

    @each_truncation
    def test_both_log_probs(self, options):
        tokens_b, log_probs_b, sampled_log_probs_b = draw(**options)
        own_v = np.log(reference_distribution(LOGITS_V))
        sampled_v = np.log(np.maximum(reference_distribution(LOGITS_V, **options), 1e-30))
        np.testing.assert_allclose(log_probs_b, own_v[tokens_b], atol=2e-6)
        np.testing.assert_allclose(sampled_log_probs_b, sampled_v[tokens_b], atol=2e-6)

    @each_truncation
    def test_support_is_that_of_transformers(self, options):
        torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
        from transformers.generation import logits_process as warpers

        scores = torch.tensor(np.random.default_rng(2).normal(0, 2, (5, 40)), dtype=torch.float32)
        tokens_rb, *_ = jax.vmap(
            lambda key: choose(
                jnp.asarray(scores.numpy()),
                jax.random.split(key, 5),
                SamplingParams(1, **{"temperature": 1.0, **options}),
                40,
            )
        )(jax.random.split(jax.random.key(1), 4000))
        for name, warper in (
            ("temperature", warpers.TemperatureLogitsWarper),
            ("top_k", warpers.TopKLogitsWarper),
            ("top_p", warpers.TopPLogitsWarper),
            ("min_p", warpers.MinPLogitsWarper),
        ):
            scores = warper(options[name])(None, scores) if name in options else scores
        prob_bv = torch.softmax(scores, -1).numpy()
        for row in range(5):
            drawn = set(np.unique(tokens_rb[:, row]))
            assert drawn <= set(np.flatnonzero(prob_bv[row]))
            assert drawn >= set(np.flatnonzero(prob_bv[row] > 5e-3))

    def test_tiny_top_p_and_full_min_p_keep_the_likeliest(self):
        for options in ({"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}):
            assert set(draw(**options)[0]) == {int(LOGITS_V.argmax())}

    def test_top_p_splits_ties_into_the_smallest_set(self):
        keys_b = jax.random.split(jax.random.key(0), 500)
        params = SamplingParams(max_length=1, top_p=0.5)
        tokens_b, _, sampled_b = choose(jnp.zeros((500, 8)), keys_b, params, 8)
        assert set(np.asarray(tokens_b)) == {0, 1, 2, 3}
        np.testing.assert_allclose(sampled_b, np.log(1 / 4), atol=1e-6)

    @each_truncation
    def test_padded_ids_are_never_chosen_and_carry_no_probability(self, options):
        padded_v = np.concatenate([LOGITS_V, [50.0, 60.0]]).astype(np.float32)
        keys_b = jax.random.split(jax.random.key(0), 300)
        params = SamplingParams(max_length=1, **options)
        padded = choose(jnp.tile(padded_v, (300, 1)), keys_b, params, 12)
        exact_v = np.log(reference_distribution(LOGITS_V))
        assert padded[0].max() < 12
        np.testing.assert_allclose(padded[1], exact_v[padded[0]], atol=2e-6)
        assert np.isfinite(padded[2]).all()

    def test_greedy_takes_the_maximum_for_certain(self):
        logits_bv = jnp.array([[0.0, 3.0, 1.0, 9.0], [2.0, -1.0, 0.0, 9.0]])
        tokens_b, log_probs_b, sampled_log_probs_b = choose(
            logits_bv, None, SamplingParams(max_length=1, greedy=True, temperature=5.0), 3
        )
        assert tokens_b.tolist() == [1, 0]
        expected_b = [
            np.log(reference_distribution(np.array(x[:3])))[i]
            for x, i in zip(logits_bv, (1, 0), strict=True)
        ]
        np.testing.assert_allclose(log_probs_b, expected_b, atol=1e-6)
        assert sampled_log_probs_b.tolist() == [0, 0]

    def test_a_sort_is_paid_for_only_by_top_p(self):
        def primitives(**options):
            params = SamplingParams(max_length=1, **options)
            program = str(
                jax.make_jaxpr(lambda x, k: choose(x, k, params, 12))(
                    jnp.zeros((2, 12)), jax.random.split(jax.random.key(0), 2)
                )
            )
            return "sort[" in program, "top_k[" in program

        assert primitives() == primitives(temperature=2.0, min_p=0.1) == (False, False)
        assert primitives(top_k=3) == (False, True)
        assert primitives(top_p=0.9) == (True, False)


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

    def test_each_request_alone_gives_the_same_tokens(self):
        """Neither company, padding nor row count matters: each row again, unpadded, by itself."""
        together = self.run(eos_ids=(EOS, OTHER_EOS))
        prompts_bp, lengths_b, keys_b = requests()
        generate = generator(eos_ids=(EOS, OTHER_EOS))
        for row in (0, 3, 6 % BATCH):
            one = slice(row, row + 1)
            alone = generate(
                tiny_model()[1], prompts_bp[one, : lengths_b[row]], lengths_b[one], keys_b[one]
            )
            assert_same_rollout(alone, pick_rows(together, one))

    def test_row_order_does_not_matter(self):
        order = np.array([4, 0, 5, 2, 1, 3])
        shuffled = generator()(tiny_model()[1], *(x[order] for x in requests()))
        assert_same_rollout(shuffled, pick_rows(self.run(), order))

    def test_other_keys_give_other_tokens(self):
        prompts_bp, lengths_b, _ = requests()
        again = generator()(tiny_model()[1], prompts_bp, lengths_b, requests(seed=1)[2])
        assert (again.tokens_br != self.run().tokens_br).mean() > 0.5

    @pytest.mark.parametrize("pad_id", [PAD, EOS], ids=["pad", "pad_is_eos"])
    def test_any_eos_ends_a_row_and_nothing_else_does(self, pad_id):
        endless = self.run()
        assert endless.lengths_b.tolist() == [MAX_LENGTH] * BATCH
        assert not endless.stopped_b.any()
        # ids that these rows do emit; the last row must be left running
        eos_ids = (int(endless.tokens_br[0, 4]), int(endless.tokens_br[1, 0]))
        rollout = self.run(eos_ids=eos_ids, pad_id=pad_id)
        ends = [np.flatnonzero(np.isin(row, eos_ids)) for row in endless.tokens_br]
        for row, end in enumerate(ends):
            length = end[0] + 1 if len(end) else MAX_LENGTH
            assert rollout.lengths_b[row] == length
            assert rollout.stopped_b[row] == (len(end) > 0)
            for name, fill in (
                ("tokens_br", pad_id),
                ("log_probs_br", 0),
                ("sampled_log_probs_br", 0),
            ):
                actual, unended = getattr(rollout, name)[row], getattr(endless, name)[row]
                np.testing.assert_allclose(
                    actual[:length], unended[:length], atol=LOG_PROB_TOLERANCE
                )
                assert (actual[length:] == fill).all()
        used = {int(endless.tokens_br[row, end[0]]) for row, end in enumerate(ends) if len(end)}
        assert used == set(eos_ids) and not rollout.stopped_b.all()

    def test_an_eos_in_the_last_position_counts_as_stopped(self):
        endless = self.run(max_length=1)
        rollout = self.run(max_length=1, eos_ids=(int(endless.tokens_br[0, 0]),))
        assert rollout.stopped_b[0] and rollout.lengths_b[0] == 1

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
                dtype=jnp.float32,
            )
        )(*requests())
        assert state.rollout.stopped_b.all()
        assert state.position == state.rollout.lengths_b.max() < 30

    def test_compiles_once_per_prompt_shape(self):
        generate = generator(max_length=2)
        for seed in range(3):
            generate(tiny_model()[1], *requests(seed=seed))
        assert generate._cache_size() == 1
        generate(tiny_model()[1], *requests(batch=2))
        assert generate._cache_size() == 2

    def test_sharded_batch_gives_the_same_rollout(self):
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        arguments = requests(batch=8)
        alone = generator()(tiny_model()[1], *arguments)
        with jax.set_mesh(mesh):
            rows = named_sharding(mesh, "batch")
            sharded = generator()(tiny_model()[1], *jax.device_put(arguments, rows))
        assert_same_rollout(sharded, alone)

    def test_prefill_never_holds_logits_of_all_positions(self):
        program = generator().lower(tiny_model()[1], *requests()).as_text()
        assert f"{BATCH}x1x32xf32" in program
        assert f"{BATCH}x{PROMPT_SIZE}x32xf32" not in program.replace(  # the ffn is 32 wide too
            f"{BATCH}x{PROMPT_SIZE}x{CONFIG.ffn_width}xf32", ""
        )

    def test_cache_is_updated_in_place(self):
        """Inside the loop the compiled program copies nothing of the cache's shape."""
        program = generator().lower(tiny_model()[1], *requests()).compile().as_text()
        size = PROMPT_SIZE + MAX_LENGTH
        cache = f"f32[{CONFIG.num_layers},{BATCH},{size},{CONFIG.num_kv_heads},8]"
        copies = [x for x in program.splitlines() if f"= {cache}" in x and " copy(" in x]
        assert cache in program
        assert not [x for x in copies if "while/body" in x]
        assert len(copies) <= 2  # the zeros that keys and values start from


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
