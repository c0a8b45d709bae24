"""The work of benchmarks/train_step.py and packing.py, as functions that their workers call.

`build_products` and `first_state` are distill_step.py's, too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.objectives import objective_of
from benchmarks.sampling_jobs import QWEN_CONFIG, SMALL_CONFIG, load_weights
from distill.batches.packing import Layout, Shape
from distill.batches.rows import Batch, Rows, make_batch
from distill.build.optimizer import build_optimizer
from distill.config.policy import Lora, Optimizer
from distill.data.sequences import Sequences
from distill.models.facts import ModelConfig
from distill.models.lora import abstract_adapters, make_adapters
from distill.models.quantization import quantized
from distill.step import TeacherInStep, TrainState, make_train_step

CPUS = 2
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Workload:
    """Two models and a batch."""

    title: str
    student: ModelConfig
    teacher: ModelConfig
    dtype: str
    rows: int
    prompt: int
    response: int
    microbatches: int
    matrix: int  # size of the product that measures the device's rate

    def sequences(self) -> Sequences:
        random = np.random.default_rng(0)
        prompt_lengths_b = random.integers(self.prompt // 4, self.prompt + 1, self.rows)
        lengths_b = random.integers(self.response // 4, self.response + 1, self.rows)
        tokens_br = random.integers(1, self.student.vocab_size, (self.rows, self.response))
        prompts_bp = random.integers(1, self.student.vocab_size, (self.rows, self.prompt))
        return join(prompts_bp, prompt_lengths_b, tokens_br, lengths_b)

    @property
    def row_length(self) -> int:
        return self.prompt + self.response

    def batch(self, packed: bool = False) -> Rows:
        """Microbatches of padded rows, or of half as many packed ones of twice the length."""
        rows = self.rows // self.microbatches
        shape = Shape(rows // 2, 2 * self.row_length) if packed else Shape(rows, self.row_length)
        return make_batch(self.sequences(), layout=Layout((shape,), packed), pad_id=0)[0]

    def dealt_batch(self, teachers: int) -> Batch:
        """Padded rows, whose sequences are dealt to so many teachers in turn."""
        layout = Layout((Shape(self.rows // self.microbatches, self.row_length),))
        return tuple(
            rows
            for each in range(teachers)
            for rows in make_batch(
                self.sequences().take(np.arange(each, self.rows, teachers)),
                layout=layout,
                pad_id=0,
                teacher=each,
                most=self.rows,
            )
        )

    def flops(self) -> float:
        """Of the real tokens: padding counts for nobody."""
        sequences = self.sequences()
        lengths, responses = sequences.lengths_b.astype(float), int(sequences["weight"].sum())
        total = 0.0
        for config, passes in ((self.student, 3), (self.teacher, 1)):
            products = 2 * sum(map(math.prod, linear_layers(config, lengths.sum(), responses)))
            # Scores and sums over the earlier half of all pairs, causally.
            heads = config.num_heads * config.head_width
            attention = 2 * config.num_layers * heads * (lengths**2).sum()
            total += passes * (products + attention)
        return total


def join(prompts_bp, prompt_lengths_b, tokens_br, lengths_b) -> Sequences:
    """Of padded prompts and padded responses."""

    def of_tokens(tokens_bx, lengths_b, weight: int) -> Sequences:
        rows = zip(tokens_bx, lengths_b, strict=True)
        return Sequences.of_tokens([tokens_x[:length] for tokens_x, length in rows], weight=weight)

    return of_tokens(prompts_bp, prompt_lengths_b, 0).join(of_tokens(tokens_br, lengths_b, 1))


def linear_layers(model: ModelConfig, tokens: int, responses: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every product of a forward pass; the head sees responses only."""
    d, f = model.model_width, model.ffn_width
    heads, kv_heads = (n * model.head_width for n in (model.num_heads, model.num_kv_heads))
    layer = (d, heads), (d, kv_heads), (d, kv_heads), (heads, d), (d, f), (d, f), (f, d)
    products = [(tokens, *sizes) for sizes in layer]
    return products * model.num_layers + [(responses, d, model.vocab_size)]


def build_products(
    student: ModelConfig, teacher: ModelConfig, dtype: str, tokens: int, responses: int
):
    """The products of one update alone, one after the other."""
    forward = jax.jit(lambda x, w: x @ w)
    to_inputs, to_weights = jax.jit(lambda y, w: y @ w.T), jax.jit(lambda x, y: x.T @ y)

    @functools.cache
    def array(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, dtype)

    calls = []
    for model, trained in ((student, True), (teacher, False)):
        for rows, inputs, outputs in linear_layers(model, tokens, responses):
            x, w, y = array(rows, inputs), array(inputs, outputs), array(rows, outputs)
            calls.append((forward, x, w))
            if trained:
                calls += [(to_inputs, y, w), (to_weights, x, y)]

    def run() -> None:
        for product, left, right in calls:
            product(left, right).block_until_ready()

    run()
    return run


