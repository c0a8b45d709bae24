"""Model folders: loading into shards, damaged checkpoints, finding models, exporting."""

import dataclasses
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import model_config

from benchmarks.hf_config import hf_config_dict
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.sharding import param_shardings
from distill.data.tokenizer import character_tokenizer
from distill.models.checkpoints import export as hf_export
from distill.models.checkpoints import hub, tensors
from distill.models.checkpoints import load as checkpoint_load
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.hub import resolve_model
from distill.models.checkpoints.keys import mapped_params
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import Experts, ModelConfig
from distill.models.rope import Llama3, Rope
from distill.models.transformer import Transformer

CONFIG = model_config(
    vocab_size=16,
    model_width=8,
    head_width=2,
    ffn_width=12,
    rope=Rope(1e4, Llama3(8.0, 1.0, 4.0, 32)),
)
HF_CONFIG = hf_config_dict(CONFIG, eos_token_id=1, pad_token_id=0)
Q_KEY = "model.layers.1.self_attn.q_proj.weight"


def abstract_params(config=CONFIG):
    def construct():
        return Transformer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    return nnx.state(nnx.eval_shape(construct), nnx.Param)


def random_params(config=CONFIG):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32),
        abstract_params(config),
    )


def export(folder, params, dtype=jnp.float32, **options):
    tokenizer = character_tokenizer("0123")
    export_model(folder, params, CONFIG, HF_CONFIG, tokenizer, dtype, **options)
    return folder


def load(folder, dtype=jnp.float32, mesh=None):
    shapes = abstract_params()
    shardings = param_shardings(shapes, mesh) if mesh else None
    return load_params(folder, CONFIG, shapes, shardings, dtype)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture
def folder(tmp_path, params):
    return export(tmp_path / "model", params)


