"""Loads and exports a checkpoint, and prints the memory that took, as JSON; see loading_test.py.

python tests/models/loading_run.py FOLDER OUTPUT [PROCESS COUNT PORT]
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.mesh import make_mesh
from distill.base.sharding import param_shardings
from distill.data.tokenizer import character_tokenizer
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.transformer import Transformer


def kilobytes(field: str) -> int:
    """VmRSS is what is resident now, VmHWM the most that ever was since `forget_peak`."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return int(line.split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(folder, output, process=0, count=1, port=0):
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
    config, hf_config = load_model_config(folder)

    def construct():
        return Transformer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    shapes = nnx.state(nnx.eval_shape(construct), nnx.Param)
    shardings = param_shardings(shapes, make_mesh(data=1, fsdp=-1, tensor=1))

    def load():
        return jax.block_until_ready(load_params(folder, config, shapes, shardings, jnp.float32))

    load()  # compiles, which takes memory too
    assert ".safetensors" not in Path("/proc/self/maps").read_text()
    forget_peak()
    start = kilobytes("VmRSS")
    params = load()
    loading, loaded = kilobytes("VmHWM"), kilobytes("VmRSS")
    forget_peak()
    export_model(
        output, params, config, hf_config, character_tokenizer("0123"), jnp.float32,
        max_shard_bytes=50e6,
    )  # fmt: skip
    held = [shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards]
    peaks = dict(loading=loading - start, exporting=kilobytes("VmHWM") - loaded)
    print(json.dumps({"held": sum(held), **{k: 1024 * v for k, v in peaks.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
