"""A teacher with another tokenizer: cuts, log-probabilities of texts, and the train step."""

import contextlib
import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from step_test import LAYOUTS, assert_same, make_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.objectives import objective_of
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.sharding import param_shardings
from distill.batches.packing import Layout, Shape
from distill.batches.rows import make_batch
from distill.build.devices import put_batch
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.data.token_bytes import bytes_of_tokens
from distill.data.tokenizer import Vocabulary, train_bpe_tokenizer
from distill.step import TeacherInStep, TrainState, make_loss, make_train_step
from distill.teachers.alignment import Alignment

END, ROOM = "<e>", 99
ROWS, LENGTH, EXCESS = 8, 16, 16


def wrapped(tokenizer, **tokens) -> Vocabulary:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, **tokens
    )
    return Vocabulary(fast, len(fast), (fast.eos_token_id,))


def byte_level(*words: str, merges=(), **tokens) -> Vocabulary:
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, **tokens)


def sentence_piece() -> Vocabulary:
    """As Llama 2's: a space before every text, bytes for what it does not know."""
    words = [END, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "é"]
    merges = [("a", "b"), ("▁", "ab")]
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, merges, byte_fallback=True, fuse_unk=False
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(tokenizer)


BPE = byte_level(END, "a", "b", "ab", "Ġ", "aab", merges=[("a", "b"), ("a", "ab")])
CHARACTERS = byte_level("b", "Ġ", "a", END)  # the same in another order
BYTES = byte_level(
    *sorted(pre_tokenizers.ByteLevel.alphabet()), END, "<x>", additional_special_tokens=["<x>"]
)


def align(student, teacher, spans=True) -> Alignment:
    return Alignment(student, teacher, (Path("s"), Path("t")), spans)


def ids(vocabulary, *tokens: str) -> list[int]:
    return vocabulary.tokenizer.convert_tokens_to_ids(list(tokens))


def cut(alignment, tokens: list[int], most: int = ROOM, start: int = 3):
    """The teacher's tokens with the student's number of the first, and 0 or the span's size."""
    view = alignment.recut(Sequences.of_tokens([tokens]), np.array([start]), np.array([most]))
    texts = alignment.teacher.tokenizer.convert_ids_to_tokens(view["tokens"].tolist())
    return list(
        zip(texts, (view["piece"] - start).tolist(), view["piece_size"].tolist(), strict=True)
    )


def test_cuts():
    coarse, fine = align(CHARACTERS, BPE), align(BPE, CHARACTERS)
    response = ids(CHARACTERS, "a", "Ġ", "a", "a", "b", "b", END)
    expected = [("a", 0, 0), ("Ġ", 1, 0), ("aab", 2, 3), ("b", 5, 0), (END, 6, 0)]
    assert cut(coarse, response) == expected
    response = ids(BPE, "aab", "b", "ab")
    expected = [("a", 0, 1), ("a", 0, 1), ("b", 0, 1), ("b", 1, 0), ("a", 2, 1), ("b", 2, 1)]
    assert cut(fine, response) == expected
    assert cut(fine, ids(BPE, END)) == [(END, 0, 0)]
    # A token that both have, which the text is not cut into.
    assert cut(align(BPE, BPE), ids(BPE, "a", "b", "a")) == [("ab", 0, 2), ("a", 2, 0)]
    view = fine.recut(Sequences.of_tokens([response]), np.array([3]), np.array([ROOM]))
    np.testing.assert_allclose(fine.shares(4, view), (0.25, 0.5, 0.25))


def test_only_whole_pieces_are_read_where_there_is_no_room():
    fine, response = align(BPE, CHARACTERS), ids(BPE, "b", "aab", "b", END)
    assert [len(cut(fine, response, most)) for most in range(8)] == [0, 1, 1, 1, 4, 5, 6, 6]
    # The teacher's first token is a space that the text does not have.
    spaced, response = align(BPE, sentence_piece()), ids(BPE, "b", "a", END)
    assert [len(cut(spaced, response, most)) for most in range(6)] == [0, 0, 2, 3, 4, 4]


