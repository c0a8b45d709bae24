"""Does a server compute with the weights that the trainer has? Answered by log-probabilities.

A refit is believed only when the server's log-probabilities of fixed tokens are the trainer's. A
small update may move them by less than the two programs differ in bfloat16, so each refit is held
to more than closeness:

- Before the first refit it is rehearsed with other weights: all halved, the head negated. A server
  that keeps any old weight, a tied head above all, is then far off, in any precision.
- The first true weights must undo the rehearsal as exactly.
- After that, a server whose answer to the probe is the old one bit for bit, although the trainer's
  changed, did not take the new weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base.errors import RunStopped
from distill.base.sharding import constrain_whole
from distill.rollout.vllm.client import VllmClient

_LENGTH, _ROWS = 32, 4
# Share of the distance between two sets of weights by which a server may miss the new ones.
_MISS = 0.1
_FLOAT32_LIMIT = 0.01  # nats; programs in float32 differ by about 1e-5
REMEDY = (
    "start the server from a folder of `python -m distill.export_server`, which has an output head "
    "of its own"
)


class Probe:
    """Fixed tokens, scored by the trainer's model and by servers.

    `row_multiple`: parts into which the mesh splits rows. `max_gap`: mean |nats| by which trainer
    and server may differ.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        *,
        vocab_size: int,
        max_length: int,
        row_multiple: int,
        max_gap: float,
        float32: bool,
    ):
        rows = row_multiple * -(-_ROWS // row_multiple)
        shape = rows, max(2, min(_LENGTH, max_length))
        self.tokens_bt = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
        self._precision = "float32" if float32 else "bfloat16"
        self._max_gap = min(max_gap, _FLOAT32_LIMIT) if float32 else max_gap
        # By URL, the last that was measured and expected.
        self._before: dict[str, tuple[np.ndarray, np.ndarray]] = {}

        def log_probs(body, head, tokens_bt):
            model = nnx.merge(graph, body)
            logits_btv = model.logits(model(tokens_bt), head)
            real_v = jnp.arange(logits_btv.shape[-1]) < vocab_size
            log_probs_btv = jax.nn.log_softmax(jnp.where(real_v, logits_btv, -jnp.inf))
            chosen_bt1 = jnp.take_along_axis(log_probs_btv[:, :-1], tokens_bt[:, 1:, None], axis=-1)
            return constrain_whole(chosen_bt1[..., 0].astype(jnp.float32))

        def true(params, tokens_bt):
            return log_probs(params, nnx.merge(graph, params).head(), tokens_bt)

        def rehearsed(params, tokens_bt):
            halved = jax.tree.map(lambda x: x * 0.5, params)
            negated = jax.tree.map(jnp.negative, nnx.merge(graph, params).head())
            return log_probs(halved, negated, tokens_bt)

        self._true, self._rehearsed = jax.jit(true), jax.jit(rehearsed)

    def expected(self, params: nnx.State) -> np.ndarray:
        """The trainer's log-probabilities, float32 (rows, tokens - 1)."""
        return np.asarray(self._true(params, self.tokens_bt))

    def expected_in_rehearsal(self, params: nnx.State) -> np.ndarray:
        """The same of the weights that `weights.rehearse` makes."""
        return np.asarray(self._rehearsed(params, self.tokens_bt))

    def look(self, client: VllmClient, expected: np.ndarray) -> np.ndarray:
        """The server's log-probabilities; it is remembered what was expected at the time."""
        # One row after another: idle otherwise, a server computes alike every time.
        scores = [client.score(row_t.tolist()) for row_t in self.tokens_bt]
        measured = np.array([[log_probs[0] for _, log_probs in row] for row in scores], np.float32)
        self._before[client.url] = measured, expected
        return measured

    def verify(self, client: VllmClient, expected: np.ndarray, *, far_apart: bool) -> float:
        """Mean |nats| between server and trainer after a refit; see `check`."""
        before = self._before.get(client.url)
        measured = self.look(client, expected)
        return self.check(client.url, measured, expected, before, far_apart=far_apart)

    def check(
        self,
        url: str,
        measured: np.ndarray,
        expected: np.ndarray,
        before: tuple[np.ndarray, np.ndarray] | None,
        *,
        far_apart: bool,
    ) -> float:
        """Mean |nats| between server and trainer.

        `before` was measured and expected before this refit; `far_apart`: those weights, or these,
        are the rehearsal's.

        Raises:
          RunStopped: the server does not compute with the new weights; names the likely causes.
        """
        gap, limit = _gap(measured, expected), self._max_gap
        stale = False
        if before is not None and np.mean(before[1] != expected) > 0.5:
            if far_apart:
                limit = min(limit, max(_MISS * _gap(before[1], expected), 1e-5))
            stale = np.array_equal(measured, before[0])
        if gap <= limit and not stale:
            return gap
        if stale:
            cause = (
                "its answer is the old one to the last bit: it answered that it reloaded, and kept "
                "the old weights; restart it, and see its log"
            )
        else:
            cause = (
                "it did not take the new output head, as vLLM does not if the model ties it to the "
                "embedding, or it has another model, or other weights, or does not compute in "
                f"policy.precision={self._precision} (--dtype {self._precision}): {REMEDY}, and "
                "check that nobody else refits it"
            )
        raise RunStopped(
            f"after a refit, {url} and the trainer differ by {gap:.2g} nats per token (allowed: "
            f"{limit:.2g}): {cause}"
        )


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |a - b|; NaN where either has one, which no limit allows."""
    return float(np.mean(np.abs(a - b)))
