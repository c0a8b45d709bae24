"""What a chunk's logits may be kept in between matrix product and sweeps: float32 or bfloat16?

    python -m benchmarks.logit_precision [--json=PATH]

bfloat16 would halve the memory traffic of the sweeps. The table has the error of the divergence and
of its gradient by the logits when the logits of both models are rounded, everything else being
float64: relative to the mean divergence, and to the gradient's norm. `shifted` subtracts each
token's largest logit first, which makes likely tokens exact and rounds the unlikely ones; a kernel
would have to guess that maximum, and do no better. `difference` keeps the teacher's shifted logits
and what the student's differ from them. Rounding the finished gradient to bfloat16, which its
matrix products take it in anyway, is the yardstick in the last row.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from distill.config import cli

TOKENS, VOCAB_SIZE, WIDTH = 64, 151936, 512
# Student and teacher differ by this much noise in the hidden state: from a fresh student to one
# that is nearly done.
NOISE = (1.0, 0.3, 0.1, 0.03)


def rounded(x, dtype):
    return np.asarray(x, np.float32).astype(jnp.dtype(dtype)).astype(np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def forward_kl(logits_s, logits_t):
    """(divergence per token, gradient by the student's logits)."""
    log_p, log_q = log_softmax(logits_t), log_softmax(logits_s)
    p, q = np.exp(log_p), np.exp(log_q)
    return (p * (log_p - log_q)).sum(-1), q - p


def shifted(logits):
    return logits - logits.max(-1, keepdims=True)


def difference(logits_s, logits_t):
    teacher = rounded(shifted(logits_t), "bfloat16")
    return teacher + rounded(shifted(logits_s) - shifted(logits_t), "bfloat16"), teacher


# What the sweeps see of (logits_s, logits_t).
STASHES = {
    "float32": lambda *logits: [rounded(x, "float32") for x in logits],
    "bfloat16": lambda *logits: [rounded(x, "bfloat16") for x in logits],
    "bfloat16, shifted": lambda *logits: [rounded(shifted(x), "bfloat16") for x in logits],
    "bfloat16, shifted, difference": difference,
}


def rows_of(noise: float) -> list[dict]:
    rng = np.random.default_rng(0)
    head = rng.standard_normal((WIDTH, VOCAB_SIZE)) * 4 / np.sqrt(WIDTH)
    hidden_t = rng.standard_normal((TOKENS, WIDTH))
    hidden_s = hidden_t + noise * rng.standard_normal((TOKENS, WIDTH))
    logits = hidden_s @ head, hidden_t @ head
    divergence, gradient = forward_kl(*logits)
    results = {name: forward_kl(*stash(*logits)) for name, stash in STASHES.items()}
    results["gradient to bfloat16"] = divergence, rounded(gradient, "bfloat16")
    return [
        dict(
            name=f"forward KL {divergence.mean():.3f}",
            implementation=name,
            divergence_error=np.abs(actual - divergence).mean() / divergence.mean(),
            gradient_error=np.linalg.norm(slope - gradient) / np.linalg.norm(gradient),
        )
        for name, (actual, slope) in results.items()
    ]


def main() -> None:
    harness.check_json_path()
    rows = [row for noise in NOISE for row in rows_of(noise)]
    harness.print_rows(rows)
    harness.write_json(rows)


if __name__ == "__main__":
    cli.run(main)
