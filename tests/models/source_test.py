"""Model folders that are more than a text model's weights: containers, few bits, adapters."""

import json
import math
import os
import re
import subprocess

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import model_config, random_model

from benchmarks.hf_config import hf_config_dict
from distill.base.errors import UserError
from distill.data.tokenizer import character_tokenizer, load_tokenizer, shared_vocabulary
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.fingerprint import fingerprint
from distill.models.checkpoints.hub import base_folder, find_config, resolve_model, tokenizer_folder
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config, open_source
from distill.models.checkpoints.tensors import MxFp4, Scaled, read_header
from distill.models.facts import ModelConfig

CONFIG = model_config("llama", head_width=4)
FILE = "model.safetensors"
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
TEXT = dict(SIZES, vocab_size=32, num_key_value_heads=1, max_position_embeddings=64)
Q, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A model of random weights."""
    _, params = random_model(CONFIG)
    hf_config = hf_config_dict(CONFIG, eos_token_id=1, pad_token_id=0)
    tokenizer = character_tokenizer("0123")
    export_model(tmp_path / "model", params, CONFIG, hf_config, tokenizer, jnp.float32)
    return tmp_path / "model"


def loaded(folder):
    """Its tensors by key, as `load_params` reads them and `export_model` writes them again."""
    source = open_source(folder)
    _, shapes = random_model(source.config)
    params = load_params(folder, source.config, shapes, None, jnp.float32)
    again = folder.with_name("again")
    tokenizer = character_tokenizer("0123")
    export_model(
        again, params, source.config, source.hf_config, tokenizer, jnp.float32, source=source
    )
    return load_file(again / FILE)


def edit_config(folder, name="config.json", **changes):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)


# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_keys_is_stripped(folder, prefix):
    tensors = load_file(folder / FILE)
    save_file({prefix + key: value for key, value in tensors.items()}, folder / FILE)
    assert_equal(loaded(folder), tensors)


@pytest.mark.parametrize("differs", [True, False])
def test_another_head_of_a_tied_model_is_kept(folder, differs):
    tensors = load_file(folder / FILE)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += differs
    save_file(tensors | {"lm_head.weight": head}, folder / FILE)
    config, hf_config = load_model_config(folder)
    assert config.tied is hf_config["tie_word_embeddings"] is not differs
    assert_equal(loaded(folder), tensors | ({"lm_head.weight": head} if differs else {}))


# --------------------------------------------------------------------------------------- few bits


KINDS = {"float8_e4m3fn": "F8_E4M3", "float32": "F32"}


def write_raw(path, tensors):
    """The safetensors of any dtype; NumPy's know no 8 bits."""
    header, data = {}, b""
    for key, x in tensors.items():
        end = len(data) + x.nbytes
        header[key] = dict(dtype=KINDS[x.dtype.name], shape=x.shape, data_offsets=[len(data), end])
        data += x.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("block", [(8, 6), (16, 16), None])
def test_eight_bits_with_a_scale_per_block(folder, block):
    """Blocks that do not divide the matrix, and one scale for all of it."""
    random, tensors = np.random.default_rng(0), load_file(folder / FILE)
    stored, expected = dict(tensors), dict(tensors)
    for key in (Q, GATE):
        rows, columns = tensors[key].shape
        values = tensors[key].astype(ml_dtypes.float8_e4m3fn)
        grid = (1, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
        scales = random.uniform(0.5, 2.0, grid).astype(np.float32)
        spread = np.kron(scales, np.ones(block or values.shape))[:rows, :columns]
        stored |= {key: values, f"{key}_scale_inv": scales if block else scales[0, 0][None]}
        expected[key] = values.astype(np.float64) * spread
    stored["model.layers.0.self_attn.q_proj.activation_scale"] = np.ones(1, np.float32)
    write_raw(folder / FILE, stored)
    edit_config(folder, quantization_config=dict(quant_method="fp8", weight_block_size=block))
    assert_equal(loaded(folder), expected)
    assert "quantization_config" not in open_source(folder).hf_config


def test_slices_of_eight_bits(tmp_path):
    random = np.random.default_rng(0)
    values = random.normal(size=(40, 36)).astype(ml_dtypes.float8_e4m3fn)
    scales = random.uniform(0.5, 2.0, (5, 6)).astype(np.float32)
    write_raw(tmp_path / FILE, {"w": values, "w_scale_inv": scales})
    tensor = Scaled(*read_header(tmp_path / FILE), (8, 6))
    whole = values.astype(np.float64) * np.kron(scales, np.ones((8, 6)))
    for index in (np.s_[:, :], np.s_[3:5, 5:7], np.s_[8:31, 0:36], np.s_[39:40, 35:]):
        np.testing.assert_allclose(tensor.read(index), whole[index], rtol=1e-6)


def test_four_bits_equal_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 10, 2, 16)).astype(np.uint8)
    scales = random.integers(110, 140, (3, 10, 2)).astype(np.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / FILE)
    tensor = MxFp4(*sorted(read_header(tmp_path / FILE), key=lambda x: x.key))
    arguments = torch.tensor(blocks), torch.tensor(scales)
    whole = convert_moe_packed_tensors(*arguments, dtype=torch.float32).numpy()
    assert tensor.shape == whole.shape == (3, 64, 10) and tensor.key == "w"
    for index in (np.s_[:, :, :], np.s_[1:2, 30:35, 4:9], np.s_[:, 32:, :], np.s_[2:, 5:6, 0:1]):
        np.testing.assert_array_equal(tensor.read(index), whole[index])


