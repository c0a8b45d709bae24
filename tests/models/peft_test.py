"""Adapters as peft loads them, and as we load them again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_test import random_adapters
from models_test import FAMILIES, OTHERS, load, make_case, torch_logits

from distill.base.errors import UserError
from distill.config.policy import Lora
from distill.models import lora
from distill.models.checkpoints.export_adapter import check_modules, export_adapter
from distill.models.checkpoints.source import load_model_config

CASES = {
    "qwen2": Lora(rank=3, alpha=6.0),
    "phi3": Lora(rank=2, alpha=6.0),  # whose tensors hold several of our matrices
    "mixtral": Lora(rank=2, alpha=6.0),  # whose experts peft finds in one tensor
    "phi3 partly": Lora(rank=2, alpha=6.0, targets=("v_proj", "up_proj", "o_proj")),
}


@pytest.mark.parametrize("name", CASES)
def test_peft_and_we_load_what_we_write(name, tmp_path):
    """Logits equal to 1e-5, and the same matrices where the folder is a model's path."""
    peft = pytest.importorskip("peft", reason="peft is the reference; pip install peft")
    family, settings = name.split()[0], CASES[name]
    case = make_case(family, tmp_path / "base", **(FAMILIES | OTHERS)[family])
    graph, params = nnx.split(case.model, nnx.Param)
    adapters = jax.tree.map(lambda x: 0.3 * x, random_adapters(params, settings))
    folder = tmp_path / "adapter"
    for _ in range(2):  # the second replaces the first
        export_adapter(
            folder,
            params,
            adapters,
            case.config,
            settings,
            base=dict(base_model_name_or_path=str(case.folder)),
            name=lambda key: key,
            tokenizer=case.folder,
            card="A card.",
        )
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["r"] == settings.rank and (folder / "README.md").read_text() == "A card."
    merged = lora.merged(lora.attach(params, adapters), jnp.float32)
    model = nnx.merge(graph, merged)
    tokens_bt = np.random.default_rng(0).integers(1, 60, (2, 9))
    ours = model.logits(model(tokens_bt))
    before = case.model.logits(case.model(tokens_bt))
    theirs = torch_logits(peft.PeftModel.from_pretrained(case.torch_model, folder), tokens_bt)
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale)
    assert np.abs(ours - before).max() > 0.01 * scale
    again = nnx.state(load(folder, load_model_config(folder)[0]), nnx.Param)
    for one, other in zip(*map(jax.tree.leaves, (again, merged)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_matrices_that_are_no_modules_are_refused():
    from lora_test import config_of, shapes_of

    config = config_of("gpt_oss")
    _, params = shapes_of(config)
    experts = lora.abstract_adapters(params, Lora(rank=2))
    with pytest.raises(UserError, match="no place for adapters of .*expert_.* gpt_oss .*merged"):
        check_modules(config, experts)
    check_modules(config, lora.abstract_adapters(params, Lora(rank=2, targets=("q_proj",))))
