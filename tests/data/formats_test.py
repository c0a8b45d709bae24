"""The forms in which data sets are found: files, messages, columns, splits, missing values."""

import csv
import datetime
import decimal
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from distill.base.errors import UserError
from distill.build.data import build_dataset, build_validation
from distill.config.schema import Config, Data, Validation
from distill.data import hf
from distill.data.base import Dropped, Example, get_dataset, register_dataset

USER, ASSISTANT = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, split="all", **options):
    dataset = get_dataset("jsonl", split, path=str(path), **options)
    return [dataset[i] for i in range(len(dataset))]


def prompts(path, split="all", **options):
    return [example.prompt for example in read(path, split, **options)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "response": "2"},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1"}]}],
            "response": "2",
        },
        {"prompt": [{**USER, "name": None}, {**ASSISTANT, "tool_calls": None}]},
    ],
)
def test_messages_of_other_trainers(tmp_path, row):
    assert read(write(tmp_path / "d.jsonl", [row])) == [Example([USER], "2", None, "d.jsonl/1")]
    table = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
    assert [(e.prompt, e.response) for e in read(table)] == [([USER], "2")]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": [USER, ASSISTANT], "response": "3"}, "prompt ends with an answer"),
        ({"prompt": [ASSISTANT]}, "prompt ends with an answer"),
        ({"prompt": "a", "response": [USER]}, "response is not one assistant's message"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt is not text"),
        ({"prompt": "a", "response": True}, "response is not text"),
        ({"prompt": "a", "response": 7}, "response is not text"),
        ({"prompt": 7}, "prompt is not text"),
        ({"prompt": "a", "answer": False}, "answer is not text"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(tmp_path, row, kind):
    path = write(tmp_path / "d.jsonl", [{"prompt": "a"}, row])
    dataset = get_dataset("jsonl", "all", path=path, max_bad_rows=0.5)
    assert dataset.bad_rows == {kind: Dropped(1, f"{path}:2")}


def test_missing_values_are_no_text(tmp_path):
    nan = float("nan")
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "response": nan, "answer": nan}])
    assert read(path) == [Example("a", None, None, "d.jsonl/1")]
    path = write(tmp_path / "e.jsonl", [{"prompt": "a", "answer": x} for x in ("", " ", ["", "5"])])
    assert [example.answer for example in read(path)] == [None, None, ("5",)]
    table = pyarrow.table({"prompt": ["a", "b"], "response": [nan, None], "answer": [1.5, nan]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert [(e.response, e.answer) for e in read(tmp_path / "d.parquet")] == [
        (None, "1.5"),
        (None, None),
    ]


def test_nested_columns(tmp_path):
    row = {"prompt": [USER], "reward_model": {"ground_truth": 2, "style": {"a.b": "x"}}}
    path = write(tmp_path / "d.jsonl", [row])
    options = dict(answer_column="reward_model.ground_truth")
    assert read(path, **options)[0].answer == "2"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet", **options)[0].answer == "2"
    with pytest.raises(UserError, match="no column extra.truth"):
        read(path, answer_column="extra.truth")


def test_kinds_of_files(tmp_path):
    rows = [{"prompt": "a\nb", "answer": "007"}, {"prompt": "c", "answer": "1"}]
    expected = [("a\nb", "007"), ("c", "1")]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "answer"])
    writer.writeheader()
    writer.writerows(rows)
    written = {
        "list.json": json.dumps(rows).encode(),
        "lines.json": lines,
        "lines.jsonl.gz": gzip.compress(lines),
        "lines.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
        "table.csv": table.getvalue().encode(),
        "table.csv.gz": gzip.compress(table.getvalue().encode()),
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
        assert [(e.prompt, e.answer) for e in read(tmp_path / name)] == expected, name
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(UserError, match="torn.jsonl.gz is not a whole readable file"):
        read(tmp_path / "torn.jsonl.gz")


def test_bad_rows_of_every_kind_of_file(tmp_path):
    rows = b"prompt,answer\na,1\nb\xff,2\n,3\nc, or d,4\n"  # the last one needs quotes
    (tmp_path / "d.csv").write_bytes(rows)
    dataset = get_dataset("csv", "all", path=str(tmp_path / "d.csv"), max_bad_rows=0.9)
    assert len(dataset) == 1 and dataset.bad_rows == {
        "prompt is not Unicode text": Dropped(1, f"{tmp_path}/d.csv:3"),
        "prompt is empty": Dropped(1, f"{tmp_path}/d.csv:4"),
        "more values than columns": Dropped(1, f"{tmp_path}/d.csv:5"),
    }
    (tmp_path / "comma.csv").write_text("prompt,answer\na,1,\n")  # behind every row
    assert [(e.prompt, e.answer) for e in read(tmp_path / "comma.csv")] == [("a", "1")]
    (tmp_path / "d.json").write_text('[{"prompt": "a"}, 7]')
    dataset = get_dataset("json", "all", path=str(tmp_path / "d.json"), max_bad_rows=0.5)
    assert dataset.bad_rows == {"not a JSON object": Dropped(1, f"{tmp_path}/d.json row 1")}


def chat_table(content, kind):
    message = pyarrow.struct([("role", pyarrow.string()), ("content", kind)])
    rows = [[{"role": "user", "content": value}] for value in content]
    return pyarrow.array(rows, pyarrow.list_(message))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([datetime.datetime(2024, 1, 1)], pyarrow.timestamp("ns"), "prompt is not text"),
        ([decimal.Decimal("1.5")], pyarrow.decimal128(5, 2), "prompt is not text"),
        ([b"caf\xe9"], pyarrow.binary(), "prompt is not Unicode text"),
    ],
)
def test_other_values_inside_messages(tmp_path, values, kind, expected):
    import datasets

    table = pyarrow.table({"prompt": chat_table(values, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(UserError, match=f"row 0: {expected}"):
        read(tmp_path / "d.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=f"row 0: {expected}"):
        get_dataset("hf", "all", path=str(tmp_path / "saved"))


def test_text_inside_messages_that_is_not_utf8_spoils_its_row_only(tmp_path):
    rows = chat_table([b"a", b"caf\xe9"], pyarrow.binary())
    strings = pyarrow.ListArray.from_arrays(
        rows.offsets,
        pyarrow.StructArray.from_arrays(
            [rows.values.field("role"), rows.values.field("content").view("string")],
            ["role", "content"],
        ),
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": strings}), tmp_path / "d.parquet")
    dataset = get_dataset("parquet", "all", path=str(tmp_path / "d.parquet"), max_bad_rows=0.5)
    assert dataset[0].prompt == [{"role": "user", "content": "a"}]
    assert dataset.bad_rows == {
        "prompt is not Unicode text": Dropped(1, f"{tmp_path}/d.parquet row 1")
    }


def test_classes_are_read_by_their_names(tmp_path):
    import datasets

    features = datasets.Features(
        prompt=datasets.Value("string"), answer=datasets.ClassLabel(names=["no", "yes"])
    )
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": [1, 0]}, features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "d.parquet")
    for name, path in (("hf", tmp_path / "saved"), ("parquet", tmp_path / "d.parquet")):
        dataset = get_dataset(name, "all", path=str(path))
        assert [dataset[i].answer for i in range(2)] == ["yes", "no"]


def test_a_format_is_no_dataset_of_the_hub():
    with pytest.raises(UserError, match="names a reader of files"):
        get_dataset("hf", "train", path="parquet")


def test_revision_of_a_dataset_of_the_hub(monkeypatch):
    import datasets

    def load(name, subset, revision):
        assert (name, subset, revision) == ("owner/data", None, "v2")
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"prompt": ["a"]}))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hf, "_hub_answers", lambda hub_id: True)
    assert texts(get_dataset("hf", "all", path="owner/data@v2")) == ["a"]


def test_column_of_two_is_named(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(UserError, match="several columns prompt: rename"):
        read(tmp_path / "d.parquet")


# ---- splits ----


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x_train.jsonl", "x_test.jsonl"), {"train": [0], "test": [1]}),
        (("train.jsonl", "val.jsonl"), {"train": [0], "validation": [1]}),
        (("train/a.jsonl", "dev/a.jsonl"), {"train": [0], "validation": [1]}),
        (("gsm-training-1.jsonl", "gsm-valid.jsonl.gz"), {"train": [0], "validation": [1]}),
        (("a.jsonl", "b_test.jsonl"), {"train": [0], "test": [1]}),
        (("trained.jsonl", "latest.jsonl"), {"train": [0, 1]}),
    ],
)
def test_splits_by_the_words_of_names(tmp_path, names, expected):
    for i, name in enumerate(names):
        write(tmp_path / name, [{"prompt": f"p{i}"}])
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    found = {split: prompts(tmp_path, split) for split in expected if split != "train"}
    found["train"] = prompts(tmp_path, "all")
    order = {split: sorted(f"p{i}" for i in rows) for split, rows in expected.items()}
    assert {split: sorted(rows) for split, rows in found.items()} == order
    with pytest.raises(UserError, match="has no split"):
        prompts(tmp_path, "math500")


