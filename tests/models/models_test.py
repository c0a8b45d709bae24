"""The decoder against transformers in torch, float32, on random weights."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks.hf_config import hf_config_dict
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.sharding import param_shardings
from distill.data.tokenizer import character_tokenizer
from distill.models import families, moe
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.keys import key_table, mapped_params
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.models.transformer import Transformer
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

VOCABULARY, LENGTH = 64, 48
TOLERANCE = 1e-4

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
# With 128 original positions all three bands of the scaling (kept, blended, slowed) are in use.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
PLAIN_ROPE = dict(rope_type="default", rope_theta=10000.0)
YARN_ROPE = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
LONG_ROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0, 1.5, 2.0],
    long_factor=[4.0] * 3,
    partial_rotary_factor=0.75,
)
MINISTRAL_ROPE = dict(mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.1)
WINDOW = 6  # shorter than prompts
SLIDING = dict(sliding_window=WINDOW, num_hidden_layers=4)
MULTIPLIERS = dict(embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=0.5)
ROPES = dict(full_attention=YARN_ROPE, sliding_attention=PLAIN_ROPE)
GEMMA = dict(hidden_activation="gelu_pytorch_tanh", head_dim=16)
# By model_type, and what makes cases of one family differ.
FAMILIES = {
    "qwen2": dict(rope_parameters=PLAIN_ROPE),
    "qwen3": dict(rope_parameters=PLAIN_ROPE, head_dim=16),
    "llama": dict(rope_parameters=LLAMA3_ROPE),
}
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]
HYBRID = dict(
    num_hidden_layers=5,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    # Of text, all three positions of a token are the same: sections have no effect.
    rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=0.25, mrope_section=[1, 1, 0]),
)
MIXTURE = dict(num_experts_per_tok=3, moe_intermediate_size=12)
SHARED = MIXTURE | dict(num_experts=8, shared_expert_intermediate_size=20)
ROUTED = MIXTURE | dict(n_routed_experts=8, head_dim=16)
SHALLOW = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
MIXTURES = {
    "qwen2_moe": SHARED | dict(decoder_sparse_step=2),
    "qwen3_moe": MIXTURE | dict(num_experts=8, head_dim=16, norm_topk_prob=True),
    "qwen3_moe dense": MIXTURE | dict(num_experts=8, head_dim=16, mlp_only_layers=[1]),
    "mixtral": dict(num_local_experts=4),
    "olmoe": dict(num_experts=8, num_experts_per_tok=3),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=3, head_dim=16)
    | dict(
        sliding_window=WINDOW, swiglu_limit=1.0, rope_parameters=dict(YARN_ROPE, truncate=False)
    ),
    "granitemoe": MULTIPLIERS | dict(attention_multiplier=0.4, num_local_experts=4),
    "glm4_moe": ROUTED | dict(use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.5),
    "dots1": ROUTED
    | dict(n_shared_experts=2, first_k_dense_replace=1)
    | dict(sliding_window=WINDOW, max_window_layers=1),
    "qwen3_5_moe_text": HYBRID | SHARED | SHALLOW,
    "qwen3_next": HYBRID | SHARED | SHALLOW | dict(mlp_only_layers=[1]),
}
OTHERS = {
    "qwen2 windows": SLIDING | dict(use_sliding_window=True, max_window_layers=2),
    "qwen3 windows": dict(use_sliding_window=True, max_window_layers=1, head_dim=16) | SLIDING,
    "llama linear": dict(rope_parameters=dict(PLAIN_ROPE, rope_type="linear", factor=3.0)),
    "llama dynamic": dict(rope_parameters=dict(PLAIN_ROPE, rope_type="dynamic", factor=3.0)),
    "llama yarn": dict(rope_parameters=YARN_ROPE),
    "arcee": dict(),
    "mistral": dict(sliding_window=WINDOW, head_dim=16),
    "mistral full": dict(sliding_window=None),
    "ministral": SLIDING
    | dict(layer_types=["sliding_attention"] * 3 + ["full_attention"], head_dim=16),
    "ministral3": dict(rope_parameters=YARN_ROPE | MINISTRAL_ROPE, head_dim=16),
    "smollm3": dict(num_hidden_layers=5, no_rope_layers=[1, 1, 0, 1, 1]),
    "phi3": dict(sliding_window=WINDOW, rope_parameters=LONG_ROPE)
    | dict(original_max_position_embeddings=256),
    "olmo2": dict(),
    "olmo3": SLIDING | dict(rope_parameters=ROPES),
    "exaone4": SLIDING | dict(num_hidden_layers=5),
    "exaone4 full": dict(sliding_window=None, layer_types=["full_attention"] * 2),
    "granite": MULTIPLIERS | dict(attention_multiplier=0.4),
    "glm": dict(head_dim=16),
    "glm4": dict(head_dim=16, attention_bias=False),
    "gemma": dict(head_dim=16),
    "gemma2": SLIDING
    | GEMMA
    | dict(query_pre_attn_scalar=9, attn_logit_softcapping=1.5)
    | dict(final_logit_softcapping=2.0),
    "gemma3_text": SLIDING
    | GEMMA
    | dict(query_pre_attn_scalar=9, rope_parameters=ROPES)
    | dict(layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]),
    "seed_oss": dict(head_dim=16, mlp_bias=True, attention_out_bias=True),
    "ernie4_5": dict(head_dim=16),
    "helium": dict(head_dim=8),
    "qwen3_5_text": HYBRID,
} | MIXTURES
ALL = FAMILIES | OTHERS
# Of each part of a decode step, the first that has it. families_test.py has norms behind, layers
# without rotary embedding, and multipliers.
DECODED = "qwen2 llama mistral phi3 glm4 gemma3_text qwen3_5_text qwen2_moe gpt_oss".split()
PROMPTS, RESPONSE = (11, 8, 1), 64  # tokens; two prompts are longer than the windows
DISTINCT = 8  # tokens of a case's responses
# Of random weights, where those of seed 0 make a response repeat one token.
SEEDS = {"exaone4 full": 3, "glm4": 1, "gemma": 1, "gemma2": 1, "gemma3_text": 3}
SEEDS |= {"gpt_oss": 2, "granitemoe": 2, "mixtral": 1, "smollm3": 3}
# With more, rounding errors grow from token to token: two ways through torch differ by 1.5e-4.
NOISE = {"qwen3_5_text": 0.1}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs here run once or twice on tiny arrays: nearly all their time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def case_name(case):
    return f"{case[0]}-{'tied' if case[1] else 'untied'}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch model, the folder it was saved in, and our model loaded from there."""

    torch_model: object
    folder: object
    config: ModelConfig
    hf_config: dict
    model: Transformer

    @functools.cached_property
    def prompts(self) -> list[np.ndarray]:
        return [random_tokens(length, seed=length) for length in PROMPTS]

    @functools.cached_property
    def generated(self) -> np.ndarray:
        """Greedy responses of transformers' `generate`."""
        import torch

        padded_bp = np.zeros((len(PROMPTS), max(PROMPTS)), int)
        for row_p, prompt in zip(padded_bp, self.prompts, strict=True):
            row_p[-len(prompt) :] = prompt
        mask_bp = np.arange(max(PROMPTS))[::-1] < np.array(PROMPTS)[:, None]
        tokens_bt = self.torch_model.generate(
            torch.tensor(padded_bp),
            attention_mask=torch.tensor(mask_bp, dtype=int),
            max_new_tokens=RESPONSE,
            do_sample=False,
        )
        return tokens_bt[:, max(PROMPTS) :].numpy()


