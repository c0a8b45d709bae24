"""Will it fit, and how fast could it be: a plan before the bill, on any CPU host.

python -m distill.plan --config=configs/math_cl.py --topology=v5p:4x4x4

Compiles the run's own train step, prefill and decode loop ahead of time for TPUs (v5p:4x4x4,
v6e:8x8, v5e:16x16, tpu7x:2x2x1, ...) and for devices of this host (cpu:8), without loading
weights; for GPUs (gpu:h200x8) it estimates from shapes. Exit status: 0 it fits, 3 it does not, 2
the question makes no sense.
"""

import os
import sys

from absl import flags

from distill.config import cli

DOES_NOT_FIT = 3


def run() -> None:
    config_flag = cli.define_config_flag()
    topology = flags.DEFINE_string("topology", None, "What to plan for, such as v5p:4x4x4.")
    sweep = flags.DEFINE_bool("sweep", False, "Try meshes and microbatches; print the best.")

    def main() -> None:
        config = cli.required_config(config_flag)
        if not topology.value:
            raise cli.UserError(
                "pass --topology=NAME, e.g. v5p:4x4x4, v6e:8x8, gpu:h200x8 or cpu:8"
            )
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Imported late: a wrong flag should not wait for JAX.
        from distill.planning import run

        if not (run.sweep if sweep.value else run.plan)(config, topology.value).fits:
            sys.exit(DOES_NOT_FIT)

    cli.run(main)


if __name__ == "__main__":
    run()