def test_experts_in_four_bits(tmp_path):
    """As gpt-oss has them, beside matrices of 16 bits or more."""
    hf_config = dict(
        **TEXT | dict(hidden_size=32, intermediate_size=32, sliding_window=4, head_dim=8),
        **dict(architectures=["GptOssForCausalLM"], model_type="gpt_oss", rms_norm_eps=1e-5),
        **dict(num_local_experts=2, num_experts_per_tok=1, tie_word_embeddings=False),
        **dict(rope_theta=1e4, layer_types=["full_attention"]),
    )
    folder, random = tmp_path / "model", np.random.default_rng(0)
    config = ModelConfig.from_hf(hf_config, "test")
    _, params = random_model(config)
    tokenizer = character_tokenizer("0123")
    export_model(folder, params, config, hf_config, tokenizer, jnp.float32)
    tensors = load_file(folder / FILE)
    expected = dict(tensors)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(key).shape
        groups = experts, outputs, inputs // 32
        tensors[f"{key}_blocks"] = random.integers(0, 256, (*groups, 16)).astype(np.uint8)
        tensors[f"{key}_scales"] = random.integers(120, 130, groups).astype(np.uint8)
    save_file(tensors, folder / FILE)
    edit_config(folder, quantization_config=dict(quant_method="mxfp4"))
    stored = {tensor.key: tensor for tensor in read_header(folder / FILE)}
    for key in expected.keys() - tensors.keys():
        tensor = MxFp4(stored[f"{key}_blocks"], stored[f"{key}_scales"])
        expected[key] = tensor.read(np.s_[:, :, :])
    assert len(expected.keys() - tensors.keys()) == 2
    assert_equal(loaded(folder), expected)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", None])
def test_other_quantisations_are_refused_by_name(folder, method):
    edit_config(folder, quantization_config=dict(quant_method=method))
    with pytest.raises(UserError, match="quantization_config=.* is not supported"):
        load_model_config(folder)


# --------------------------------------------------------------------------------------- adapters

ADAPTER = dict(peft_type="LORA", r=3, lora_alpha=6, bias="none", target_modules=["q_proj"])


def make_adapter(folder, tensors, **changes):
    adapter = folder.with_name("adapter")
    adapter.mkdir()
    named = dict(base_model_name_or_path=str(folder))
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER | named | changes))
    keyed = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(keyed, adapter / "adapter_model.safetensors")
    return adapter


