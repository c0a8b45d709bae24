"""Time and peak memory of the linear divergence: value, and gradients of hidden states and head.

    python -m benchmarks.linear_divergence [--json=PATH] [--repeats=N]
    python -m benchmarks.linear_divergence --topology=v6e [--json=PATH]   (v5e, v5p; needs no TPU)

How to read it. `naive` is what one would write without this project: both logits, two log_softmax,
automatic differentiation, compiled by XLA; products in the dtype of the row, softmax in float32.
`ratio` and `peak_ratio` are parts of naive's time and memory at the same inputs in the same run:
below 1 is better. `seconds` is a median of interleaved repeats; `peak_bytes` is what a run adds to
the inputs, its results included. `of_product_rate` is the rate of the matrix products that the loss
cannot do without, T V (6 Ds + 2 Dt) operations, relative to that of the plain product in the row
`matrix product`.

On a GPU also Liger Kernel's chunked JSD, if torch, triton and liger-kernel are installed: the same
inputs' shapes, dtype and results, no weight on its loss of hard labels (which it computes all the
same), its own chunk size. It takes the softmax of bfloat16 logits, ours are float32.

With --topology, the compiler's estimates for one chip of a TPU: `seconds` see harness.estimate;
`peak_bytes` are the program's temporaries; `of_optimum` is seconds over T V (6 Ds + 2 Dt) / the
chip's peak rate; `products` is what it multiplies over the same number of operations, which shows
that loops were counted to their end.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import harness
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.topology import CHIPS, Chip, described_tpu
from distill.config import cli
from distill.kernels.linear_divergence import linear_divergence
from distill.losses.divergences import get_divergence

PRODUCT = "matrix product"
DIVERGENCES = {"forward KL": "forward", "JSD(0.5)": "jsd"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """T tokens, both widths, both heads' columns, and how many of those columns are vocabulary."""

    tokens: int
    width_s: int
    width_t: int
    columns_s: int
    columns_t: int
    vocab_size: int
    dtype: str
    divergence: str = "forward KL"

    @property
    def name(self) -> str:
        widths = f"Ds={self.width_s} Dt={self.width_t} V={self.vocab_size}"
        return f"{self.divergence} T={self.tokens} {widths} {self.dtype}"

    @property
    def product_flops(self) -> int:
        """Student: logits and two gradients; teacher: logits; 2 operations per multiplication."""
        return self.tokens * self.vocab_size * (6 * self.width_s + 2 * self.width_t)

    def shapes(self, sharding=None) -> list[jax.ShapeDtypeStruct]:
        """hidden_s, head_s, hidden_t, head_t, weights."""
        student = (self.tokens, self.width_s), (self.width_s, self.columns_s)
        teacher = (self.tokens, self.width_t), (self.width_t, self.columns_t)
        arrays = [(shape, self.dtype) for shape in (*student, *teacher)]
        arrays.append(((self.tokens,), "float32"))
        return [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]


CPU_PROBLEM = Problem(512, 256, 512, 151936, 151936, 151936, "float32")  # what a CPU trains in
GPU_PROBLEMS = [
    Problem(tokens, 1536, 5120, 151936, 151936, 151936, "bfloat16")
    for tokens in (4096, 8192, 16384)
]
LIGER_PROBLEMS = [
    Problem(tokens, 2048, 4096, 128256, 128256, 128256, "bfloat16", "JSD(0.5)")
    for tokens in (8192, 16384)
]
TPU_PROBLEM = Problem(16384, 1536, 5120, 151936, 152064, 151665, "bfloat16")


ONE_OF = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # a slice that has the chip

_ONLY = flags.DEFINE_string("only", "", "Only cases whose name contains this, e.g. T=8192.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each implementation.", lower_bound=1)
_TOPOLOGY = flags.DEFINE_enum(
    "topology", None, list(ONE_OF), "Estimate for one chip of this TPU instead of measuring here."
)