def test_a_response_is_read_up_to_the_first_character_that_the_teacher_does_not_know():
    tokenizer = Tokenizer(models.BPE({END: 0, "a": 1}, [], unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    teacher = wrapped(tokenizer)
    assert cut(align(BPE, teacher), ids(BPE, "b", "a", END)) == []
    assert cut(align(BPE, teacher), ids(BPE, "a", "b", END)) == [("a", 0, 0)]


@pytest.mark.parametrize(
    ("tail", "read"),
    [
        ([b"\xc3", b"\xa9"], "é"),
        ([b"\xc3"], ""),  # ends within a character
        ([b"a", b"\xff", b"a"], "a"),  # no text; nothing behind it is read
        (["<x>", b"a"], ""),
    ],
)
def test_a_response_is_read_up_to_what_is_no_text(tail, read):
    table = bytes_of_tokens(BYTES, "bytes")
    tail = [ids(BYTES, x)[0] if isinstance(x, str) else table.index(x) for x in tail]
    tokens = [*(table.index(bytes([byte])) for byte in "日a".encode()), *tail, *ids(BYTES, END)]
    whole = ("日a" + read).encode()
    found = cut(align(BYTES, BYTES), tokens)
    ends = read == "é"
    assert b"".join(table[ids(BYTES, text)[0]] or b"" for text, *_ in found) == whole
    assert len(found) == len(whole) + ends and not any(size for *_, size in found)
    # Of several bytes one token: a span, which ends with the character.
    other = align(BYTES, sentence_piece())
    assert [size for text, _, size in cut(other, tokens) if text == "é"] == [2] * ends


def test_sentence_piece():
    pieces, fine = sentence_piece(), align(CHARACTERS, sentence_piece())
    table = bytes_of_tokens(pieces, "sp")
    assert table[:3] == [None, b"\x00", b"\x01"] and table[-3:] == [b"ab", b" ab", "é".encode()]
    # The space that it puts before a text is no part of the response, and makes another token.
    assert cut(fine, ids(CHARACTERS, "a", "b", "Ġ", "a", "b", END)) == [
        ("▁ab", 0, 2), ("▁ab", 2, 3), (END, 5, 0),
    ]  # fmt: skip
    back = cut(align(pieces, BYTES), ids(pieces, "▁ab", "<0xC3>", "<0xA9>", END))
    assert [(piece, size) for _, piece, size in back] == [(0, 1)] * 3 + [(1, 0), (2, 0), (3, 0)]


def test_what_spells_a_control_token_is_text_to_the_teacher():
    spelled = list(b"<x>")
    table = bytes_of_tokens(BYTES, "bytes")
    plain = byte_level(*sorted(pre_tokenizers.ByteLevel.alphabet()), END)
    tokens = [bytes_of_tokens(plain, "plain").index(bytes([byte])) for byte in spelled]
    found = cut(align(plain, BYTES), tokens)
    assert [table[ids(BYTES, text)[0]] for text, *_ in found] == [b"<", b"x", b">"]


def test_ends_are_a_pair_by_what_they_are():
    bpe = train_bpe_tokenizer(["aab " * 4], 300)
    student = Vocabulary(bpe, len(bpe), (bpe.eos_token_id, bpe.pad_token_id))
    both = align(student, CHARACTERS)
    (end,) = ids(CHARACTERS, END)
    assert both.pairs_v[bpe.eos_token_id] == end and (both.pairs_v >= 0).sum() == 4
    # So is another end, whose place is in the bucket.
    assert cut(both, [bpe.pad_token_id]) == [(END, 0, 0)]
    places = both.shared.teacher_v[both.shared.shared_v]
    assert sorted(places) == [0, 1, 2, 3]


def test_tokens_without_exact_bytes_are_refused():
    tokenizer = Tokenizer(models.WordLevel({END: 0, "a": 1}, unk_token=END))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(
        UserError, match="of folder have no exact bytes .its tokenizer's decoder: W"
    ):
        bytes_of_tokens(wrapped(tokenizer), "folder")


# ------------------------------------------------------------------------------------- in the step


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of the student, and their view."""

    alignment: Alignment
    sequences: Sequences
    prompts: Prompts

    @classmethod
    def of(cls, alignment, responses, prompts, view_prompts, **columns):
        both = zip(prompts, responses, strict=True)
        tokens = [np.array([*prompt, *response], np.int32) for prompt, response in both]
        weight = [[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses, strict=True)]
        weight = np.concatenate(weight).astype(np.float32)
        number = np.arange(len(tokens))
        sequences = Sequences.of_tokens(tokens, weight=weight, sampled=weight > 0, row=number)
        made = Prompts(
            number, [np.array(p, np.int32) for p in prompts], None, {}, 0,
            view_tokens=[np.array(p, np.int32) for p in view_prompts],
            recut=alignment.recut, recut_excess=EXCESS,
        )  # fmt: skip
        return cls(alignment, sequences.with_columns(**columns), made)

    @property
    def view(self) -> Sequences:
        return self.prompts.view(self.sequences)

    def batch(self, layout: Layout):
        layout = dataclasses.replace(layout, view_excess=self.prompts.view_excess)
        return make_batch(self.sequences, layout=layout, pad_id=0, view=self.view)

    @property
    def rows(self):
        return jax.tree.map(lambda x: x[0], self.batch(padded(1, len(self.sequences)))[0])

    @property
    def shared(self):
        return self.alignment.shared


def padded(microbatches: int, rows: int = ROWS) -> Layout:
    return Layout((Shape(rows // microbatches, LENGTH),))


def random_case(student, teacher, **columns) -> Case:
    rng = np.random.default_rng(5)
    (end,) = student.end_ids
    text = [i for i in range(student.size) if i != end]
    responses = [[*rng.choice(text, rng.integers(1, 9)), end][:8] for _ in range(ROWS)]
    prompts = [rng.choice(text, rng.integers(1, 5)) for _ in range(ROWS)]
    return Case.of(align(student, teacher), responses, prompts, [[1] * 3] * ROWS, **columns)


@pytest.fixture(scope="module")
def small():
    return make_model(16, 1, 8, seed=1, num_kv_heads=4)


@pytest.fixture(scope="module")
def large():
    return make_model(32, 1, 10, seed=2, tied=False, num_kv_heads=4)


def loss_and_gradient(student, teacher, objective, rows, size, shared=None, total=1.0):
    loss_fn = make_loss(student[0], teacher[0], objective, vocab_size=size, shared=shared)
    program = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return program(student[1], teacher[1], rows, jnp.float32(total))


@pytest.mark.parametrize("kl_type", ["forward", "jsd"])
def test_the_same_tokenizer_is_the_plain_path(small, large, kl_type):
    case = random_case(CHARACTERS, CHARACTERS)
    case = dataclasses.replace(
        case, prompts=dataclasses.replace(case.prompts, view_tokens=case.prompts.prompt_tokens)
    )
    objective = objective_of(kl_type, teacher_advantage=0.5, cross_entropy=0.1)
    (loss, sums), gradient = loss_and_gradient(
        small, large, objective.aligned(True), case.rows, CHARACTERS.size, case.shared
    )
    plain = make_batch(case.sequences, layout=padded(1), pad_id=0)[0]
    plain = jax.tree.map(lambda x: x[0], plain)
    (expected, known), plain_gradient = loss_and_gradient(
        small, large, objective, plain, CHARACTERS.size
    )
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert sums["teacher_log_prob"] == pytest.approx(float(known["teacher_log_prob"]), rel=1e-5)
    assert_same(gradient, plain_gradient)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _log_probs(graph, params, tokens_bt, size):
    module = nnx.merge(graph, params)
    log_p_btv = jax.nn.log_softmax(module.logits(module(tokens_bt))[:, :-1, :size])
    return jnp.take_along_axis(log_p_btv, tokens_bt[:, 1:, None], axis=-1)[..., 0]


def log_probs_of(model, sequences, size):
    """log p of every token but the first of each, by a plain pass; what is behind says nothing."""
    tokens_bt = np.zeros((len(sequences), 24), np.int32)
    for row, tokens in zip(tokens_bt, sequences, strict=True):
        row[: len(tokens)] = tokens
    found = np.asarray(_log_probs(*model, tokens_bt, size))
    return [row[: len(tokens) - 1] for row, tokens in zip(found, sequences, strict=True)]


@pytest.mark.parametrize(("student", "teacher"), [(BPE, CHARACTERS), (CHARACTERS, BPE)])
def test_log_probability_of_a_text_is_exact(small, large, student, teacher):
    case = random_case(student, teacher)
    objective = objective_of("reverse").aligned(True)
    (_, sums), _ = loss_and_gradient(small, large, objective, case.rows, student.size, case.shared)
    read = []
    pairs = zip(case.prompts.prompt_tokens, case.sequences.split("tokens"), strict=True)
    for prompt, tokens in pairs:  # as a text, cut by the teacher's own tokenizer
        response = tokens[len(prompt) :].tolist()
        text = student.tokenizer.decode(response, skip_special_tokens=True)
        again = teacher.tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = teacher.end_ids if tokens[-1] in student.end_ids else ()
        read.append([1, 1, 1, *again, *ends])
    expected = sum(log_p[2:].sum() for log_p in log_probs_of(large, read, teacher.size))
    assert (case.rows.columns["span"] > 0).any() and (case.rows.columns["span"] == 0).any()
    assert sums["teacher_log_prob"] == pytest.approx(expected, rel=1e-5)


def test_expected_gradient_is_that_of_the_enumerated_reverse_kl(small, large):
    """Over all responses of two tokens, whose teacher reads characters.

    Every token of the student ends with one of the teacher's: that a span ends is known by then.
    """
    size, (end,) = BPE.size, BPE.end_ids
    pairs = itertools.product(range(size), repeat=2)
    responses = list(dict.fromkeys((a,) if a == end else (a, b) for a, b in pairs))
    prompts = [[1, 2]] * len(responses)
    case = Case.of(align(BPE, CHARACTERS), responses, prompts, [[2, 0, 1]] * len(responses))
    of_teacher = np.zeros((len(responses), 2))
    seen = case.view
    log_probs = log_probs_of(large, seen.split("tokens"), CHARACTERS.size)
    for row, log_p, piece in zip(of_teacher, log_probs, seen.split("piece"), strict=True):
        np.add.at(row, piece[piece >= 0] - 2, log_p[piece[1:] >= 0])  # of the bytes of each token
    padded_tokens = np.array([[1, 2, *r, *[0] * (2 - len(r))] for r in responses])
    there = np.array([[True, len(r) == 2] for r in responses])

    def log_q(params):
        module = nnx.merge(small[0], params)
        log_q_btv = jax.nn.log_softmax(module.logits(module(padded_tokens))[:, 1:3, :size])
        found = jnp.take_along_axis(log_q_btv, padded_tokens[:, 2:, None], axis=-1)[..., 0]
        return jnp.where(there, found, 0.0)

    def reverse_kl(params):
        """Sum of the places' KL(q||p), whose prefixes are as likely as they are."""
        log_q_bt = log_q(params)
        before_b = jax.lax.stop_gradient(log_q_bt[:, 0])
        first = jnp.exp(log_q_bt[:, 0]) * (log_q_bt[:, 0] - of_teacher[:, 0])
        # A first token is listed as often as there are second ones.
        first = first / jnp.where(there[:, 1], size, 1)
        second = jnp.exp(before_b + log_q_bt[:, 1]) * (log_q_bt[:, 1] - of_teacher[:, 1])
        return first.sum() + jnp.where(there[:, 1], second, 0.0).sum()

    likely_b = np.exp(np.asarray(jax.jit(log_q)(small[1])).sum(axis=1))
    assert likely_b.sum() == pytest.approx(1, abs=1e-5)
    weight = case.sequences["weight"] * np.repeat(likely_b, case.sequences.lengths_b)
    case = dataclasses.replace(case, sequences=case.sequences.with_columns(weight=weight))
    objective = objective_of("reverse", divergence=0.0, teacher_advantage=1.0)
    _, gradient = loss_and_gradient(
        small, large, objective.aligned(True), case.rows, size, case.shared
    )
    expected = jax.jit(jax.grad(reverse_kl))(small[1])
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1, np.abs(wanted).max()))
    assert np.abs(jax.tree.leaves(expected)[0]).max() > 1e-3


