"""Draws docs/images/{architecture,step,slots,loss-memory}.svg.

    python -m benchmarks.linear_divergence --topology=v6e --json=runs/v6e.json
    python -m benchmarks.pictures --loss=runs/v6e.json

The slots are those of a real request to the built-in student, and the bars are what the first
command's JSON says of memory.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from distill.data.arithmetic import ArithmeticDataset
from distill.data.tokenizer import end_ids, load_tokenizer, vocabulary_size
from distill.models.checkpoints.hub import resolve_model
from distill.models.checkpoints.load import load_params
from distill.models.checkpoints.source import load_model_config
from distill.models.transformer import Transformer
from distill.sampling import engine as engines
from distill.sampling import schedule
from distill.sampling.choice import SamplingParams
from distill.sampling.request import RolloutRequest

IMAGES = Path(__file__).parents[1] / "docs/images"
STUDENT, TEACHER, HOST, LOSS = "#cfe3f5", "#fbd9c4", "#ececec", "#d9ead3"
INK = "#333333"


@dataclasses.dataclass(frozen=True)
class Box:
    """A labelled rectangle around (x, y)."""

    x: float
    y: float
    text: str
    color: str = HOST
    width: float = 2.2
    height: float = 0.8

    def draw(self, axes: Axes) -> None:
        corner = self.x - self.width / 2, self.y - self.height / 2
        style = dict(boxstyle="round,pad=0.05", facecolor=self.color, edgecolor=INK, linewidth=0.8)
        axes.add_patch(FancyBboxPatch(corner, self.width, self.height, **style))
        axes.text(self.x, self.y, self.text, ha="center", va="center", fontsize=8, color=INK)


def arrow(axes: Axes, start: tuple, end: tuple, text: str = "", bend: float = 0.0) -> None:
    style = dict(arrowstyle="-|>", color=INK, linewidth=0.9, shrinkA=0, shrinkB=0)
    style["connectionstyle"] = f"arc3,rad={bend}"
    axes.annotate("", end, start, arrowprops=style)
    if text:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1
        axes.text(*middle, text, ha="center", va="bottom", fontsize=7, color=INK)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width * 0.75, height * 0.75), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def draw_step() -> Figure:
    """The way of one batch: prompts, rollouts, rows, loss, update."""
    figure, axes = canvas(13.4, 4.6)
    for box in (
        Box(1.3, 3.4, "prompts\n(Grain, exact resume)"),
        Box(4.3, 3.4, "sampler: slots,\nprefill, decode", STUDENT),
        Box(7.3, 3.4, "sequences: ragged,\nnamed columns"),
        Box(10.3, 3.4, "rows: packed,\nshifted, masked"),
        Box(4.3, 1.1, "student\nhidden states", STUDENT),
        Box(7.3, 1.1, "teacher\nhidden states", TEACHER),
        Box(10.3, 1.1, "fused loss: both heads,\na chunk of tokens at a time", LOSS, width=2.7),
        Box(1.3, 1.1, "update\n(optax)", STUDENT),
    ):
        box.draw(axes)
    arrow(axes, (2.5, 3.4), (3.1, 3.4))
    arrow(axes, (5.5, 3.4), (6.1, 3.4), "rollouts")
    arrow(axes, (8.5, 3.4), (9.1, 3.4))
    arrow(axes, (9.6, 2.9), (5.4, 1.55))
    arrow(axes, (10.0, 2.9), (8.2, 1.6))
    arrow(axes, (8.5, 1.1), (8.85, 1.1))
    arrow(axes, (4.6, 0.6), (9.3, 0.6), bend=0.12)
    arrow(axes, (11.0, 0.6), (1.3, 0.6), bend=-0.09)
    arrow(axes, (1.6, 1.6), (3.6, 2.9), "refit: cast and reshard")
    axes.text(
        12.9,
        2.25,
        "one jitted,\nsharded program\nbelow this line",
        ha="right",
        fontsize=7,
        color=INK,
    )
    axes.axhline(2.15, color=INK, linewidth=0.6, linestyle=":")
    return figure


LAYERS = (
    ("commands", "main, evaluate, generate, export, plan, preflight, report"),
    ("trainer", "the run, top to bottom"),
    ("checks | planning", "preflight | does it fit, how fast could it be"),
    ("build", "config sections to parts: one session for all commands"),
    ("run", "checkpoints, log, signals"),
    ("evaluation | reporting", "accuracy, divergences, responses token by token | report.html"),
    ("step", "train state, loss, one jitted update"),
    ("batches", "sequences, packing, rows"),
    ("teachers | rollout", "on the mesh, on servers | in process, vLLM"),
    ("losses | sampling", "divergences, objective | slots, prefill, decode"),
    ("models", "one decoder, families as facts, checkpoints"),
    ("kernels | data | config", "fused loss, attention | sources, prompts | schema, parsing"),
    ("base", "errors, files, sharding, processes"),
)


def draw_architecture() -> Figure:
    """The folders in layers: imports point down only."""
    height = len(LAYERS) * 0.62 + 0.3
    figure, axes = canvas(12.0, height)
    for i, (name, text) in enumerate(LAYERS):
        y = height - 0.45 - 0.62 * i
        core = name in ("trainer", "step", "batches", "losses | sampling", "models")
        Box(2.0, y, name, STUDENT if core else HOST, width=3.4, height=0.36).draw(axes)
        axes.text(4.0, y, text, va="center", fontsize=8, color=INK)
    arrow(axes, (0.12, height - 0.4), (0.12, 0.3))
    return figure


class WatchedRun(schedule.Run):
    """Remembers which response had which slot, decode step by decode step."""

    watched: list[tuple[np.ndarray, int]] = []
    _width = 0

    def _narrow(self) -> int:
        self._width = super()._narrow()
        return self._width

    def _decode(self) -> None:
        before, steps = self._row.copy(), self._slot_steps
        super()._decode()
        # Rows may move together before the call: those are drawn where they were.
        made = (self._slot_steps - steps) // (self._parts * self._width)
        self.watched.append((before[0], made))


def draw_slots() -> Figure:
    """Slots over decode steps: a color for each response, white where a slot is idle."""
    source = resolve_model("embedded:arithmetic-student")
    config, _ = load_model_config(source)

    def construct():
        rngs = nnx.Rngs(0)
        return Transformer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)

    graph, shapes = nnx.split(nnx.eval_shape(construct), nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = jax.tree.map(lambda _: device, shapes)
    params = load_params(source, config, shapes, layout, jnp.float32)
    tokenizer = load_tokenizer(source)
    engine = engines.Engine(
        graph,
        engines.EngineConfig(max_length=80, num_slots=8),
        eos_ids=end_ids(tokenizer, source),
        pad_id=tokenizer.pad_token_id,
        vocab_size=vocabulary_size(tokenizer),
    )
    problems = ArithmeticDataset("train", 0, None)
    chosen = np.random.default_rng(0).integers(0, len(problems), 32)
    texts = [problems[int(i)].prompt for i in chosen]
    prompts = tuple(np.array(ids, np.int32) for ids in tokenizer(texts)["input_ids"])
    request = RolloutRequest(prompts, np.arange(32), SamplingParams(max_length=48))
    WatchedRun.watched.clear()
    with mock.patch.object(engines, "Run", WatchedRun):
        engine.generate(params, request)
    columns = [row for row, steps in WatchedRun.watched for _ in range(steps)]
    grid = np.stack(columns, axis=1).astype(float)
    shown = np.where(grid < 0, np.nan, (grid * 7) % 20)
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shown, aspect="auto", cmap="tab20", interpolation="nearest")
    axes.set(xlabel="decode steps", ylabel="slot", title="32 responses in 8 slots")
    return figure


def draw_loss_memory(path: Path) -> Figure:
    """Peak memory of the loss by implementation, from the benchmark's JSON."""
    rows = json.loads(path.read_text())
    bytes_of = {(row["name"], row["implementation"]): row["peak_bytes"] for row in rows}
    problems = list(dict.fromkeys(problem for problem, _ in bytes_of))
    names = list(dict.fromkeys(name for _, name in bytes_of))
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    for j, name in enumerate(names):
        sizes = [bytes_of[problem, name] / 1e9 for problem in problems]
        places = np.arange(len(problems)) + j / (len(names) + 1)
        bars = axes.barh(places, sizes, 0.8 / (len(names) + 1), label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set(xlabel="GB beyond the inputs", yticks=np.arange(len(problems)) + 0.3)
    axes.set_yticklabels(problems, fontsize=7)
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    return figure


def main(_) -> None:
    pictures = {"architecture": draw_architecture, "step": draw_step, "slots": draw_slots}
    if LOSS_JSON.value:
        pictures["loss-memory"] = lambda: draw_loss_memory(Path(LOSS_JSON.value))
    with rc_context({"svg.hashsalt": "distill", "svg.fonttype": "none"}):
        for name, draw in pictures.items():
            draw().savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    LOSS_JSON = flags.DEFINE_string("loss", None, "JSON of benchmarks.linear_divergence.")
    app.run(main)