def main() -> None:
    harness.check_json_path()
    if _TOPOLOGY.value:
        rows, notes = estimated(_TOPOLOGY.value, _ONLY.value)
    else:
        rows, notes = measured(_ONLY.value, _REPEATS.value)
    if not rows:
        raise UserError(f"--only={_ONLY.value}: no case has that in its name")
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def measured(only: str, repeats: int) -> tuple[list[harness.Row], list[str]]:
    """Rows measured on this machine's device, and what to say below them."""
    platform = harness.select_platform()
    problems = [CPU_PROBLEM] if platform == "cpu" else GPU_PROBLEMS
    implementations = ["naive", "chunked"]
    notes = []
    if platform == "cpu":
        notes.append("pallas is left out: a CPU can only interpret its kernels")
    else:
        implementations.append("pallas")
    cases = [(problem, jobs(problem, implementations)) for problem in with_divergences(problems)]
    if missing := _missing_for_liger(platform):
        notes.append(f"Liger is left out: it needs {missing}")
    else:
        cases += [
            (problem, jobs(problem, implementations) + liger_jobs(problem))
            for problem in LIGER_PROBLEMS
        ]
    rows = []
    for problem, case_jobs in cases:
        if only in problem.name:
            measurements = harness.measure(case_jobs, repeats)
            rows += _measured_rows(problem, measurements)
            notes += harness.failures(problem.name, measurements)
    return rows, notes


def with_divergences(problems: list[Problem]) -> list[Problem]:
    return [
        dataclasses.replace(problem, divergence=divergence)
        for problem in problems
        for divergence in DIVERGENCES
    ]


def jobs(problem: Problem, implementations: list[str]) -> list[harness.Job]:
    own = [harness.Job(name, build, (problem, name)) for name in implementations]
    return [*own, harness.Job(PRODUCT, harness.build_matrix_product, _product(problem.dtype))]


def _product(dtype: str) -> tuple[int, str]:
    """Size and dtype of the yardstick: large enough for the full rate, 0.5 s on two CPU cores."""
    return (4096 if dtype == "float32" else 16384), dtype


def _measured_rows(problem: Problem, measurements) -> list[harness.Row]:
    rows = harness.compare(problem.name, measurements, "naive")
    product_seconds = measurements[PRODUCT].seconds
    for row in rows:
        row["of_product_rate"] = None
        if row["implementation"] != PRODUCT and row["seconds"] and product_seconds:
            rate = 2 * _product(problem.dtype)[0] ** 3 / product_seconds
            row["of_product_rate"] = problem.product_flops / row["seconds"] / rate
    return rows


def build(problem: Problem, implementation: str):
    """The function to time: value and gradients once, on the default device."""
    # Compiled before the inputs exist: see harness.peak_bytes.
    step = jax.jit(value_and_gradients(problem, implementation))
    compiled = step.lower(*problem.shapes()).compile()
    arrays = _inputs(problem)

    def run():
        jax.block_until_ready(compiled(*arrays))

    return run


def value_and_gradients(problem: Problem, implementation: str):
    """(hidden_s, head_s, hidden_t, head_t, weights) -> loss, (hidden_s', head_s')."""
    divergence = get_divergence(DIVERGENCES[problem.divergence])

    def naive(hidden_s, head_s, hidden_t, head_t, weights):
        # Heads are cut, not logits: the compiler makes faster programs of it.
        log_q = _log_softmax(hidden_s, head_s[:, : problem.vocab_size])
        log_p = _log_softmax(hidden_t, head_t[:, : problem.vocab_size])
        return jnp.sum(weights * jnp.sum(divergence(log_p, log_q), axis=-1))

    def ours(*arrays):
        loss, _ = linear_divergence(
            *arrays,
            divergence=divergence,
            vocab_size=problem.vocab_size,
            implementation=implementation,
        )
        return loss

    return jax.value_and_grad(naive if implementation == "naive" else ours, argnums=(0, 1))


