"""What the TPU compiler makes of an experts' product and its gradient by the experts' matrix.

    python -m benchmarks.grouped_dot [--topology=v6e:2x2]   (needs no TPU, and runs nothing)

Of 32,768 rows, sorted by 128 experts of 2,048 x 768, in bfloat16. `kernels` are Mosaic's. The
compiler counts a loop's body once: of `blockwise`, that is one block of a few hundred.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import harness
from distill.base.mesh import make_mesh
from distill.base.topology import described_tpu
from distill.config import cli
from distill.kernels.grouped_dot import _outer_products

ROWS, WIDTH, OUTPUTS, EXPERTS = 32768, 2048, 768, 128
TILES = 512, 1024, 768  # of megablox: rows, columns of x and of the product

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "A slice of the TPUs to compile for.")


def main() -> None:
    mesh = make_mesh(devices=described_tpu(_TOPOLOGY.value)[:1])
    layout = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout)

    x_mk, w_gkn, dy_mn = shape(ROWS, WIDTH), shape(EXPERTS, WIDTH, OUTPUTS), shape(ROWS, OUTPUTS)
    sizes_g = shape(EXPERTS, dtype=jnp.int32)

    def xlas_gradient(w_gkn, x_mk, dy_mn, sizes_g):
        _, pull = jax.vjp(lambda w_gkn: jax.lax.ragged_dot(x_mk, w_gkn, sizes_g), w_gkn)
        return pull(dy_mn)

    def blockwise(x_mk, dy_mn, sizes_g):
        return _outer_products(x_mk, dy_mn[:, None], sizes_g).astype(w_gkn.dtype)

    def by_gmm(x_mk, w_gkn, sizes_g):
        return gmm(x_mk, w_gkn, sizes_g, w_gkn.dtype, TILES)

    def by_tgmm(x_mk, dy_mn, sizes_g):
        return tgmm(x_mk.T, dy_mn, sizes_g, w_gkn.dtype, TILES)

    cases = {
        "product: ragged_dot": (jax.lax.ragged_dot, x_mk, w_gkn, sizes_g),
        "product: megablox": (by_gmm, x_mk, w_gkn, sizes_g),
        "gradient: XLA's": (xlas_gradient, w_gkn, x_mk, dy_mn, sizes_g),
        "gradient: blockwise": (blockwise, x_mk, dy_mn, sizes_g),
        "gradient: megablox": (by_tgmm, x_mk, dy_mn, sizes_g),
    }
    with jax.set_mesh(mesh):
        harness.print_rows([_row(name, *case) for name, case in cases.items()])


def _row(name: str, function, *shapes: jax.ShapeDtypeStruct) -> harness.Row:
    compiled = jax.jit(function).lower(*shapes).compile()
    counted, text = compiled.cost_analysis(), compiled.as_text()
    return {
        "name": name,
        "kernels": str(text.count('custom_call_target="tpu_custom_call"')),
        "TFLOP": f"{counted['flops'] / 1e12:.3f}",
        "GB_moved": f"{counted['bytes accessed'] / 1e9:.3f}",
        "GB_of_temporaries": f"{compiled.memory_analysis().temp_size_in_bytes / 1e9:.3f}",
    }


if __name__ == "__main__":
    cli.run(main)
