"""Memory of the host while a checkpoint of 430 MB is loaded and exported, in fresh processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import model_config

from benchmarks.hf_config import hf_config_dict
from distill.models.checkpoints.keys import mapped_params
from distill.models.transformer import Transformer

MB = 1e6
SLACK = 16 * MB  # interpreter, threads and small arrays
CONFIG = model_config(
    vocab_size=8192,
    num_layers=8,
    model_width=1024,
    num_heads=16,
    num_kv_heads=4,
    head_width=64,
    ffn_width=2816,
    tied=False,
)
SIZES = dict(v=8192, d=1024, n=16, k=4, h=64, f=2816)
LARGEST = 8192 * 1024 * 4
EXPORT_FILE = 50 * MB
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("loading_run.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, int]:
    """Folder and bytes of a checkpoint with a file for every layer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random = np.random.default_rng(0)
    files: dict[str, dict] = {}
    options = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    model = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), **options))
    for weight, _ in mapped_params(CONFIG, nnx.state(model, nnx.Param)).values():
        shape = weight.hf_shape(tuple(SIZES[axis] for axis in weight.ours))
        for index, key in weight.tensors((CONFIG.num_layers,)):
            tensor = random.standard_normal(shape, np.float32)
            file = f"layer-{index[0] if index else 0}.safetensors"
            files.setdefault(file, {})[key] = tensor
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {key: name for name, tensors in files.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_config = hf_config_dict(CONFIG, eos_token_id=1, pad_token_id=0)
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder, sum(x.nbytes for tensors in files.values() for x in tensors.values())


def start(*arguments, devices: int) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{SCRIPT.parents[2]}:{SCRIPT.parents[1]}",
        # Freed arrays go back to the system, instead of being kept for the next one.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict[str, int]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    # Gloo speaks before, and may go on in the same line.
    result, _ = json.JSONDecoder().raw_decode(output[output.index('{"held"') :])
    print(result)
    return result


def assert_same_weights(folder: Path, exported: Path) -> None:
    """Tensor by tensor, over all files of both."""

    def tensors(folder):
        return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}

    ours, theirs = tensors(exported), tensors(folder)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def check(result: dict[str, int], held: float, gathered_on: int = 0) -> None:
    """This host's shards and the largest tensor; in an export, one file more.

    A tensor is exported by way of the host, where it is transposed; what other hosts hold of it
    comes by way of the devices, whose memory is the host's here.
    """
    assert result["held"] == pytest.approx(held, rel=0.01)
    assert held * 0.95 < result["loading"] < held + LARGEST + SLACK
    assert result["exporting"] < EXPORT_FILE + (2 + gathered_on) * LARGEST + SLACK


def test_host_that_holds_everything(checkpoint, tmp_path):
    folder, size = checkpoint
    result = finish(start(folder, tmp_path / "exported", devices=8))
    check(result, size)
    assert_same_weights(folder, tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("model-*-of-*.safetensors"))) > 5


def test_two_hosts_hold_half_each(checkpoint, tmp_path):
    folder, size = checkpoint
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "exported"
    processes = [start(folder, output, rank, 2, port, devices=4) for rank in range(2)]
    for process in processes:
        check(finish(process), size / 2, gathered_on=4)
    assert_same_weights(folder, output)