CPU_WORKLOAD = Workload(
    "20M from 75M",
    SMALL_CONFIG,
    dataclasses.replace(SMALL_CONFIG, num_layers=12, model_width=768, num_heads=12, ffn_width=2048),
    "float32",
    rows=16,
    prompt=64,
    response=192,
    microbatches=4,
    matrix=2048,
)
GPU_WORKLOAD = Workload(
    "1.5B from 7B",
    QWEN_CONFIG,
    dataclasses.replace(
        QWEN_CONFIG,
        vocab_size=152064,
        num_layers=28,
        model_width=3584,
        num_heads=28,
        num_kv_heads=4,
        ffn_width=18944,
        tied=False,
    ),
    "bfloat16",
    rows=32,
    prompt=256,
    response=1792,
    microbatches=16,
    matrix=16384,  # so large that waiting for it hardly counts
)


def build_ours(
    workload: Workload, folder: Path, packed: bool, from_files: bool, loss: str | None = None
):
    state, step = make_state_and_step(workload, folder if from_files else None, loss)
    batch = (jax.device_put(workload.batch(packed)),)
    state, metrics = step(state, batch)
    check_same_loss(folder / "loss.txt", float(metrics["loss"]), workload.dtype)
    held = [state]

    def run():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return run


def check_same_loss(path: Path, loss: float, dtype: str) -> None:
    """The first one to come writes, the others compare."""
    if not path.exists():
        path.write_text(str(loss))
    first = float(path.read_text())
    if not np.isclose(loss, first, rtol=1e-4 if dtype == "float32" else 2e-2):
        raise RuntimeError(f"a loss of {loss} instead of {first}: not the same work")


def make_state_and_step(workload: Workload, folder: Path | None, loss: str | None = None):
    """The first train state, and `step(state, batch) -> (state, metrics)`; see `make_parts`."""
    state, teachers, step = make_parts(workload, folder, loss)
    return state, lambda state, batch: step(state, teachers, batch)


def make_parts(
    workload: Workload,
    folder: Path | None,
    loss: str | None = None,
    teachers: int = 1,
    lora: Lora = Lora(),  # noqa: B008
):
    """The first train state, the teachers' parameters and the jitted step.

    Weights are those of the folder's `student` and `teacher`, or random; `loss` is an
    implementation of it, None the default. With several teachers, all have the same weights.
    """
    student_folder, teacher_folder = (folder and folder / role for role in ("student", "teacher"))
    student, params = load_weights(workload.student, workload.dtype, student_folder, "float32")
    loaded = [
        load_weights(workload.teacher, workload.dtype, teacher_folder) for _ in range(teachers)
    ]
    adamw = Optimizer(learning_rate=LEARNING_RATE, warmup_steps=0, weight_decay=0.01)
    optimizer = build_optimizer(adamw, max_steps=1)
    step = make_train_step(
        student,
        [TeacherInStep(graph) for graph, _ in loaded],
        objective_of("forward", loss_implementation=loss or "auto"),
        optimizer,
        vocab_size=workload.student.vocab_size,
    )
    state = first_state(params, optimizer, workload.student, lora)
    return state, [teacher_params for _, teacher_params in loaded], step


def first_state(params, optimizer, config: ModelConfig, lora: Lora) -> TrainState:
    """Of all weights, or of adapters beside frozen ones."""
    trainable, frozen = params, nnx.State({})
    if lora.rank:
        trainable = make_adapters(abstract_adapters(params, lora), seed=0)
        frozen = params
        if lora.base_dtype == "int8":
            frozen = jax.jit(functools.partial(quantized, config))(params)
    opt_state = jax.jit(optimizer.init)(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, frozen)


def build_torch(workload: Workload, folder: Path, compiled: bool):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, workload.dtype)

    def load(role: str, dtype):
        model = AutoModelForCausalLM.from_pretrained(folder / role, dtype=dtype).to(device)
        return model.train() if role == "student" else model.eval()

    student, teacher = load("student", torch.float32), load("teacher", dtype)
    forward_s, forward_t = (torch.compile(m) if compiled else m for m in (student, teacher))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    batch = workload.batch()
    parts = [
        _torch_rows(jax.tree.map(lambda x, i=i: x[i], batch), device)
        for i in range(workload.microbatches)
    ]
    total = sum(int(mask.sum()) for _, _, mask in parts)

    def logits(model, tokens, given):
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return model(input_ids=tokens, attention_mask=given).logits

    def step() -> float:
        loss_sum = 0.0
        for tokens, given, mask in parts:
            with torch.no_grad():
                scores_t = logits(forward_t, tokens, given)[mask]
                log_p = scores_t[:, : workload.student.vocab_size].float().log_softmax(-1)
            log_q = logits(forward_s, tokens, given)[mask].float().log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            (loss / total).backward()
            loss_sum += loss.detach() / total
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss_sum)  # waits for the device

    check_same_loss(folder / "loss.txt", step(), workload.dtype)
    return step


def _torch_rows(rows: Rows, device: str):
    """Tokens, which are given, and at which positions a response token is predicted."""
    import torch

    given_bt = np.arange(rows.tokens_bt.shape[1]) < rows.lengths_b[:, None]
    arrays = rows.tokens_bt.astype(np.int64), given_bt.astype(np.int64), rows.mask_bt
    return tuple(torch.from_numpy(array).to(device) for array in arrays)