def test_patterns(tmp_path):
    for name in ("a/part-1.jsonl", "b/part-2.jsonl", "b/other.jsonl"):
        write(tmp_path / name, [{"prompt": name}])
    assert prompts(tmp_path / "*/part-*.jsonl") == ["a/part-1.jsonl", "b/part-2.jsonl"]
    with pytest.raises(UserError, match="does not exist"):
        prompts(tmp_path / "*/nothing-*.jsonl")


def texts(dataset):
    return [dataset[i].prompt for i in range(len(dataset))]


class TestValidation:
    ROWS = [{"prompt": f"p{i}"} for i in range(100)]
    OTHERS = [{"prompt": f"v{i}"} for i in range(30)]

    def config(self, tmp_path, **validation):
        path = write(tmp_path / "d.jsonl", self.ROWS)
        return Config(data=Data(name="jsonl", path=path, validation=Validation(**validation)))

    def test_a_file_of_its_own_is_all_validation(self, tmp_path):
        held_out = write(tmp_path / "other" / "v.jsonl", self.OTHERS)
        config = self.config(tmp_path, path=held_out)
        assert texts(build_validation(config)) == [row["prompt"] for row in self.OTHERS]
        assert len(build_dataset(config)) == 100  # nothing is thrown away

    def test_part_of_the_training_file(self, tmp_path):
        config = self.config(tmp_path)
        train, held_out = texts(build_dataset(config)), texts(build_validation(config))
        assert (len(train), len(held_out)) == (98, 2) and not {*train} & {*held_out}

    def test_one_row_is_enough_where_nothing_is_evaluated(self, tmp_path):
        path = write(tmp_path / "one.jsonl", self.ROWS[:1])
        data = Data(name="jsonl", path=path, validation=Validation(max_samples=0))
        config = Config(data=data)
        assert texts(build_dataset(config)) == ["p0"] and build_validation(config) is None

    def test_none_but_what_is_trained_on_is_refused(self, tmp_path):
        for name in ("train", "validation"):
            write(tmp_path / f"{name}.jsonl", self.ROWS[:3])
        with pytest.raises(UserError, match="'validation' of 3 rows, whose prompts are all in"):
            build_validation(Config(data=Data(name="jsonl", path=str(tmp_path))))

    def test_no_path_of_its_own(self):
        config = Config(data=Data(name="arithmetic", validation=Validation(name="jsonl")))
        with pytest.raises(UserError, match="no path is set: .*data.validation.path=LOCAL"):
            build_validation(config)