def _log_softmax(hidden, head):
    # Logits in the operands' dtype: then the gradients' products run in it too, not in float32.
    return jax.nn.log_softmax((hidden @ head).astype(jnp.float32))


def _inputs(problem: Problem) -> list[jax.Array]:
    """Random logits of standard deviation 2, each token of the same weight."""
    *shapes, weights = problem.shapes()
    scales = [1.0, 2.0 * problem.width_s**-0.5, 1.0, 2.0 * problem.width_t**-0.5]
    # Jitted, so that nothing larger than the result exists in between.
    normal = jax.jit(
        lambda key, scale, shape: (scale * jax.random.normal(key, shape.shape)).astype(shape.dtype),
        static_argnums=2,
    )
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [normal(*each) for each in zip(keys, scales, shapes, strict=True)]
    return [*arrays, jnp.full(weights.shape, 1 / problem.tokens, weights.dtype)]


def _missing_for_liger(platform: str) -> str | None:
    if platform != "gpu":
        return "a GPU"
    packages = {"torch": "torch", "triton": "triton", "liger_kernel": "liger-kernel"}
    missing = [name for module, name in packages.items() if not importlib.util.find_spec(module)]
    return "pip install " + " ".join(missing) if missing else None


def liger_jobs(problem: Problem) -> list[harness.Job]:
    return [
        harness.Job(name, build_liger, (problem, compiled), harness.torch_peak_bytes)
        for name, compiled in (("liger", False), ("liger compiled", True))
    ]


def build_liger(problem: Problem, compiled: bool):
    """The function to time: Liger's loss and its backward pass."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, device="cuda", dtype=getattr(torch, problem.dtype))

    hidden_s = normal(problem.tokens, problem.width_s).requires_grad_()
    hidden_t = normal(problem.tokens, problem.width_t)
    head_s = normal(problem.columns_s, problem.width_s, scale=2.0 * problem.width_s**-0.5)
    head_s.requires_grad_()
    head_t = normal(problem.columns_t, problem.width_t, scale=2.0 * problem.width_t**-0.5)
    labels = torch.zeros(problem.tokens, device="cuda", dtype=torch.long)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled
    )

    def run():
        loss(hidden_s, head_s, hidden_t, head_t, labels, None, None).backward()
        torch.cuda.synchronize()
        hidden_s.grad = head_s.grad = None  # fresh results in every run, as JAX has them

    return run


def estimated(chip_name: str, only: str) -> tuple[list[harness.Row], list[str]]:
    """Rows of the compiler's estimates for one chip, and what to say below them."""
    chip = CHIPS[chip_name]
    mesh = make_mesh(devices=described_tpu(ONE_OF[chip_name])[:1])
    rows, notes = [], [f"{chip_name}: the compiler's estimates, nothing was measured"]
    for problem in with_divergences([TPU_PROBLEM]):
        if only in problem.name:
            estimates = _estimates(problem, mesh)
            rows += _estimated_rows(problem, estimates, chip)
            notes += harness.failures(problem.name, estimates)
    return rows, notes


def _estimates(problem: Problem, mesh):
    shapes = problem.shapes(NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        return {
            name: harness.estimate(value_and_gradients(problem, name), *shapes)
            for name in ("naive", "chunked", "pallas")
        }


def _estimated_rows(problem: Problem, estimates, chip: Chip) -> list[harness.Row]:
    rows = harness.compare(problem.name, estimates, "naive")
    for row in rows:
        estimate = estimates[row["implementation"]]
        row["of_optimum"] = row["products"] = None
        if row["seconds"]:
            row["of_optimum"] = row["seconds"] / (problem.product_flops / chip.flops)
            row["products"] = estimate.flops / problem.product_flops
    return rows


if __name__ == "__main__":
    cli.run(main)
