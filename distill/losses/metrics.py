"""Metrics of the user's own of every training step, found by name.

    @register_step_metric("confident")
    def confident(statistics, columns):
        return statistics.log_prob_s > -0.1

`logger.step_metrics=confident` then logs its mean over the response tokens of each step. The
arguments are those of a weight (weights.py): (tokens,) each, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable

from distill.base.registry import Registry
from distill.kernels.linear_divergence.token_losses import TokenWeight
from distill.losses.weights import check_tokenwise

_METRICS = Registry("logger.step_metrics", "distill.losses.metrics.register_step_metric")


def register_step_metric(name: str) -> Callable[[TokenWeight], TokenWeight]:
    """Decorator: makes f(statistics, columns) a metric; UserError when the name is taken."""
    return _METRICS.register(name, takes=("statistics", "columns"))


def get_step_metric(name: str) -> TokenWeight:
    """The metric registered under `name`; UserError when there is none, or it cannot run."""
    metric = _METRICS.get(name)
    check_tokenwise(f"logger.step_metrics={name}", metric)
    return metric