def make_case(model_type, folder, seed=0, noise=0.2, **fields) -> Case:
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    torch_config = AutoConfig.for_model(model_type, **(SIZES | fields))
    torch_model = AutoModelForCausalLM.from_config(torch_config, attn_implementation="eager").eval()
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide them
        corrections = [x for name, x in torch_model.named_buffers() if "correction" in name]
        for parameter in (*torch_model.parameters(), *corrections):
            parameter.add_(noise * torch.randn_like(parameter))
        if model_type.startswith("gemma"):  # tied and scaled, they would make it repeat its input
            torch_model.get_input_embeddings().weight.mul_(0.5)
    torch_model.save_pretrained(folder)
    config, hf_config = load_model_config(folder)
    return Case(torch_model, folder, config, hf_config, load(folder, config))


@pytest.fixture(scope="module", params=CASES, ids=case_name)
def case(request, tmp_path_factory) -> Case:
    family, tied = request.param
    folder = tmp_path_factory.mktemp(case_name(request.param))
    return make_case(family, folder, tie_word_embeddings=tied, **FAMILIES[family])


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Makes a case of ALL by its name, once."""

    @functools.cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        return make_case(
            name.split()[0], folder, SEEDS.get(name, 0), NOISE.get(name, 0.2), **ALL[name]
        )

    return make


def abstract(config):
    """The graph, and the shapes of the parameters."""

    def construct():
        return Transformer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(construct), nnx.Param)


def load(folder, config, mesh=None):
    graphdef, shapes = abstract(config)
    shardings = param_shardings(shapes, mesh) if mesh else None
    return nnx.merge(graphdef, load_params(folder, config, shapes, shardings, jnp.float32))


@jax.jit
def logits_of(model, *arrays):
    return model.logits(model(*arrays))


def torch_logits(model, tokens, mask=None, positions=None):
    import torch

    inputs = dict(input_ids=tokens, attention_mask=mask, position_ids=positions)
    tensors = {k: torch.tensor(np.asarray(v)) for k, v in inputs.items() if v is not None}
    with torch.no_grad():
        return model(**tensors).logits.numpy()


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, shape)


def test_left_padded_logits_equal_torch(case):
    tokens = random_tokens(4, LENGTH)
    mask = (np.arange(LENGTH) >= np.array([[0], [5], [20], [47]])).astype(np.int32)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    ours = logits_of(case.model, tokens, positions, mask)
    theirs = torch_logits(case.torch_model, tokens, mask, positions)
    assert theirs.std() > 1  # otherwise the tolerance would mean little
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_logits_and_greedy_tokens_equal_torch(name, other):
    """Alone, and with beginnings of the same sequences packed behind each other: one program.

    Of prompts and the responses that transformers generates to them, whose tokens are our likeliest
    ones, too.
    """
    case = other(name)
    response_br = case.generated
    rows = [np.concatenate(pair) for pair in zip(case.prompts, response_br, strict=True)]
    lengths, width = np.array([len(row) for row in rows]), len(rows[0])  # the longest
    tokens_bt = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    beginnings = np.array([43, width - 44, 1])
    which_t = np.repeat(np.arange(3), beginnings)
    position_t = np.arange(width) - (beginnings.cumsum() - beginnings)[which_t]
    alone_bt = np.broadcast_to(np.arange(width), tokens_bt.shape)
    packed_tv, *alone_btv = logits_of(
        case.model,
        np.stack([tokens_bt[which_t, position_t], *tokens_bt]),
        np.stack([position_t, *alone_bt]),
        np.stack([which_t + 1, *(alone_bt < lengths[:, None])]),
    )
    assert len(np.unique(response_br)) >= DISTINCT  # a text that repeats itself tells little
    largest = 0.0
    for i, (prompt, response_r) in enumerate(zip(case.prompts, response_br, strict=True)):
        expected_tv = torch_logits(case.torch_model, rows[i][None, :-1])[0]
        assert expected_tv.std() > 0.3  # otherwise the tolerance would mean little
        alone_tv = alone_btv[i][: len(expected_tv)]  # nothing is generated from the last token
        packed, beginning = packed_tv[which_t == i], expected_tv[: beginnings[i]]
        for found, expected in ((alone_tv, expected_tv), (packed, beginning)):
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
            largest = max(largest, np.abs(found - expected).max())
        np.testing.assert_array_equal(alone_tv[len(prompt) - 1 :].argmax(axis=-1), response_r)
        assert len(set(response_r)) > 1
    tokens = response_br.size
    print(f"{name}: {largest:.1e}, {tokens} of {tokens} tokens")  # the table in docs/models.md


@pytest.mark.parametrize("name", DECODED)
def test_greedy_responses_of_the_engine_equal_those_of_torch(name, other):
    """Past windows, and past what a call of the decode loop makes."""
    case = other(name)
    graphdef, weights = nnx.split(case.model, nnx.Param)
    ends = dict(eos_ids=(), pad_id=0, vocab_size=case.config.vocab_size)
    engine = Engine(graphdef, EngineConfig(max_length=max(PROMPTS) + RESPONSE), **ends)
    params = SamplingParams(max_length=RESPONSE, greedy=True)
    request = RolloutRequest(tuple(case.prompts), np.arange(len(PROMPTS)), params)
    rollout, _ = engine.generate(weights, request)
    np.testing.assert_array_equal(rollout.tokens_br, case.generated)


def test_the_routers_loss_equals_that_of_torch(other):
    """Of the tokens before the padding, in all layers."""
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install torch")
    case, tokens = other("qwen3_moe"), random_tokens(2, LENGTH)
    mask = np.arange(LENGTH) < np.array([[LENGTH], [7]])
    inputs = dict(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask, dtype=int))
    with torch.no_grad():
        expected = case.torch_model(**inputs, output_router_logits=True).aux_loss
    load = moe.add_layers(case.model.with_load(tokens, counted_bt=mask)[1])
    found = moe.balance_loss(load.scores_e, load.picks_e, case.config.experts.per_token)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_gradients_of_experts_equal_those_of_torch(other):
    """And of the routers, by the keys that an export gives them."""
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install torch")
    from distill.models.checkpoints.export import _exported, _to_hf

    case, tokens = other("qwen3_moe dense"), random_tokens(2, LENGTH)
    (case.torch_model(torch.tensor(tokens)).logits ** 2).mean().backward()
    expected = {name: x.grad.numpy() for name, x in case.torch_model.named_parameters()}
    case.torch_model.zero_grad()
    graph, params = nnx.split(case.model, nnx.Param)

    def loss(params):
        model = nnx.merge(graph, params)
        return jnp.square(model.logits(model(tokens))).mean()

    found = {
        each.key: _to_hf(np.asarray(part.array[part.place]), part.weight)
        for each in _exported(jax.jit(jax.grad(loss))(params), case.config, None)
        for part in each.parts
    }

    def same(found, expected):
        largest = np.abs(expected).max()
        assert largest > 1e-3
        np.testing.assert_allclose(found, expected, atol=TOLERANCE * largest)

    key = "model.layers.0.mlp."
    same(found[key + "gate.weight"], expected[key + "gate.weight"])
    experts = [f"{key}experts.{expert}." for expert in range(8)]
    gates, ups, downs = (
        np.stack([found[f"{expert}{name}_proj.weight"] for expert in experts])
        for name in ("gate", "up", "down")
    )
    same(np.concatenate([gates, ups], axis=1), expected[key + "experts.gate_up_proj"])
    same(downs, expected[key + "experts.down_proj"])


@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000], ids=["one-file", "sharded"])
def test_export_loads_in_transformers(case, tmp_path, max_shard_bytes):
    """As the same numbers that it was imported from."""
    from transformers import AutoModelForCausalLM

    folder, (_, params) = tmp_path / "export", nnx.split(case.model, nnx.Param)
    arguments = params, case.config, case.hf_config, character_tokenizer("0123"), jnp.float32
    export_model(folder, *arguments, max_shard_bytes=max_shard_bytes)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens = random_tokens(1, LENGTH)
    np.testing.assert_array_equal(
        torch_logits(loaded, tokens), torch_logits(case.torch_model, tokens)
    )

    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes == 20_000)


@pytest.mark.parametrize("name", OTHERS)
def test_export_of_others_equals_what_transformers_wrote(name, other, tmp_path):
    """Key by key; so transformers loads it."""
    case = other(name)
    assert_export_equals_the_original(case, case.model, tmp_path / "export")
    configs = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "export", case.folder)
    )
    assert next(configs) == next(configs)


def test_scratch_config_means_the_same_to_transformers(case, tmp_path):
    """A config.json written for a model from scratch describes the model to both sides."""
    from transformers import AutoModelForCausalLM

    written = hf_config_dict(case.config, eos_token_id=2, pad_token_id=0)
    assert ModelConfig.from_hf(json.loads(json.dumps(written)), "test") == case.config
    _, params = nnx.split(case.model, nnx.Param)
    folder = tmp_path / "scratch"
    tokenizer = character_tokenizer("0123")
    export_model(folder, params, case.config, written, tokenizer, jnp.float32)
    tokens = random_tokens(1, LENGTH)
    np.testing.assert_array_equal(
        torch_logits(
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), tokens
        ),
        torch_logits(case.torch_model, tokens),
    )


def test_sharded_loading_gives_the_same_logits(case):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = load(case.folder, case.config, mesh)
    q_proj = model.layers.q_proj[...]
    assert q_proj.addressable_shards[0].data.shape == (2, 16, 2, case.config.head_width)
    assert model.embedding[...].addressable_shards[0].data.shape == (VOCABULARY // 2, 16)
    tokens = random_tokens(4, LENGTH)
    with jax.set_mesh(mesh):
        ours = logits_of(model, tokens)
    expected = torch_logits(case.torch_model, tokens)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def assert_export_equals_the_original(case, model, folder):
    _, params = nnx.split(model, nnx.Param)
    tokenizer = character_tokenizer("0123")
    export_model(folder, params, case.config, case.hf_config, tokenizer, jnp.float32)
    exported, original = (load_file(f / "model.safetensors") for f in (folder, case.folder))
    assert exported.keys() == original.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, original[key], err_msg=key)


def sharded(case):
    return load(case.folder, case.config, make_mesh(2, 2, 2))


def test_export_of_a_sharded_model_equals_the_original(case, tmp_path):
    assert_export_equals_the_original(case, sharded(case), tmp_path / "export")


def test_fused_tensors_are_cut_for_shards(other, tmp_path):
    case = other("phi3")
    assert_export_equals_the_original(case, sharded(case), tmp_path / "export")
    tensors = load_file(case.folder / "model.safetensors")
    key = "model.layers.1.self_attn.qkv_proj.weight"
    tensors[key] = tensors[key][1:]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(case.folder / "config.json", tmp_path)
    with pytest.raises(UserError, match=f"{key} has shape .63, 32., config.json calls for .64"):
        load(tmp_path, case.config)


def test_every_row_of_the_key_table_has_a_parameter_in_some_model():
    """And of each family's own rows, every one in a model of that family."""
    from transformers import AutoConfig

    rows, used = set(), set()
    for name, fields in ALL.items():
        for tied in (True, False):
            fields = SIZES | fields | dict(tie_word_embeddings=tied)
            hf_config = AutoConfig.for_model(name.split()[0], **fields).to_dict()
            config = ModelConfig.from_hf(hf_config, name)
            mapped = mapped_params(config, abstract(config)[1])
            used |= {named_row(config.family, row) for row, _ in mapped.values()}
            rows |= {named_row(config.family, row) for row in key_table(config).values()}
    assert {row[1:] for row in rows} - {row[1:] for row in used} == set()
    own = {
        family: {*row.keys, *(path for parts in row.fused.values() for path in parts)}
        for family, row in families.FAMILIES.items()
    }
    owned = {(family, path) for family, paths in own.items() for path in paths}
    assert owned - {row[:2] for row in used} == set()


def named_row(family, row):
    """The family, the parameter's path in the stack of whatever kind, the key and the axes."""
    return family, re.sub("layers/.*/", "layers/", row.path), row.key, row.axes