OPTIMIZER = optax.sgd(1.0)  # the update is the gradient


@pytest.fixture(scope="module")
def updates(small, large):
    """The state and metrics of an update by layout, made once."""
    case = random_case(BPE, CHARACTERS)
    teacher = TeacherInStep(large[0], name="", shared=case.shared, spans=True)
    objective = objective_of("jsd", teacher_advantage=0.5)
    step = make_train_step(small[0], [teacher], objective, OPTIMIZER, vocab_size=BPE.size)

    def update(layout, mesh=None):
        params, weights, batch = small[1], large[1], case.batch(layout)
        if mesh:
            params, weights = (
                jax.device_put(x, param_shardings(x, mesh)) for x in (params, weights)
            )
            batch = put_batch(mesh, batch)
        params = jax.tree.map(jnp.copy, params)
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            state = TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))
            state, metrics = step(state, [weights], batch)
        return jax.device_get((state.params, metrics))

    return update, update(padded(1))


@pytest.mark.parametrize("name", ["microbatches", "packed", "mesh"])
def test_an_update_does_not_depend_on_how_the_batch_is_cut(updates, name):
    update, (expected, known) = updates
    packed = dataclasses.replace(LAYOUTS["packed into microbatches"], shapes=(Shape(2, 24),))
    layout = {"microbatches": padded(4), "packed": packed}.get(name, padded(1))
    params, metrics = update(layout, make_mesh(2, 2, 2) if name == "mesh" else None)
    assert_same(params, expected)
    cuts = [f"teacher/{cut}" for cut in ("cut_alike", "in_spans", "left_out")]
    for key in ("loss", "teacher_log_prob", *cuts):
        assert metrics[key] == pytest.approx(float(known[key]), rel=1e-4, abs=1e-6)
    assert (
        sum(known[cut] for cut in cuts) == pytest.approx(1) and min(known[c] for c in cuts[:2]) > 0
    )


def test_what_the_data_said_has_no_spans(small, large):
    """Its tokens were not sampled: a policy gradient would estimate nothing."""
    objective = objective_of("reverse").aligned(True)
    alike = objective_of("reverse").aligned(False)
    case = random_case(BPE, CHARACTERS, sampled=False)
    options = small, large, objective, case.rows, BPE.size, case.shared
    (found, _), _ = loss_and_gradient(*options)
    (expected, _), _ = loss_and_gradient(*options[:2], alike, *options[3:])
    assert found == expected > 0