def rewrite(folder, change):
    """Saves the checkpoint again after `change` has edited its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- loading ----


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_key_table_covers_the_parameters(family, tied):
    flags = dict(
        qkv_bias=family == "qwen2",
        qk_norm="head" if family == "qwen3" else None,
        tied=tied,
        family=family,
    )
    config = ModelConfig(**{**vars(CONFIG), **flags})
    params = abstract_params(config)
    paths = {"/".join(path) for path, _ in nnx.to_flat_state(params)}
    assert mapped_params(config, params).keys() == paths


@pytest.mark.parametrize("max_shard_bytes", [5e9, 400])
def test_load_is_the_inverse_of_export(tmp_path, params, max_shard_bytes):
    folder = export(tmp_path / "model", params, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if max_shard_bytes == 400:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert files == sorted(set(index["weight_map"].values()))
        assert f"model-00001-of-{len(files):05}.safetensors" in files
        sizes = [sum(x.nbytes for x in load_file(folder / name).values()) for name in files]
        assert sum(sizes) == index["metadata"]["total_size"]
        # 512 bytes: the embedding, which no split can make smaller.
        assert max(sizes) == 512 and len(files) < len(index["weight_map"])
    else:
        assert files == ["model.safetensors"]
    loaded = load(folder)
    assert_same(loaded, params)
    assert loaded["embedding"].get_metadata()["logical_axes"] == ("vocab", "embed")


def test_large_stacks_are_filled_on_the_devices(folder, params, monkeypatch):
    monkeypatch.setattr(checkpoint_load, "_PIECE_BYTES", 0)
    assert_same(load(folder), params)


def test_every_expert_has_a_key(tmp_path):
    experts = Experts(3, 2, 12, normalized=True)
    config = dataclasses.replace(CONFIG, family="qwen3_moe", qkv_bias=False, experts=experts)
    params, key = random_params(config), "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    folder = tmp_path / "model"
    export_model(folder, params, config, HF_CONFIG, character_tokenizer("0"), jnp.float32)
    tensors = load_file(folder / "model.safetensors")
    gate_up, down = (params["layers"][f"expert_{x}_proj"][...] for x in ("gate_up", "down"))
    for layer, expert in np.ndindex(2, 3):
        for x, name in zip(
            (*gate_up[layer, expert], down[layer, expert]), ("gate", "up", "down"), strict=True
        ):
            np.testing.assert_array_equal(tensors[key.format(layer, expert, name)], x.T)
    shapes = abstract_params(config)
    for shardings in (None, param_shardings(shapes, make_mesh(data=2, fsdp=2, tensor=2))):
        assert_same(load_params(folder, config, shapes, shardings, jnp.float32), params)
    rewrite(folder, lambda tensors: tensors.pop(key.format(1, 2, "up")))
    with pytest.raises(UserError, match=r"lacks .*layers\.1\.mlp\.experts\.2"):
        load_params(folder, config, shapes, None, jnp.float32)


def test_a_parameter_without_a_row_is_an_error(tmp_path, params):
    layers = nnx.State({**params["layers"], "another": params["layers"]["q_proj"]})
    with pytest.raises(ValueError, match="no Hugging Face key is known for layers/another"):
        export(tmp_path / "model", nnx.State({**params, "layers": layers}))


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_stored_dtypes_are_converted(tmp_path, params, stored):
    folder = export(tmp_path / "model", params, stored)
    assert load_file(folder / "model.safetensors")[Q_KEY].dtype == stored
    rounded = jax.tree.map(lambda x: x.astype(stored).astype(jnp.float32), params)
    assert_same(load(folder), rounded)
    loaded = load(folder, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), rounded))


def test_each_shard_is_read_once_and_nothing_else(folder, params, monkeypatch):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    read, read_slice = [], tensors.Stored.read

    def count(tensor, index):
        part = read_slice(tensor, index)
        read.append(part.size)
        return part

    monkeypatch.setattr(tensors.Stored, "read", count)
    loaded = load(folder, mesh=mesh)
    assert_same(loaded, params)
    assert loaded["layers"]["gate_proj"][...].addressable_shards[0].data.shape == (2, 4, 6)
    assert sum(read) == sum(x.size for x in jax.tree.leaves(params))
    assert max(read) == 16 * 8 // 4  # a quarter of the embedding


@pytest.mark.parametrize("axis", range(4))
def test_any_axis_can_be_sharded(folder, params, axis):
    mesh = make_mesh(data=4, fsdp=1, tensor=2)
    shapes = abstract_params()
    shardings = jax.tree.map(
        lambda x: NamedSharding(
            mesh, PartitionSpec(*["tensor" if i == axis else None for i in range(x.ndim)])
        ),
        shapes,
    )
    loaded = load_params(folder, CONFIG, shapes, shardings, jnp.float32)
    assert_same(loaded, params)
    if axis == 3:
        assert loaded["layers"]["q_proj"][...].addressable_shards[0].data.shape == (2, 8, 4, 1)


def test_redundant_keys_are_ignored(folder, params):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(1, np.float32)

    rewrite(folder, add)
    assert_same(load(folder), params)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(Q_KEY), f"lacks {Q_KEY}, which config.json calls for"),
        (
            lambda t: (t.pop(Q_KEY), t.pop("model.norm.weight")),
            f"lacks {Q_KEY} and 1 more keys",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": t["model.norm.weight"] + 0}),
            "model.safetensors has model.layers.0.mlp.gate_proj.bias, unknown for a qwen2 model",
        ),
        (
            lambda t: t.update({Q_KEY: np.zeros((8, 9), np.float32)}),
            f"model.safetensors: {Q_KEY} has shape (8, 9), config.json calls for (8, 8)",
        ),
        (
            lambda t: t.update({Q_KEY: np.zeros((8, 8), np.int8)}),
            f"model.safetensors: {Q_KEY} holds I8, only BF16, F16 and F32 can be read",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(folder, change, expected):
    rewrite(folder, change)
    with pytest.raises(UserError) as error:
        load(folder)
    assert expected in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("kept", [0, 100, -4])
def test_truncated_file_is_named(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors is not a readable safetensors file"):
        load(folder)


def test_missing_shard_is_named(tmp_path, params):
    folder = export(tmp_path / "model", params, max_shard_bytes=400)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is not a readable safetensors file"):
        load(folder)


def test_damaged_index_is_named(tmp_path, params):
    folder = export(tmp_path / "model", params, max_shard_bytes=400)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(UserError, match="index.json has no weight_map"):
        load(folder)


def test_key_in_two_files_is_refused(tmp_path, params):
    folder = export(tmp_path / "model", params, max_shard_bytes=400)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(UserError, match="model.embed_tokens.weight is in both"):
        load(folder)


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors are read"):
        load(folder)


# ---- finding ----


def test_folder_is_returned_as_it_is(folder):
    assert resolve_model(str(folder)) == folder
    config, hf_config = load_model_config(folder)
    assert config == CONFIG and hf_config["eos_token_id"] == 1


def test_path_that_is_no_model_folder(tmp_path, folder):
    with pytest.raises(UserError, match="has no config.json"):
        resolve_model(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        resolve_model(folder / "config.json")
    for name in (tmp_path / "absent", "./absent", "~/absent", "../absent", "a/b/c", ""):
        with pytest.raises(UserError, match="there is no folder|has no config.json"):
            resolve_model(name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object")],
)
def test_damaged_config_is_named(folder, content, expected):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json {expected}"):
        load_model_config(folder)


def test_unsupported_config_names_the_file(folder):
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=f"{folder}/config.json: hidden_act='relu'"):
        load_model_config(folder)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("someone/model", None),
        ("someone/model@v1.0", "v1.0"),
        ("someone/model@refs/pr/1", "refs/pr/1"),
    ],
)
def test_hub_models_are_downloaded_without_pickles(folder, monkeypatch, name, revision):
    asked = []

    def download(hub_id, revision, allow_patterns):
        asked.append(revision)
        assert hub_id == "someone/model" and "*.safetensors" in allow_patterns
        assert not any(pattern.endswith(("bin", "py", "pt", "*")) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model_config(name)[0] == CONFIG
    assert set(asked) == {revision}


def test_unreachable_hub_says_what_to_pass_instead(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as error:
        resolve_model("someone/model")
    message = str(error.value)
    assert "hub did not provide it (Name or service not known)" in message
    assert "pass a local folder with config.json and *.safetensors" in message
    assert "\n" not in message


def test_embedded_models_are_found_by_name(tmp_path, params, monkeypatch):
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    export(tmp_path / "tiny", params)
    assert resolve_model("embedded:tiny") == tmp_path / "tiny"
    with pytest.raises(UserError, match="'embedded:huge' in the package; available: embedded:tiny"):
        resolve_model("embedded:huge")
    with pytest.raises(UserError, match="available: embedded:tiny"):
        resolve_model("embedded:../tiny")


# ---- exporting ----


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_export_writes_a_complete_folder(tmp_path, params, name):
    hf_config = {**HF_CONFIG, "kept": None}
    del hf_config["torch_dtype"]
    hf_config[name] = "float32"
    folder = tmp_path / "new" / "model"
    export_model(
        folder,
        params,
        CONFIG,
        hf_config,
        character_tokenizer("0123"),
        jnp.bfloat16,
        generation_config={"eos_token_id": [1, 2]},
    )
    assert json.loads((folder / "config.json").read_text()) == {**hf_config, name: "bfloat16"}
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"eos_token_id": [1, 2]}
    assert (folder / "tokenizer.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_export_replaces_an_earlier_one(tmp_path, params):
    folder = export(tmp_path / "model", jax.tree.map(jnp.zeros_like, params), max_shard_bytes=400)
    export(folder, params)
    assert_same(load(folder), params)
    assert (
        not list(folder.glob("model-*")) and not (folder / "model.safetensors.index.json").exists()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_export_leaves_the_earlier_one(folder, params, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hf_export, "save_file", die)
        for target in (folder, folder.with_name("other")):
            with pytest.raises(Killed):
                export(target, jax.tree.map(jnp.zeros_like, params))
    assert_same(load(folder), params)
    assert not folder.with_name("other").exists()
    assert_same(load(export(folder.with_name("other"), params)), params)


def test_export_never_replaces_what_is_no_model(tmp_path, params):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(UserError, match="holds no config.json: export to another folder"):
        export(tmp_path, params)
    assert (tmp_path / "thesis.txt").exists()
