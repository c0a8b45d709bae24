"""What smollm2_test.py looks at: `python smollm2_greedy.py FOLDER PROMPT.npy LENGTH OUTPUT.npz`.

Writes the greedy response of the engine, and the logits at every position of both. In a process of
its own, on one device, in programs that the compiler takes its time for: 30 layers of width 576 are
no toy.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.data.tokenizer import end_ids, load_tokenizer, vocabulary_size
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.transformer import Transformer
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest


def main(folder: Path, prompt_t: np.ndarray, length: int, output: Path) -> None:
    config, _ = load_model_config(folder)
    dtypes = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **dtypes))
    graph, abstract = nnx.split(shapes)
    params = load_params(folder, config, abstract, None, jnp.float32)
    tokenizer = load_tokenizer(folder)
    engine = Engine(
        graph,
        EngineConfig(max_length=len(prompt_t) + length, num_slots=1),
        eos_ids=end_ids(tokenizer, folder),
        pad_id=tokenizer.pad_token_id,
        vocab_size=vocabulary_size(tokenizer),
    )
    sampling = SamplingParams(max_length=length, greedy=True)
    rollout, _ = engine.generate(params, RolloutRequest((prompt_t,), np.arange(1), sampling))
    response_r = rollout.tokens_br[0, : rollout.lengths_b[0]]

    @jax.jit
    def logits(params, tokens_bt):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens_bt))[0]

    logits_tv = logits(params, np.concatenate([prompt_t, response_r])[None])
    np.savez(output, response_r=response_r, logits_tv=logits_tv)


if __name__ == "__main__":
    main(Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
