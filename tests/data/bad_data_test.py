"""Bad data: what is skipped and counted, what ends a run, and that no token is ever lost."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.base.errors import UserError
from distill.build.scratch import make_tokenizer
from distill.data.arithmetic import CHARACTERS
from distill.data.base import Dropped, Example, get_dataset
from distill.data.gsm8k import final_number
from distill.data.pipeline import make_train_iterator
from distill.data.prompts import Prompts
from distill.data.table import InMemoryDataset
from distill.data.tokenizer import character_tokenizer, train_bpe_tokenizer
from distill.data.tokenizing import tokenize_prompts
from distill.evaluation.rows import padded_rows

GOOD = b'{"prompt": "3+4", "response": "7"}'
BAD = {
    b'{"prompt": "b"': "not valid JSON",
    b"\x80\x81 not text": "not UTF-8 text",
    "{}".encode("utf-16"): "not UTF-8 text",
    b"[" * 100_000: "not valid JSON",
    b'{"prompt": ' + b"9" * 5000 + b"}": "not valid JSON",
    b'["a"]': "not a JSON object",
    b"null": "not a JSON object",
    b'{"question": "a"}': "no column prompt",
    b'{"prompt": null}': "prompt is empty",
    b'{"prompt": " \\n\\t"}': "prompt is empty",
    b'{"prompt": [{"role": "user", "content": " "}]}': "prompt is empty",
    b'{"prompt": [{"role": "assistant", "content": "a"}]}': "prompt ends with an answer",
    b'{"prompt": ["a"]}': "prompt is not text",
    b'{"prompt": [{"role": "user"}]}': "prompt is not text",
    b'{"prompt": [{"role": "user", "content": ["a"]}]}': "prompt is not text",
    b'{"prompt": "\\ud800"}': "prompt is not Unicode text",
    b'{"prompt": [{"role": "user", "content": "\\udc80"}]}': "prompt is not Unicode text",
    b'{"prompt": "a", "response": "\\ud800"}': "response is not Unicode text",
    b'{"prompt": "a", "answer": {"value": 1}}': "answer is not text",
}
FAST = settings(deadline=None, derandomize=True)


def write_lines(path, lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def read(path, **options) -> InMemoryDataset:
    return get_dataset("jsonl", "all", path=path, **options)


def test_every_kind_of_bad_row_is_counted_with_its_first_line(tmp_path):
    lines = [GOOD] * 20 + [line for line in BAD for _ in range(2)]
    dataset = read(write_lines(tmp_path / "d.jsonl", lines), max_bad_rows=0.9)
    assert len(dataset) == 20
    expected: dict[str, Dropped] = {}
    for number, line in enumerate(BAD):
        first = f"{tmp_path}/d.jsonl:{21 + 2 * number}"
        known = expected.get(BAD[line], Dropped(0, first))
        expected[BAD[line]] = Dropped(known.count + 2, known.first)
    assert dataset.bad_rows == expected
    prompts = tokenize_prompts(dataset, character_tokenizer(CHARACTERS), max_prompt_length=9)
    summary = prompts.summary()
    assert summary.startswith("20 prompts (1 distinct) of 4 to 4 tokens; dropped: ")
    for kind, drops in expected.items():
        assert f"{drops.count} {kind} (first {drops.first})" in summary


@pytest.mark.parametrize(
    ("rows", "bad", "passes"), [(200, 2, True), (199, 2, False), (99, 1, False)]
)
def test_more_than_one_in_a_hundred_is_an_error_that_names_them(tmp_path, rows, bad, passes):
    lines = [GOOD] * (rows - bad) + list(BAD)[:bad]
    path = write_lines(tmp_path / "d.jsonl", lines)
    if passes:
        assert len(read(path)) == rows - bad
        return
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert f"{bad} of {rows} rows of {path} are bad" in message
    assert "data.max_bad_rows=0.01" in message and "\n" not in message
    for number, line in enumerate(list(BAD)[:bad], start=rows - bad + 1):
        assert f"{path}:{number}: {BAD[line]}" in message


def test_error_names_the_first_five_and_stays_short(tmp_path):
    giant = b'{"%s": 1}' % (b"k" * 10**6)
    path = write_lines(tmp_path / "d.jsonl", [giant] * 9)
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert f"{path}:5: no column prompt" in message and "and 4 more" in message
    assert f"{path}:6" not in message and len(message) < 4000


def test_limits_of_the_share(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [GOOD, *BAD])
    assert len(read(path, max_bad_rows=1.0)) == 1
    with pytest.raises(UserError, match="are bad"):
        read(write_lines(tmp_path / "e.jsonl", [GOOD] * 999 + list(BAD)[:1]), max_bad_rows=0.0)
    with pytest.raises(UserError, match="has no rows"):
        read(write_lines(tmp_path / "f.jsonl", list(BAD)), max_bad_rows=1.0)


def test_byte_order_mark_is_no_error(tmp_path):
    assert len(read(write_lines(tmp_path / "d.jsonl", [b"\xef\xbb\xbf" + GOOD]))) == 1


def test_tables_skip_and_name_their_rows_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    prompts = pyarrow.array([b"3+4", b"caf\xe9", b" ", None], pyarrow.binary()).view("string")
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), path)
    dataset = get_dataset("parquet", "all", path=str(path), max_bad_rows=0.75)
    assert [dataset[i].prompt for i in range(len(dataset))] == ["3+4"]
    assert dataset.bad_rows == {
        "prompt is not Unicode text": Dropped(1, f"{path} row 1"),
        "prompt is empty": Dropped(2, f"{path} row 2"),
    }
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole Parquet file"):
        get_dataset("parquet", "all", path=str(path))


# ---- prompts that tokenizers should not see ----


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe_tokenizer(["what is three plus four", "seven"] * 9, 320)


@pytest.mark.parametrize("text", ["word ", "x", "\ud800", " ", "\0", "é"])
def test_ten_megabytes_are_dropped_in_a_moment(tmp_path, text):
    giant = json.dumps({"prompt": text * (10 * 2**20 // len(text)) + "?"}).encode()
    path = write_lines(tmp_path / "d.jsonl", [GOOD, giant])
    start = time.monotonic()
    prompts = tokenize_prompts(
        read(path, max_bad_rows=0.5), bpe_tokenizer(), max_prompt_length=1024
    )
    assert time.monotonic() - start < 10
    kind = "prompt is not Unicode text" if text == "\ud800" else "prompts longer than 1024 tokens"
    assert len(prompts) == 1 and prompts.dropped[kind].count == 1


def test_tokenizer_learns_in_time_from_a_word_without_end(tmp_path):
    giant = json.dumps({"prompt": "x" * 10 * 2**20}).encode()
    path = write_lines(tmp_path / "d.jsonl", [GOOD] * 50 + [giant])
    start = time.monotonic()
    dataset = get_dataset("jsonl", "train", path=path, max_bad_rows=0.5)
    assert len(make_tokenizer("bpe:320", dataset).get_vocab()) > 258
    assert time.monotonic() - start < 10


def test_ten_megabytes_of_response_are_dropped_unread():
    rows = [("3+4", "7"), ("3+4", "7" * 10 * 2**20), ("3+4", "\ud800")]
    dataset = InMemoryDataset([Example(p, r, None, str(i)) for i, (p, r) in enumerate(rows)])
    limits = dict(max_prompt_length=9, max_response_length=9, needs_responses=True)
    prompts = tokenize_prompts(dataset, Unreading(CHARACTERS), **limits)
    assert prompts.rows.tolist() == [0]
    assert prompts.dropped["responses longer than 9 tokens with the end token"] == Dropped(1, "1")
    assert prompts.dropped["responses that are not Unicode text"] == Dropped(1, "2")


class Unreading:
    """The character tokenizer, as long as nobody makes it read a giant text."""

    chat_template = None

    def __init__(self, characters: str):
        self._tokenizer = character_tokenizer(characters)
        self.get_vocab = self._tokenizer.get_vocab
        self.convert_ids_to_tokens = self._tokenizer.convert_ids_to_tokens
        self.added_tokens_decoder = self._tokenizer.added_tokens_decoder
        self.bos_token_id, self.eos_token_id, self.pad_token_id = None, 1, 0

    def __call__(self, texts, **options):
        assert max(map(len, texts)) < 1000
        return self._tokenizer(texts, **options)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 12))
@FAST
def test_bound_on_characters_drops_nothing_that_fits(lengths, limit):
    """Every token is the longest there is: the most characters that can fit."""
    pieces = {"<unk>": 0, "abcdefg": 1, "a": 2}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("abcdefg", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")
    examples = [Example("abcdefg" * n, None, None, str(n)) for n in [1, *lengths]]
    prompts = tokenize_prompts(InMemoryDataset(examples), fast, max_prompt_length=limit)
    kept = [examples[row].id for row in prompts.rows]
    assert kept == [str(n) for n in [1, *lengths] if 0 < n <= limit]


HOSTILE_TEXT = [
    "\0",
    "\x1b[31m",
    "\u202e",
    "\ufffe",
    "\U0010ffff",
    "<|endoftext|>",
    "e" + "\u0301" * 99,
]


def test_control_characters_reach_the_tokenizer_unharmed():
    tokenizer = bpe_tokenizer()
    examples = [Example(f"a{text}b", None, None, str(i)) for i, text in enumerate(HOSTILE_TEXT)]
    prompts = tokenize_prompts(InMemoryDataset(examples), tokenizer, max_prompt_length=999)
    assert len(prompts) == len(examples)
    for tokens, example in zip(prompts.prompt_tokens, examples, strict=True):
        assert tokenizer.decode(tokens) == f"{example.prompt}\n"


def test_rows_that_a_chat_template_refuses_are_dropped():
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'user' %}"
        "{{ raise_exception('only users\\n\x1b[31m speak') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    chats = [[{"role": role, "content": "3+4"}] for role in ("user", "system", "user")]
    examples = [Example(chat, None, None, str(i)) for i, chat in enumerate(chats)]
    prompts = tokenize_prompts(InMemoryDataset(examples), tokenizer, max_prompt_length=9)
    assert prompts.rows.tolist() == [0, 2]
    summary = prompts.summary()
    assert r"refuses: only users \x1b[31m speak (first 1)" in summary and summary.isprintable()


def test_gsm8k_patterns_take_linear_time():
    start = time.monotonic()
    for text in ("#### " + " " * 10**6, "####" + "," * 10**6, "#" * 10**6, "#### $ " * 10**5):
        assert final_number(text) is None
    assert final_number("#### " + "1" * 10**6) == "1" * 10**6
    assert time.monotonic() - start < 5


# ---- properties ----

GOOD_ROWS = st.builds(
    lambda prompt, answer: json.dumps({"prompt": prompt, "answer": answer}).encode(),
    st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
    st.none() | st.integers() | st.text(st.characters(codec="utf-8")),
)
NOISE = st.binary(max_size=60).map(lambda noise: noise.replace(b"\n", b""))
JSON_NOISE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
).map(lambda value: json.dumps({"prompt": value}).encode())


@given(
    st.lists(st.tuples(st.booleans(), GOOD_ROWS, NOISE | JSON_NOISE), max_size=12), st.floats(0, 1)
)
@settings(FAST, max_examples=300)
def test_no_good_line_is_lost_whatever_stands_beside_it(tmp_path_factory, rows, max_bad_rows):
    lines = [good if is_good else noise for is_good, good, noise in rows]
    path = write_lines(tmp_path_factory.mktemp("lines") / "d.jsonl", lines)
    expected = [json.loads(good)["prompt"] for is_good, good, _ in rows if is_good]
    try:
        dataset = read(path, max_bad_rows=max_bad_rows)
    except UserError as error:
        assert len(expected) < len(rows) or not rows
        assert str(error).isprintable() or not path.isprintable()
        return
    found = [dataset[i] for i in range(len(dataset))]
    numbers = [number for number, (is_good, _, _) in enumerate(rows, start=1) if is_good]
    by_id = {example.id: example.prompt for example in found}
    assert [by_id[f"d.jsonl/{number}"] for number in numbers] == expected
    filled = sum(bool(line.strip()) for line in lines)
    bad = sum(drops.count for drops in dataset.bad_rows.values())
    assert len(found) + bad == filled and bad <= max_bad_rows * filled


TOKENS = st.lists(st.integers(2, 99), min_size=1, max_size=11)
ROWS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=9)


def make_prompts(rows) -> Prompts:
    prompts, responses = (
        [np.array(tokens, np.int32) for tokens in column] for column in zip(*rows, strict=True)
    )
    return Prompts(5 + np.arange(len(rows)), prompts, responses, dropped={}, pad_id=7)


def listed(arrays) -> list[list[int]]:
    return [array.tolist() for array in arrays]


@given(ROWS, st.integers(1, 12), st.booleans(), st.integers(0, 2**40))
@FAST
def test_training_batches_hold_every_token_once_an_epoch(rows, size, shuffle, seed):
    prompts, epochs = make_prompts(rows), 2
    served: list[tuple[list[int], list[int]]] = []
    batches = make_train_iterator(prompts, batch_size=size, seed=seed, shuffle=shuffle)
    for _ in range(-(-epochs * len(rows) // size)):
        batch = next(batches)
        questions, whole = (listed(x.split("tokens")) for x in (batch.prompts(), batch))
        served += [(q, tokens[len(q) :]) for q, tokens in zip(questions, whole, strict=True)]
    for start in range(0, epochs * len(rows), len(rows)):
        epoch = served[start : start + len(rows)]
        assert sorted(epoch) == sorted(rows)
        assert shuffle or epoch == rows


@given(ROWS, st.integers(1, 12), st.sampled_from([0, 7, 99]))
@FAST
def test_padded_rows_hold_every_token_once(rows, size, pad_id):
    """`pad_id` may be a token of the row, as where padding is the end token."""
    sequences, served = make_prompts(rows).sequences(range(len(rows))), []
    for batch in padded_rows(sequences, size, 22, pad_id):
        assert batch.tokens_bt.shape == (size, 22)
        filled = zip(batch.tokens_bt, batch.lengths_b, strict=True)
        served += [tokens_t[:length].tolist() for tokens_t, length in filled if length]
        outside_bt = np.arange(22) >= batch.lengths_b[:, None]
        assert (batch.tokens_bt[outside_bt] == pad_id).all()
    assert served == [prompt + response for prompt, response in rows]
