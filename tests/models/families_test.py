"""Imaginary families and a hybrid one, each a row of the table, against a slow definition."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from simple_decode import simple_decode
from tiny_models import random_model

from benchmarks.hf_config import hf_config_dict
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.sharding import HOST_MEMORY, SAMPLER_RULES, in_host_memory, param_shardings
from distill.data.tokenizer import character_tokenizer
from distill.models import decoding
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.keys import key_table, mapped_params
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.models.families import FAMILIES, Family
from distill.models.transformer import Transformer
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

VOCAB, LENGTH, TOLERANCE = 32, 24, 1e-4

ROWS = {
    # Of the facts, what Gemma 2 leaves out.
    "patchwork": Family(
        "PatchworkForCausalLM",
        {
            "norms": "after",
            "qk_norm": "all",
            "sinks": True,
            "pattern": ("sliding",) * 2 + ("unrotated",),
        }
        | {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        fields=("hidden_act", "sliding_window", "rope_local_base_freq", "partial_rotary_factor")
        + ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
        keys={"layers/gate_proj": "model.layers.{layer}.mlp.w1.weight"},
    ),
}
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=5,  # no multiple of a period
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=64,
)
CONFIGS = {
    "gemma2": SIZES
    | dict(
        model_type="gemma2",
        tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    ),
    "patchwork": SIZES
    | dict(
        model_type="patchwork",
        hidden_act="gelu",
        sliding_window=5,
        rope_local_base_freq=100.0,
        partial_rotary_factor=0.5,
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=0.25,
    ),
    "qwen3_5_moe_text": SIZES
    | dict(
        model_type="qwen3_5_moe_text",
        tie_word_embeddings=True,
        partial_rotary_factor=0.5,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=4,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        for name, row in ROWS.items():
            patch.setitem(FAMILIES, name, row)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """(config, graph, parameters), every parameter away from where it has no effect."""
    config = ModelConfig.from_hf(CONFIGS[request.param], "here/config.json")
    return config, *random_model(config, std=0.4)


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, shape)


# -------------------------------------------------------------------------------- the definition


def defined_logits(config: ModelConfig, params, tokens_t):
    """logits_tv of one row in float64, token by token and head by head."""
    params = {"/".join(path): np.float64(value[...]) for path, value in nnx.to_flat_state(params)}
    x_td = params["embedding"][tokens_t] * config.embedding_scale
    for kind, number in config.places:
        prefix = f"layers/{kind}/"
        own = {path: x for path, x in params.items() if path.startswith(prefix)}
        w = {path.removeprefix(prefix): x[number] for path, x in own.items()}

        def normed(name, x_td, w=w):
            return norm(config, x_td, w[name]) if name in w else x_td

        y_td = normed("attention_norm", x_td)
        y_td = recur(config, y_td, w) if kind == "recurrent" else attend(config, y_td, w, kind)
        x_td = x_td + config.residual_scale * normed("attention_out_norm", y_td)
        feed = mix if config.kinds[kind].experts else feed_forward
        y_td = feed(config, normed("ffn_norm", x_td), w)
        x_td = x_td + config.residual_scale * normed("ffn_out_norm", y_td)
    head_dv = params["embedding"].T if config.tied else params["output_head"]
    logits_tv = config.logit_scale * norm(config, x_td, params["final_norm"]) @ head_dv
    cap = config.logit_soft_cap
    return cap * np.tanh(logits_tv / cap) if cap else logits_tv


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(config, x, scale):
    scale = scale + config.norm_offset
    over = tuple(range(-scale.ndim, 0))
    return x / np.sqrt((x**2).mean(axis=over, keepdims=True) + config.rms_eps) * scale


def turned(config, x_h, position, kind):
    if kind == "unrotated":
        return x_h
    rope = (kind == "sliding" and config.sliding_rope) or config.rope
    half, theta = int(len(x_h) * rope.fraction) // 2, rope.theta
    pairs = x_h[:half] + 1j * x_h[half : 2 * half]
    pairs = pairs * np.exp(1j * position * theta ** -(np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag, x_h[2 * half :]])


def attend(config, x_td, w, kind):
    q_tnh, k_tkh, v_tkh = (
        np.einsum("td,dnh->tnh", x_td, w[f"{name}_proj"]) + w.get(f"{name}_bias", 0)
        for name in "qkv"
    )
    gate_tnh = np.inf
    if config.output_gate:
        q_tnh, gate_tnh = np.split(q_tnh, 2, axis=-1)
    if config.qk_norm:
        q_tnh, k_tkh = norm(config, q_tnh, w["q_norm"]), norm(config, k_tkh, w["k_norm"])
    attended_tnh = np.zeros_like(q_tnh)
    for t, n in np.ndindex(q_tnh.shape[:2]):
        k = n * config.num_kv_heads // config.num_heads
        first = max(0, t - config.window + 1) if kind == "sliding" else 0
        q_h = turned(config, q_tnh[t, n], t, kind)
        scores = [q_h @ turned(config, k_tkh[s, k], s, kind) for s in range(first, t + 1)]
        scores = np.array(scores) * config.kinds[kind].attention.scale
        if cap := config.attention_soft_cap:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores)
        total = weights.sum() + (np.exp(w["sinks"][n]) if config.sinks else 0)
        attended_tnh[t, n] = weights @ v_tkh[first : t + 1, k] / total
    attended_tnh = attended_tnh * sigmoid(gate_tnh)
    return np.einsum("tnh,nhd->td", attended_tnh, w["o_proj"]) + w.get("o_bias", 0)


def recur(config, x_td, w):
    sizes, rows = config.recurrent, np.arange(len(x_td))
    wide_tz = np.pad(x_td @ w["qkv_proj"], ((sizes.taps - 1, 0), (0, 0)))
    mixed_tz = sum(wide_tz[rows + i] * w["taps"][:, 0, i] for i in range(sizes.taps))
    mixed_tz = mixed_tz * sigmoid(mixed_tz)
    width = 2 * sizes.key_heads * sizes.key_width
    qk_tix = mixed_tz[:, :width].reshape(len(x_td), -1, sizes.key_width)
    qk_tix = qk_tix / np.sqrt((qk_tix**2).sum(axis=-1, keepdims=True) + 1e-6)
    q_tix, k_tix = np.split(qk_tix, 2, axis=1)
    v_tjy = mixed_tz[:, width:].reshape(len(x_td), -1, sizes.value_width)
    rate_tj = sigmoid(x_td @ w["b_proj"])
    speed_tj = np.log1p(np.exp(x_td @ w["a_proj"] + w["step_bias"]))
    decay_tj = np.exp(-np.exp(w["decay_bias"]) * speed_tj)
    out_tjy = np.zeros_like(v_tjy)
    for j in range(sizes.value_heads):
        i, state = j * sizes.key_heads // sizes.value_heads, 0
        for t in rows:
            state = state * decay_tj[t, j] + np.zeros((sizes.key_width, sizes.value_width))
            error_y = rate_tj[t, j] * (v_tjy[t, j] - k_tix[t, i] @ state)
            state += np.outer(k_tix[t, i], error_y)
            out_tjy[t, j] = q_tix[t, i] @ state / np.sqrt(sizes.key_width)
    scale = np.sqrt((out_tjy**2).mean(axis=-1, keepdims=True) + config.rms_eps)
    gate_tjy = np.einsum("td,djy->tjy", x_td, w["z_proj"])
    out_tjy = out_tjy / scale * w["state_norm"] * gate_tjy * sigmoid(gate_tjy)
    return np.einsum("tjy,jyd->td", out_tjy, w["state_proj"])


def feed_forward(config, x_td, w):
    gate_tf = x_td @ w["gate_proj"] + w.get("gate_bias", 0)
    approximate = config.activation == "gelu_pytorch_tanh"
    if config.activation == "silu":
        gate_tf = gate_tf * sigmoid(gate_tf)
    else:
        gate_tf = np.float64(jax.nn.gelu(jnp.asarray(gate_tf, jnp.float32), approximate))
    up_tf = x_td @ w["up_proj"] + w.get("up_bias", 0)
    return (gate_tf * up_tf) @ w["down_proj"] + w.get("down_bias", 0)


def mix(config, x_td, w):
    y_td = np.zeros_like(x_td)
    for t, x_d in enumerate(x_td):
        scores_e = np.exp(x_d @ w["router"])
        picked = np.argsort(-scores_e)[: config.experts.per_token]
        for e in picked:
            gate_f, up_f = x_d @ w["expert_gate_up_proj"][e]
            y_d = (gate_f * sigmoid(gate_f) * up_f) @ w["expert_down_proj"][e]
            y_td[t] += scores_e[e] / scores_e[picked].sum() * y_d
    shared = {name.removeprefix("shared_"): x for name, x in w.items() if "shared_" in name}
    return y_td + feed_forward(config, x_td, shared) * sigmoid(x_td @ shared["gate"])


# A row of 9 tokens and one of 12, and both behind each other: one program.
FIRST, SECOND = random_tokens(9), random_tokens(12, seed=1)
ROWS_BT = np.array([[*FIRST, *[0] * 15], [*SECOND, *[0] * 12], [*FIRST, *SECOND, *[0] * 3]])
POSITIONS_BT = np.array([[*range(24)], [*range(24)], [*range(9), *range(15)]])
SEGMENTS_BT = np.array([[1] * 9 + [0] * 15, [1] * 12 + [0] * 12, [1] * 9 + [2] * 12 + [0] * 3])


@functools.partial(jax.jit, static_argnums=0)
def logits_of_rows(graph, params):
    model = nnx.merge(graph, params)
    return model.logits(model(ROWS_BT, POSITIONS_BT, SEGMENTS_BT))


def test_forward_alone_and_packed_equals_the_definition(case):
    config, graph, params = case
    assert len(config.kinds) > 1 and config.num_layers % len(config.pattern)
    alone_first, alone_second, packed = logits_of_rows(graph, params)
    parts = [(alone_first[:9], packed[:9]), (alone_second[:12], packed[9:21])]
    for tokens, founds in zip((FIRST, SECOND), parts, strict=True):
        expected = defined_logits(config, params, tokens)
        assert expected.std() > 0.3
        for found in founds:
            tolerance = TOLERANCE * expected.std()
            np.testing.assert_allclose(found, expected, atol=tolerance, rtol=TOLERANCE)


@pytest.mark.parametrize("scanned", [False, True])
def test_engine_samples_what_the_full_forward_gives(case, scanned, monkeypatch):
    """Prompts and responses are longer than the windows, and responses than a call of the loop.

    A mixture's, on a mesh that cuts its experts.
    """
    if scanned:
        monkeypatch.setattr(decoding, "UNROLLED_LAYERS", 0)
    config, graph, params = case
    prompts = tuple(random_tokens(size, seed=size).astype(np.int32) for size in (2, 11, 7))
    request = RolloutRequest(prompts, np.arange(3), SamplingParams(max_length=40), seed=1)
    ends = dict(eos_ids=(), pad_id=0, vocab_size=VOCAB)
    engine = Engine(graph, EngineConfig(max_length=64), **ends)
    mesh, weights = contextlib.nullcontext(), params
    if config.experts:
        mesh = jax.set_mesh(make_mesh(fsdp=2, expert=2, devices=jax.devices()[:4]))
        layout = param_shardings(params, jax.sharding.get_mesh(), SAMPLER_RULES)
        weights = jax.device_put(params, layout)
    with mesh:
        found, _ = engine.generate(weights, request)
    expected = simple_decode(graph, params, request, **ends)
    np.testing.assert_array_equal(found.tokens_br, expected.tokens_br)
    np.testing.assert_allclose(found.log_probs_br, expected.log_probs_br, atol=TOLERANCE)


def test_export_and_reload(case, tmp_path):
    config, _, params = case
    written = CONFIGS[config.family]
    export_model(tmp_path / "m", params, config, written, character_tokenizer("01"), jnp.float32)
    assert load_model_config(tmp_path / "m")[0] == config
    shapes = jax.eval_shape(lambda: params)
    loaded = load_params(tmp_path / "m", config, shapes, None, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# How the backward pass of each case recomputes on the mesh, and what the mesh is.
REMAT = {"gemma2": "none", "patchwork": "full", "qwen3_5_moe_text": "dots"}


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), dict(data=1, context=4)], ids=str)
def test_sharded_gradient_equals_that_of_one_device(case, sizes):
    """And every parameter has one, else other tests would not see it. Packed rows are cut where a
    sequence ends and within one; one is longer than what a device has of its row. A mixture's
    experts are cut in place of the data."""
    config, graph, params = case
    tokens, ids = random_tokens(4, 16), np.ones((4, 16), np.int32)
    for row, ends in enumerate([(4, 8, 12), (3, 13), (8,), ()]):
        for end in ends:
            ids[row, end:] += 1
    positions = np.stack([np.arange(16) - np.searchsorted(row, row) for row in ids])

    def loss(params, remat):
        model = nnx.merge(graph, params)
        model.remat = remat
        return jnp.square(model.logits(model(tokens, positions, ids))).mean()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = gradient(params, "none")
    for path, values in nnx.to_flat_state(expected[1]):
        assert np.abs(values[...]).max() > 1e-6, path
    third = "expert" if config.experts else "data"
    sizes = {third if axis == "data" else axis: size for axis, size in sizes.items()}
    mesh = make_mesh(fsdp=2, **(dict(data=1) | sizes))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, param_shardings(params, mesh))
        found = gradient(sharded, REMAT[config.family])

    def same(x, y):
        np.testing.assert_allclose(x, y, atol=TOLERANCE * float(np.abs(y).max()))

    jax.tree.map(same, found, expected)


def test_layers_in_host_memory_are_fetched_period_by_period(case):
    _, graph, params = case
    kept = nnx.State({**params, "layers": jax.tree.map(in_host_memory, params["layers"])})
    assert is_kept(kept["layers"]) and not is_kept(params)
    found, expected = logits_of_rows(graph, kept), logits_of_rows(graph, params)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def is_kept(params) -> bool:
    return all(x.sharding.memory_kind == HOST_MEMORY for x in jax.tree.leaves(params))


def test_program_does_not_grow_with_depth(case):
    config = case[0]

    def operations(periods):
        deep = dataclasses.replace(config, num_layers=periods * len(config.pattern))
        options = dict(dtype=jnp.float32, param_dtype=jnp.float32)
        shapes = nnx.eval_shape(lambda: Transformer(deep, rngs=nnx.Rngs(0), **options))
        graph, params = nnx.split(shapes, nnx.Param)
        forward = jax.make_jaxpr(lambda params: nnx.merge(graph, params)(random_tokens(1, 4)))
        return len(str(forward(params)).splitlines())

    assert operations(2) == operations(6)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma2", {"final_logit_softcapping": -30.0}, "final_logit_softcapping=-30.0 must be a p"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu' is not supported"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 5}, "layer_types=.* is not supported"),
        ("gemma2", {"sliding_window": None}, "the required field sliding_window is missing"),
        ("patchwork", {"partial_rotary_factor": 0.3}, "must be even.*of 2.4 channels"),
    ],
)
def test_what_a_row_does_not_name_is_refused(family, change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(CONFIGS[family] | change, "here/config.json")


def test_a_pattern_is_read_as_its_shortest_period():
    def pattern(*types):
        changed = CONFIGS["gemma2"] | {"layer_types": [f"{x}_attention" for x in types]}
        return ModelConfig.from_hf(changed, "here/config.json").pattern

    assert pattern(*["full"] * 5) == ("full",)
    assert pattern(*["sliding"] * 4, "full") == ("sliding",) * 4 + ("full",)
    assert pattern("full", "sliding", "sliding", "full", "sliding") == ("full", *["sliding"] * 2)


def test_a_config_that_cannot_be_written_is_an_error():
    llama = ModelConfig.from_hf(SIZES | {"model_type": "llama"}, "here/config.json")
    hf_config_dict(llama, eos_token_id=1, pad_token_id=0)
    with pytest.raises(ValueError, match="sinks=True.* cannot be written"):
        hf_config_dict(dataclasses.replace(llama, sinks=True), eos_token_id=1, pad_token_id=0)


def test_two_parameters_with_one_key_are_an_error(case, monkeypatch):
    config, _, params = case
    keys = {"final_norm": key_table(config)["embedding"].key}
    row = dataclasses.replace(FAMILIES[config.family], keys=keys)
    monkeypatch.setitem(FAMILIES, config.family, row)
    with pytest.raises(ValueError, match=f"{config.family}: more than one parameter is mapped to"):
        mapped_params(config, params)