def factors(key, shape, rank=3):
    random, name = np.random.default_rng(1), key.removesuffix(".weight")
    return {
        f"{name}.lora_A.weight": random.normal(size=(rank, shape[1])).astype(np.float32),
        f"{name}.lora_B.weight": random.normal(size=(shape[0], rank)).astype(np.float32),
    }


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_is_merged_into_its_base(folder, stabilised):
    """The formulas of LoRA (arXiv:2106.09685) and of rank-stabilised LoRA (arXiv:2312.03732)."""
    tensors = load_file(folder / FILE)
    parts = factors(Q, tensors[Q].shape) | factors(GATE, tensors[GATE].shape)
    adapter = make_adapter(folder, parts, use_rslora=stabilised)
    expected = dict(tensors)
    for key in (Q, GATE):
        a, b = (parts[key.replace("weight", f"lora_{x}.weight")].astype(np.float64) for x in "AB")
        expected[key] = tensors[key] + 6 / (math.sqrt(3) if stabilised else 3) * b @ a
    assert_equal(loaded(adapter), expected)
    assert resolve_model(adapter) == adapter and base_folder(adapter) == folder
    assert tokenizer_folder(adapter) == folder


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapters_base_is_downloaded_with_it(folder, monkeypatch, weights):
    asked = []

    def download(hub_id, revision, allow_patterns):
        asked.append((hub_id, revision, "*.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    adapter = make_adapter(folder, {}, base_model_name_or_path="someone/base@v2")
    assert find_config(adapter) is None and not asked  # a plan downloads nothing
    assert resolve_model(adapter, weights=weights) == adapter
    assert asked == [("someone/base", "v2", weights)]
    assert base_folder(adapter) == folder and not asked[1][2]


def test_an_adapters_fingerprint_is_of_its_base_too(folder):
    adapter = make_adapter(folder, factors(Q, load_file(folder / FILE)[Q].shape))
    found = {fingerprint(adapter), fingerprint(folder)}
    edit_config(folder, rope_theta=5e4)
    found.add(fingerprint(adapter))
    edit_config(adapter, "adapter_config.json", lora_alpha=2)
    found.add(fingerprint(adapter))
    assert len(found) == 4


def test_modules_that_an_adapter_saves_replace_those_of_the_base(folder):
    tensors = load_file(folder / FILE)
    whole = {"model.embed_tokens.weight": 2 * tensors["model.embed_tokens.weight"]}
    whole["lm_head.weight"] = 3 * tensors["model.embed_tokens.weight"]
    adapter = make_adapter(folder, whole, modules_to_save=["embed_tokens", "lm_head"])
    assert not load_model_config(adapter)[0].tied
    assert_equal(loaded(adapter), tensors | whole)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        (dict(peft_type="IA3"), {}, "peft_type='IA3' cannot be merged here: merge it with peft's"),
        (dict(use_dora=True), {}, "use_dora=True cannot be merged"),
        (dict(bias="all"), {}, "bias='all' cannot be merged"),
        (dict(r=0), {}, "r=0 and lora_alpha=6 must be numbers"),
        ({}, {"model.layers.0.self_attn.q_proj.lora_magnitude_vector": (3,)}, "lora_magnitude"),
        ({}, {"model.layers.7.x.lora_A.weight": (3, 4)}, "layers.7.x.lora_A.weight cannot be"),
        ({}, {Q.replace("weight", f"lora_{x}.weight"): (3, 3) for x in "AB"}, "do not fit"),
        (dict(base_model_name_or_path=None), {}, "base_model_name_or_path=None names no model"),
        (dict(base_model_name_or_path="/no/such"), {}, "there is no folder '/no/such'"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(folder, changes, tensors, message):
    filled = {key: np.zeros(shape, np.float32) for key, shape in tensors.items()}
    adapter = make_adapter(folder, filled, **changes)
    with pytest.raises(UserError, match=message):
        open_source(adapter)


# ------------------------------------------------------------------------------------- tokenizers


def test_a_folder_with_a_tokenizer_alone(tmp_path):
    character_tokenizer("0123").save_pretrained(tmp_path)
    assert tokenizer_folder(tmp_path) == tmp_path
    with pytest.raises(UserError, match="has no config.json"):
        resolve_model(tmp_path)


def test_more_ids_than_rows_are_refused_but_for_added_tokens(tmp_path):
    tokenizer = character_tokenizer("0123")
    tokenizer.save_pretrained(tmp_path)
    size = shared_vocabulary(tmp_path).size
    with pytest.raises(UserError, match=f"{size} ids, but the model in x only {size - 1} rows"):
        shared_vocabulary(tmp_path).within(size - 1, "x")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    assert shared_vocabulary(tmp_path).within(size, "x").size == size


def test_the_sources_tokenizer_is_exported_unchanged(folder):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    source, again = open_source(folder), folder.with_name("again")
    _, params = random_model(source.config)
    export_model(again, params, source.config, source.hf_config, folder, jnp.float32, source=source)
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert [(again / x).read_bytes() for x in names] == [(folder / x).read_bytes() for x in names]
    assert load_tokenizer(again).chat_template == "{{ messages }}"


OLD_PYTHON = os.environ.get("DISTILL_TRANSFORMERS4_PYTHON", "")


@pytest.mark.skipif(
    not OLD_PYTHON,
    reason="needs an interpreter with transformers 4.57 in DISTILL_TRANSFORMERS4_PYTHON: "
    "make test-transformers4",
)
def test_transformers_4_loads_config_and_tokenizer_of_an_export(folder):
    """Of a source that it can load: its files are written by the tokenizers package alone."""
    for path in folder.glob("*token*"):
        if path.name != "tokenizer.json":
            path.unlink()
    written = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    source, again = open_source(folder), folder.with_name("again")
    _, params = random_model(source.config)
    export_model(again, params, source.config, source.hf_config, folder, jnp.float32, source=source)
    program = (
        "import sys, transformers as t; folder = sys.argv[1]; print(t.__version__, "
        "t.AutoConfig.from_pretrained(folder).model_type, "
        "t.AutoTokenizer.from_pretrained(folder)('0321').input_ids)"
    )
    command = [OLD_PYTHON, "-c", program, str(again)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    version, family, ids = result.stdout.strip().split(" ", 2)
    assert version.startswith("4.57.") and family == "llama"
    assert json.loads(ids) == load_tokenizer(again)("0321").input_ids


# ------------------------------------------------------------------------------------- containers


ROPE = dict(rope_type="default", rope_theta=1e4)
CONTAINERS = {
    "Mistral3": dict(
        text_config=dict(TEXT, model_type="llama"),
        vision_config=dict(SIZES, model_type="pixtral", image_size=8, patch_size=4, head_dim=8),
        image_token_index=3,
    ),
    "Gemma3": dict(
        text_config=dict(TEXT, model_type="gemma3_text", head_dim=8, sliding_window=4)
        | dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(SIZES, model_type="siglip_vision_model", image_size=8, patch_size=4),
        mm_tokens_per_image=4,
        image_token_id=3,
        tie_word_embeddings=True,
    ),
    "Qwen3_5": dict(
        text_config=dict(TEXT, model_type="qwen3_5_text", head_dim=8, num_hidden_layers=2)
        | dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=1)
        | dict(linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=6)
        # With less, states near zero would be scaled up a thousand times, rounding and all.
        | dict(rms_norm_eps=1e-3)
        | dict(rope_parameters=dict(ROPE, partial_rotary_factor=0.5, mrope_section=[1, 1, 0])),
        vision_config=dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=8)
        | dict(patch_size=4, out_hidden_size=16, num_position_embeddings=16),
        image_token_id=3,
    ),
}
CONTAINERS["Qwen3_5Moe"] = CONTAINERS["Qwen3_5"] | dict(
    text_config=CONTAINERS["Qwen3_5"]["text_config"]
    | dict(model_type="qwen3_5_moe_text", num_experts=4, num_experts_per_tok=2)
    | dict(moe_intermediate_size=8, shared_expert_intermediate_size=12)
)
# Layers for drafts of several tokens, which the hub's folders have and transformers leaves out.
DRAFTS = {"mtp.fc.weight": np.ones((2, 3), np.float32)}


def with_experts_together(tensors):
    """As the hub's folders have them; transformers writes each expert's."""
    together, apart = {}, re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
    parts = {key: found for key in tensors if (found := apart.fullmatch(key))}
    for prefix in {found[1] for found in parts.values()}:
        gate, up, down = (
            np.stack([tensors[f"{prefix}{expert}.{name}_proj.weight"] for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        together[f"{prefix}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        together[f"{prefix}down_proj"] = down
    return {key: value for key, value in tensors.items() if key not in parts} | together


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_containers_decoder_is_trained_and_the_rest_carried(name, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install torch")
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **dict(tie_word_embeddings=False) | CONTAINERS[name]
    )
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    model = kind(config).eval()
    folder, again = tmp_path / "model", tmp_path / "again"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if name.startswith("Qwen3_5"):
        save_file(with_experts_together(load_file(folder / FILE)) | DRAFTS, folder / FILE)
    character_tokenizer("0123").save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(4, 32, (2, 9))

    def theirs(model):
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()

    source = open_source(folder)
    graph, shapes = random_model(source.config)
    params = load_params(folder, source.config, shapes, None, jnp.float32)

    def ours(params):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens))

    np.testing.assert_allclose(ours(params), theirs(model), atol=1e-4)
    trained = jax.tree.map(lambda x: 1.1 * x, params)
    arguments = trained, source.config, source.hf_config, folder, jnp.float32
    export_model(again, *arguments, source=source, max_shard_bytes=4000)
    reloaded, info = kind.from_pretrained(again, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(theirs(reloaded.eval()), ours(trained), atol=1e-4)
    assert source.others and (
        not name.startswith("Qwen3_5") or DRAFTS.keys() < source.others.keys()
    )
    written = {k: v for path in again.glob("*.safetensors") for k, v in load_file(path).items()}
    assert written.keys() == load_file(folder / FILE).keys() or name == "Qwen3_5Moe"
    for key, tensor in source.others.items():
        np.testing.assert_array_equal(written[key], tensor.read(np.s_[:,] * len(tensor.shape)))


def test_a_container_of_an_unknown_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    whole = dict(model_type="gemma3", text_config=config, architectures=["Gemma3ForAudio"])
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"must be \['Gemma3ForConditionalGeneration'\]"):
        load_model_config(folder)