# ---- sources of the user's own ----


def raising(split, seed, max_samples, path):
    raise RuntimeError("no such host")


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (raising, "cannot be made: RuntimeError: no such host"),
        (lambda **_: None, "cannot be made: TypeError"),
        (lambda **_: 7, "cannot be made: TypeError"),
        (lambda **_: {1, 2}, "is a set: its factory must return"),
    ],
)
def test_factories_that_make_no_dataset(made, complaint):
    name = f"faulty {complaint}"
    register_dataset(name)(
        lambda split, seed, max_samples, path: made(
            split=split, seed=seed, max_samples=max_samples, path=path
        )
    )
    with pytest.raises(UserError, match=complaint) as error:
        get_dataset(name, "train")
    assert "\n" not in str(error.value)


def test_addresses(tmp_path):
    import fsspec

    memory, rows = fsspec.filesystem("memory"), b'{"prompt": "a", "answer": 1}\n7\n'
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["b"]}), table)
    memory.pipe("/bucket/data/x_train.jsonl.gz", gzip.compress(rows))
    memory.pipe("/bucket/data/x_test.parquet", table.getvalue())
    for place in ("data", "data/*.*", ""):
        train = get_dataset("jsonl", "all", path=f"memory://bucket/{place}", max_bad_rows=0.5)
        assert texts(train) == ["a"] and prompts(f"memory://bucket/{place}", "test") == ["b"]
    where = "memory:///bucket/data/x_train.jsonl.gz:2"
    assert train.bad_rows == {"not a JSON object": Dropped(1, where)}
    path = write(tmp_path / "d.jsonl", [{"prompt": "c"}])
    assert read(f"file://{path}") == read(path)
    for address, reason in {
        "memory://bucket/no.jsonl": "does not exist",
        "memory://bucket/data/x_test.txt": "does not exist",
        "scheme://bucket/data": "cannot be read .Protocol not known: scheme",
    }.items():
        with pytest.raises(UserError, match=f"data.path={address} {reason}"):
            read(address)
