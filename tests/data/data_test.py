import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.base.errors import UserError
from distill.data.base import (
    DatasetInterface,
    Dropped,
    Example,
    get_dataset,
    register_dataset,
)
from distill.data.gsm8k import final_number
from distill.data.math_cl import MATH500_HUB_ID, MathCLDataset
from distill.data.pipeline import make_train_iterator
from distill.data.prompts import Prompts
from distill.data.table import InMemoryDataset, holdout_split
from distill.data.tokenizing import tokenize_prompts

GSM8K = Path(__file__).parents[2].parent / "shared/data/gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K files in {GSM8K}")

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WORDS = ["<unk>", "<bos>", "<eos>", "[", "]", "system", "user", "assistant", "a", "b", "c", "x"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


def make_tokenizer(chat_template=None):
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=chat_template,
    )


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Neither a hub nor a copy in its cache, wherever the test runs."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def dataset_of(*rows):
    """Rows of (prompt, response)."""
    return InMemoryDataset(
        [Example(prompt, response, None, str(i)) for i, (prompt, response) in enumerate(rows)]
    )


def unique_ids(dataset):
    found = [dataset[i].id for i in range(len(dataset))]
    return len(set(found)) == len(found)


class TestRegistry:
    def test_own_dataset(self):
        @register_dataset("powers")
        class Powers(DatasetInterface):
            def __init__(self, split, seed, max_samples, path, power=2):
                self.length, self.power = max_samples or 10, power

            def __len__(self):
                return self.length

            def __getitem__(self, i):
                return Example(f"{i}^{self.power}", None, str(i**self.power), str(i))

        dataset = get_dataset("powers", "train", max_samples=4, power=3)
        assert [dataset[i].answer for i in range(len(dataset))] == ["0", "1", "8", "27"]

    def test_unknown_name_lists_the_known(self):
        with pytest.raises(UserError) as error:
            get_dataset("gsm9k", "train")
        message = one_line(error)
        assert "'gsm9k'" in message
        assert all(name in message for name in ("arithmetic", "gsm8k", "hf", "jsonl", "tfds"))

    def test_unknown_option(self):
        with pytest.raises(UserError, match="colour.*holdout_fraction"):
            get_dataset("jsonl", "train", path="x", colour="red")

    def test_max_samples_must_be_positive(self):
        with pytest.raises(UserError, match="max_samples=0"):
            get_dataset("jsonl", "train", path="x", max_samples=0)

    def test_sources_load_without_optional_packages(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        with pytest.raises(UserError, match="pip install tensorflow-datasets"):
            get_dataset("tfds", "train", path="x")


class TestHoldout:
    TEXTS = [f"problem {i % 40}" for i in range(200)]

    def test_partition_by_text(self):
        train = holdout_split(self.TEXTS, "train", 0, 0.1)
        validation = holdout_split(self.TEXTS, "validation", 0, 0.1)
        assert sorted(train + validation) == list(range(200))
        assert train == sorted(train) and validation == sorted(validation)
        held_out = {self.TEXTS[i] for i in validation}
        assert len(held_out) == 4
        assert not held_out & {self.TEXTS[i] for i in train}

    def test_is_the_same_on_every_machine(self):
        # Fixed values: Python's salted hash() would change them from run to run.
        assert holdout_split([f"p{i}" for i in range(10)], "validation", 0, 0.2) == [2, 7]

    def test_depends_on_the_seed(self):
        splits = {tuple(holdout_split(self.TEXTS, "validation", seed, 0.1)) for seed in range(5)}
        assert len(splits) == 5

    def test_zero_fraction_holds_out_nothing(self):
        assert len(holdout_split(self.TEXTS, "train", 0, 0.0)) == 200
        with pytest.raises(UserError, match="data.holdout_fraction"):
            holdout_split(self.TEXTS, "validation", 0, 0.0)


class TestMathCL:
    def rows(self):
        # 30 problems, then a shuffled copy of them, as the curriculum repeats its own.
        numbers = [*range(30), *np.random.default_rng(0).permutation(30).tolist()]
        return [{"problem": f"find {n}", "ground_truth_answer": str(n)} for n in numbers]

    @pytest.fixture
    def path(self, tmp_path):
        return write_jsonl(tmp_path / "math_cl.jsonl", self.rows())

    def test_holdout_shares_no_problem_and_order_is_kept(self, path):
        train = MathCLDataset("train", 0, None, path=path, holdout_fraction=0.2)
        validation = MathCLDataset("validation", 0, None, path=path, holdout_fraction=0.2)
        trained = [train[i].prompt for i in range(len(train))]
        held_out = [validation[i].prompt for i in range(len(validation))]
        assert len(set(held_out)) == 6 and len(held_out) == 12 and len(trained) == 48
        assert not set(trained) & set(held_out)
        expected = [row["problem"] for row in self.rows() if row["problem"] not in held_out]
        assert trained == expected
        assert unique_ids(train) and unique_ids(validation)

    def test_max_samples_takes_the_first(self, path):
        everything = MathCLDataset("all", 0, path=path)
        few = MathCLDataset("all", 0, 7, path=path)
        assert len(everything) == 60 and len(few) == 7
        assert [few[i] for i in range(7)] == [everything[i] for i in range(7)]
        assert few[3].prompt == "find 3" and few[3].answer == "3" and few[3].response is None

    def test_prompt_template(self, path):
        template = MathCLDataset("train", 0, path=path).get_prompt_template()
        assert template.count("{problem}") == 1 and r"\boxed{}" in template

    @pytest.mark.parametrize("name", ["math500.jsonl", "test.jsonl"])
    def test_math500_in_the_same_folder(self, tmp_path, name):
        write_jsonl(tmp_path / "train.jsonl", self.rows())
        write_jsonl(tmp_path / name, [{"problem": "find x", "answer": r"\frac{1}{2}"}])
        dataset = MathCLDataset("math500", path=str(tmp_path))
        assert len(dataset) == 1 and dataset[0].answer == r"\frac{1}{2}"
        assert len(MathCLDataset("all", path=str(tmp_path))) == 60

    def test_math500_file(self, tmp_path):
        path = write_jsonl(tmp_path / "m.jsonl", [{"problem": "find x", "answer": "2"}] * 3)
        assert len(MathCLDataset("math500", path=path)) == 3

    def test_math500_beside_a_local_curriculum_is_the_hubs(self, path, monkeypatch):
        def hub_tables(hub_id, columns, **_):
            assert hub_id == MATH500_HUB_ID and columns.answer == "answer"
            return {"test": lambda: [Example("find x", None, "2", "test/0")]}

        monkeypatch.setattr("distill.data.math_cl.hub_tables", hub_tables)
        dataset = MathCLDataset("math500", path=path)
        assert [dataset[i].prompt for i in range(len(dataset))] == ["find x"]

    def test_math500_beside_a_local_curriculum_without_a_hub(self, path, no_hub):
        with pytest.raises(UserError) as error:
            MathCLDataset("math500", path=path)
        message = one_line(error)
        assert "MATH-500" in message
        assert "data.validation.path=FILE with columns problem, answer" in message

    def test_math500_at_a_path_of_something_else(self, tmp_path):
        path = write_jsonl(tmp_path / "m.jsonl", [{"problem": "find x", "result": "2"}])
        with pytest.raises(UserError, match="no column answer"):
            MathCLDataset("math500", path=path)

    @pytest.mark.parametrize("split", ["train", "math500"])
    def test_unreachable_hub_is_told_in_seconds(self, split, no_hub):
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            MathCLDataset(split, 0, 10)
        message = one_line(error)
        assert ("data.validation.path=FILE" if split == "math500" else "data.path=LOCAL") in message
        assert ("MATH-500" if split == "math500" else "pe-nlp/math-cl") in message
        assert time.monotonic() - start < 20


class TestGSM8K:
    ROW = {
        "question": "How many clips?",
        "answer": "She sold 48/2 = <<48/2=24>>24.\nIn all 1,200.\n#### 1,200",
    }

    def make(self, tmp_path, split="all", **options):
        write_jsonl(tmp_path / "train.jsonl", [self.ROW])
        return get_dataset("gsm8k", split, path=str(tmp_path), **options)

    def test_calculator_notes_are_removed(self, tmp_path):
        example = self.make(tmp_path)[0]
        assert example.response == "She sold 48/2 = 24.\nIn all 1,200.\n#### 1,200"
        assert example.answer == "1200"

    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            ("so #### 1200", True),
            ("so #### 1,200.00", True),
            ("#### $1200", True),
            ("#### 7\nno:\n#### 1200", True),
            ("#### 1200\nno:\n#### 7", False),
            ("#### -1200", False),
            ("it is 1200", None),
            ("#### none", None),
        ],
    )
    def test_is_correct(self, tmp_path, response, expected):
        dataset = self.make(tmp_path)
        assert dataset.is_correct(dataset[0], response) is expected

    def test_final_number(self):
        assert final_number("#### 5\n#### .5") == ".5"
        assert final_number("5") is None

    @needs_gsm8k
    def test_real_splits(self):
        splits = {
            split: get_dataset("gsm8k", split, path=str(GSM8K))
            for split in ("train", "validation", "test", "all")
        }
        sizes = {split: len(dataset) for split, dataset in splits.items()}
        assert sizes["test"] == 1319 and sizes["all"] == 7473
        assert sizes["train"] + sizes["validation"] == 7473
        assert sizes["validation"] == pytest.approx(0.02 * 7473, abs=2)
        texts = {
            split: {dataset[i].prompt for i in range(len(dataset))}
            for split, dataset in splits.items()
        }
        assert not texts["train"] & texts["validation"]

    @needs_gsm8k
    def test_real_references_are_graded_right(self):
        dataset = get_dataset("gsm8k", "test", path=str(GSM8K))
        assert unique_ids(dataset)
        for i in range(len(dataset)):
            example = dataset[i]
            assert "<<" not in example.response
            assert dataset.is_correct(example, example.response) is True
            assert dataset.is_correct(example, f"#### {example.answer}1") is False


class TestFiles:
    ROWS = [{"prompt": f"p{i}", "response": f"r{i}", "answer": i} for i in range(20)]

    def test_columns(self, tmp_path):
        rows = [{"q": "one", "solution": "two", "n": 3.5}]
        path = write_jsonl(tmp_path / "d.jsonl", rows)
        names = dict(prompt_column="q", response_column="solution", answer_column="n")
        dataset = get_dataset("jsonl", "all", path=path, **names)
        assert dataset[0] == Example("one", "two", "3.5", "d.jsonl/1")

    def test_usual_columns_may_be_absent_and_named_ones_not(self, tmp_path):
        path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "one", "note": "-"}])
        example = get_dataset("jsonl", "all", path=path)[0]
        assert (example.response, example.answer) == (None, None)
        with pytest.raises(UserError) as error:
            get_dataset("jsonl", "all", path=path, response_column="solution")
        message = one_line(error)
        assert "wanted prompt, solution, answer" in message and "it has prompt, note" in message
        assert f"{path}:1" in message

    def test_chat_messages(self, tmp_path):
        chat = [{"role": "user", "content": "hi"}]
        path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": chat}])
        assert get_dataset("jsonl", "all", path=path)[0].prompt == chat

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ('{"prompt": "b"', ":3: not valid JSON"),
            ('["b"]', ":3: not a JSON object (list)"),
            ('{"prompt": {"text": "b"}}', ":3: prompt is not text (dict)"),
            ('{"prompt": null}', ":3: prompt is empty"),
            ('{"question": "b"}', ":3: no column prompt"),
        ],
    )
    def test_bad_line_is_named(self, tmp_path, line, complaint):
        path = tmp_path / "d.jsonl"
        path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
        with pytest.raises(UserError) as error:
            get_dataset("jsonl", "all", path=str(path))
        assert f"d.jsonl{complaint}" in one_line(error)

    def test_line_that_is_not_utf8_is_named(self, tmp_path):
        path = tmp_path / "d.jsonl"
        path.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n')
        with pytest.raises(UserError) as error:
            get_dataset("jsonl", "all", path=str(path))
        assert "d.jsonl:3: not UTF-8 text" in one_line(error)

    @pytest.mark.parametrize("split", ["train", "validation", "all"])
    def test_file_without_rows(self, tmp_path, split):
        path = write_jsonl(tmp_path / "d.jsonl", [])
        with pytest.raises(UserError) as error:
            get_dataset("jsonl", split, path=path)
        assert "d.jsonl has no rows" in one_line(error)

    def test_parquet_equals_jsonl(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        chat = [{"role": "user", "content": "hi"}]
        rows = [*self.ROWS, {"prompt": "last", "response": None, "answer": 5}]
        for name, data in (("d", rows), ("chat", [{"prompt": chat}])):
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(data), tmp_path / f"{name}.parquet"
            )
        dataset = get_dataset("parquet", "all", path=str(tmp_path / "d.parquet"))
        lines = get_dataset("jsonl", "all", path=write_jsonl(tmp_path / "d.jsonl", rows))
        assert len(dataset) == len(lines) == 21
        for i in range(21):
            a, b = dataset[i], lines[i]
            assert (a.prompt, a.response, a.answer) == (b.prompt, b.response, b.answer)
        assert get_dataset("parquet", "all", path=str(tmp_path / "chat.parquet"))[0].prompt == chat

    def test_parquet_errors(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "d.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
        with pytest.raises(UserError, match="no column prompt: .* it has text"):
            get_dataset("parquet", "train", path=str(path))
        path.write_text("not parquet")
        with pytest.raises(UserError) as error:
            get_dataset("parquet", "train", path=str(path))
        assert "is not a whole Parquet file" in one_line(error)

    def test_single_file_is_split_without_leaks(self, tmp_path):
        path = write_jsonl(tmp_path / "d.jsonl", [*self.ROWS, *self.ROWS])
        options = dict(path=path, holdout_fraction=0.25)
        train, validation = (get_dataset("jsonl", s, **options) for s in ("train", "validation"))
        assert len(train) == 30 and len(validation) == 10
        texts = [{d[i].prompt for i in range(len(d))} for d in (train, validation)]
        assert not texts[0] & texts[1]

    def test_white_space_does_not_hide_a_repeat(self, tmp_path):
        rows = [{"prompt": f"find {n}{space}"} for n in range(8) for space in ("", " ", "\n")]
        path = write_jsonl(tmp_path / "d.jsonl", rows)
        validation = get_dataset("jsonl", "validation", path=path, holdout_fraction=0.25)
        assert sorted(Counter(validation[i].prompt.strip() for i in range(6)).values()) == [3, 3]

    def test_folder_with_its_own_splits(self, tmp_path):
        write_jsonl(tmp_path / "train-00000-of-00002.jsonl", self.ROWS[:5])
        write_jsonl(tmp_path / "train-00001-of-00002.jsonl", self.ROWS[5:10])
        write_jsonl(tmp_path / "validation.jsonl", self.ROWS[8:12])
        write_jsonl(tmp_path / "test.jsonl", self.ROWS[12:])
        prompts = {}
        for split in ("train", "validation", "test"):
            dataset = get_dataset("jsonl", split, path=str(tmp_path))
            prompts[split] = [dataset[i].prompt for i in range(len(dataset))]
            assert unique_ids(dataset)
        assert prompts["train"] == [f"p{i}" for i in range(10)]
        # p8 and p9 are trained on.
        assert prompts["validation"] == ["p10", "p11"]
        assert prompts["test"] == [f"p{i}" for i in range(12, 20)]
        with pytest.raises(UserError, match="'dev'; it has: all, test, train, validation"):
            get_dataset("jsonl", "dev", path=str(tmp_path))

    def test_copy_of_a_hub_repository(self, tmp_path):
        (tmp_path / "data").mkdir()
        write_jsonl(tmp_path / "data" / "train-0.jsonl", self.ROWS)
        assert len(get_dataset("jsonl", "all", path=str(tmp_path))) == 20

    @pytest.mark.parametrize("name", ["jsonl", "parquet", "gsm8k", "math_cl"])
    def test_missing_path(self, name, tmp_path):
        with pytest.raises(UserError) as error:
            get_dataset(name, "train", path=str(tmp_path / "absent"))
        assert "absent does not exist" in one_line(error)
        assert "data.path=LOCAL" in str(error.value)

    def test_nothing_to_read(self, tmp_path):
        (tmp_path / "notes.txt").write_text("-")
        for path in (tmp_path, tmp_path / "notes.txt"):
            with pytest.raises(UserError, match=r"nothing to read; it must be a file \(.jsonl"):
                get_dataset("jsonl", "train", path=str(path))


class TestHub:
    def test_saved_folder(self, tmp_path):
        import datasets

        rows = {"question": [f"q{i}" for i in range(10)], "answer": [str(i) for i in range(10)]}
        table = datasets.Dataset.from_dict(rows)
        table.save_to_disk(tmp_path / "single")
        datasets.DatasetDict(train=table, test=table.select([7])).save_to_disk(tmp_path / "dict")
        train = get_dataset("hf", "train", path=str(tmp_path / "single"), prompt_column="question")
        assert len(train) == 9
        test = get_dataset("hf", "test", path=str(tmp_path / "dict"), prompt_column="question")
        assert len(test) == 1
        assert (test[0].prompt, test[0].answer) == ("q7", "7")
        with pytest.raises(UserError, match="no column prompt: .* it has question, answer"):
            get_dataset("hf", "train", path=str(tmp_path / "single"))

    def test_folder_that_was_not_saved(self, tmp_path):
        with pytest.raises(UserError) as error:
            get_dataset("hf", "train", path=str(tmp_path))
        assert "save_to_disk" in one_line(error)

    def test_unreachable_hub(self, no_hub):
        import datasets

        with pytest.raises(UserError) as error:
            get_dataset("hf", "train", path="nobody/nothing")
        assert "nobody/nothing" in one_line(error) and "data.path=LOCAL" in str(error.value)
        assert not datasets.config.HF_HUB_OFFLINE  # the offline attempt leaves no trace


class TestTFDS:
    def build(self, folder):
        tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is absent")
        pytest.importorskip("array_record", reason="array-record is absent")
        texts = tfds.features.FeaturesDict(
            {"question": tfds.features.Text(), "answer": tfds.features.Text()}
        )

        class TinyQuestions(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=texts)

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(10):
                    yield i, {"question": f"qué {i}", "answer": str(i)}

        builder = TinyQuestions(data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
        return str(folder / "tiny_questions" / "1.0.0")

    def test_prepared_folder(self, tmp_path):
        path = self.build(tmp_path)
        options = dict(path=path, prompt_column="question", holdout_fraction=0.2)
        train, validation = (get_dataset("tfds", s, **options) for s in ("train", "validation"))
        assert (len(train), len(validation)) == (8, 2)
        rows = {d[i].prompt: d[i].answer for d in (train, validation) for i in range(len(d))}
        assert rows == {f"qué {i}": str(i) for i in range(10)}
        assert unique_ids(train)
        with pytest.raises(UserError, match="no column prompt: .* it has"):
            get_dataset("tfds", "train", path=path)

    def test_unknown_name(self):
        pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is absent")
        with pytest.raises(UserError) as error:
            get_dataset("tfds", "train", path="no_such_dataset_here")
        assert "data.path=LOCAL" in one_line(error)


class TestPrompts:
    def test_plain_text(self):
        prompts = tokenize_prompts(dataset_of(("a b", None)), make_tokenizer(), max_prompt_length=9)
        assert prompts.prompt_tokens[0].tolist() == ids("<bos> a b")
        assert prompts.response_tokens is None

    def test_chat_template(self):
        chat = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        prompts = tokenize_prompts(
            dataset_of(("a b", None), (chat, None)),
            make_tokenizer(CHAT_TEMPLATE),
            max_prompt_length=99,
            system_prompt="x",
            prompt_template="b {problem}",
        )
        assert [tokens.tolist() for tokens in prompts.prompt_tokens] == [
            ids("[ system ] x [ user ] b a b [ assistant ]"),
            ids("[ system ] x [ user ] a [ assistant ] b [ user ] b c [ assistant ]"),
        ]

    def test_the_datasets_own_template(self):
        class Wrapped(InMemoryDataset):
            def get_prompt_template(self):
                return r"x {problem} {c}"  # braces that are no placeholder, as in LaTeX

        dataset = Wrapped([Example("a", None, None, "0")])
        prompts = tokenize_prompts(dataset, make_tokenizer(), max_prompt_length=9)
        unknown = WORDS.index("<unk>")
        assert prompts.prompt_tokens[0].tolist() == [*ids("<bos> x a"), unknown, *ids("c"), unknown]

    @pytest.mark.parametrize("template", ["no placeholder", "{problem} {problem}"])
    def test_bad_template(self, template):
        with pytest.raises(UserError, match="exactly once"):
            tokenize_prompts(
                dataset_of(("a", None)),
                make_tokenizer(),
                max_prompt_length=9,
                prompt_template=template,
            )

    def test_chat_prompt_needs_a_chat_template(self):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with pytest.raises(UserError, match="no chat template"):
            tokenize_prompts(dataset_of((chat, None)), make_tokenizer(), max_prompt_length=9)

    def test_drops_are_counted_by_reason(self):
        dataset = dataset_of(
            ("a", "b b"),
            ("a a a a", "b"),
            ("a", None),
            ("a", ""),
            ("a", " \n"),
            ("a", "b b b"),
            ("b", "c"),
        )
        prompts = tokenize_prompts(
            dataset,
            make_tokenizer(),
            max_prompt_length=4,
            max_response_length=3,
            needs_responses=True,
        )
        assert prompts.rows.tolist() == [0, 6]
        responses = [tokens.tolist() for tokens in prompts.response_tokens]
        assert responses == [ids("b b <eos>"), ids("c <eos>")]
        assert prompts.dropped == {
            "prompts longer than 4 tokens": Dropped(1, "1"),
            "rows without a response": Dropped(3, "2"),
            "responses longer than 3 tokens with the end token": Dropped(1, "5"),
        }
        assert prompts.summary() == (
            "2 prompts of 2 to 2 tokens; dropped: 1 prompts longer than 4 tokens (first 1), 3 rows "
            "without a response (first 2), 1 responses longer than 3 tokens with the end token "
            "(first 5)"
        )

    def test_lengths_at_the_limit_are_kept(self):
        limits = dict(max_prompt_length=3, max_response_length=3, needs_responses=True)
        prompts = tokenize_prompts(dataset_of(("a a", "b b")), make_tokenizer(), **limits)
        assert len(prompts) == 1 and prompts.dropped == {}

    @pytest.mark.parametrize("keep", [True, False])
    def test_responses_that_were_cut_off_have_no_end_and_may_be_left_out(self, keep):
        rows = [Example("a", "b c", None, "0", truncated=True), Example("a", "b", None, "1")]
        prompts = tokenize_prompts(
            InMemoryDataset(rows),
            make_tokenizer(),
            max_prompt_length=9,
            max_response_length=2,
            needs_responses=True,
            keep_truncated=keep,
        )
        cut_off, whole = ids("b c"), ids("b <eos>")
        assert [x.tolist() for x in prompts.response_tokens] == [cut_off, whole][not keep :]
        assert len(prompts.dropped) == 1 - keep
        assert keep or "1 responses that were cut off (data.keep_truncated" in prompts.summary()

    def test_a_table_says_which_responses_were_cut_off(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        rows = [{"prompt": "a", "response": "b", "truncated": x} for x in (True, False, None, 1)]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        parquet = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:3]), parquet)
        for name, expected in (("jsonl", [True, False, False, False]), ("parquet", [1, 0, 0])):
            dataset = get_dataset(name, "all", path=str(tmp_path / f"rows.{name}"))
            assert [example.truncated for example in dataset] == expected

    def test_nothing_left(self):
        dataset = dataset_of(("a a", "b"), ("a", "b b b"), ("a", None))
        with pytest.raises(UserError) as error:
            tokenize_prompts(
                dataset,
                make_tokenizer(),
                max_prompt_length=2,
                max_response_length=2,
                needs_responses=True,
            )
        message = one_line(error)
        assert "none of 3 rows" in message and "1 prompts longer than 2 tokens" in message
        assert "max_total_sequence_length" in message and "generate_strategy.max_length" in message
        assert "data.response_column" in message

    def test_repeated_prompts_are_tokenized_once(self):
        tokenizer = make_tokenizer()
        seen = []

        def encode(texts, **options):
            seen.extend(texts)
            return PreTrainedTokenizerFast.__call__(tokenizer, texts, **options)

        class Counting:
            chat_template, pad_token_id, eos_token_id = None, None, 2
            bos_token_id, added_tokens_decoder = 1, tokenizer.added_tokens_decoder
            __call__ = staticmethod(encode)
            get_vocab = staticmethod(tokenizer.get_vocab)

        rows = [("a", None), ("b", None)] * 20
        prompts = tokenize_prompts(dataset_of(*rows), Counting(), max_prompt_length=9)
        assert len(prompts) == 40 and seen == ["a", "b"]
        assert prompts.prompt_tokens[0] is prompts.prompt_tokens[38]
        assert prompts.prompt_tokens[1].tolist() == ids("<bos> b")

    def test_widths(self):
        dataset = dataset_of((" ".join("a" * 8), "b"), ("a", " ".join("b" * 7)))
        prompts = tokenize_prompts(
            dataset,
            make_tokenizer(),
            max_prompt_length=9,
            max_response_length=9,
            needs_responses=True,
        )
        assert (prompts.prompt_width, prompts.response_width) == (16, 8)


def make_prompts(count, responses=False):
    """Row r holds r + 1 tokens 100 + r; its dataset row is 10 * r."""
    tokens = [np.full(r + 1, 100 + r, np.int32) for r in range(count)]
    return Prompts(
        rows=10 * np.arange(count),
        prompt_tokens=tokens,
        response_tokens=[row[:1] + 100 for row in tokens] if responses else None,
        dropped={},
        pad_id=7,
    )


def take(iterator, steps):
    return [next(iterator) for _ in range(steps)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.arrays().keys() == other.arrays().keys()
        for name, value in batch.arrays().items():
            np.testing.assert_array_equal(value, other.arrays()[name], err_msg=name)


class TestPipeline:
    @pytest.mark.parametrize("responses", [False, True])
    def test_batch_contents(self, responses):
        prompts = make_prompts(3, responses)
        batch = next(make_train_iterator(prompts, batch_size=3, seed=0, shuffle=False))
        assert batch["row"].tolist() == [0, 10, 20]
        response = [[200], [201], [202]] if responses else [[]] * 3
        assert [tokens_t.tolist() for tokens_t in batch.split("tokens")] == [
            [100, *response[0]],
            [101, 101, *response[1]],
            [102, 102, 102, *response[2]],
        ]
        assert [weight_t.tolist() for weight_t in batch.split("weight")] == [
            [0] * (number + 1) + [1] * responses for number in range(3)
        ]
        assert batch.prompts().lengths_b.tolist() == [1, 2, 3]
        assert batch["tokens"].dtype == np.int32 and batch["index"].dtype == np.int64

    def test_order_is_kept_over_epochs(self):
        iterator = make_train_iterator(make_prompts(5), batch_size=3, seed=0, shuffle=False)
        rows = np.concatenate([batch["row"] for batch in take(iterator, 5)])
        assert rows.tolist() == [0, 10, 20, 30, 40] * 3

    def test_shuffle_visits_every_row_once_an_epoch_in_new_orders(self):
        def epochs(seed):
            iterator = make_train_iterator(make_prompts(12), batch_size=4, seed=seed, shuffle=True)
            rows = np.concatenate([batch["row"] for batch in take(iterator, 9)])
            return [tuple(epoch) for epoch in rows.reshape(3, 12).tolist()]

        assert all(sorted(epoch) == list(range(0, 120, 10)) for epoch in epochs(0))
        assert len({*epochs(0), tuple(range(0, 120, 10))}) == 4
        assert epochs(0) == epochs(0) != epochs(5)

    def test_index_is_unique_over_epochs(self):
        iterator = make_train_iterator(make_prompts(5), batch_size=3, seed=0, shuffle=True)
        index = np.concatenate([batch["index"] for batch in take(iterator, 10)])
        assert index.tolist() == list(range(30))

    def test_batch_larger_than_the_dataset(self):
        iterator = make_train_iterator(make_prompts(2), batch_size=5, seed=0, shuffle=False)
        batch = next(iterator)
        assert batch["row"].tolist() == [0, 10, 0, 10, 0]
        assert batch["index"].tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize("done", range(6))
    def test_resume_is_exact(self, shuffle, done):
        # 7 rows and batches of 3: step 2 and step 4 span two epochs.
        def fresh():
            return make_train_iterator(make_prompts(7, True), batch_size=3, seed=3, shuffle=shuffle)

        iterator = fresh()
        take(iterator, done)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = take(iterator, 6)
        resumed = fresh()
        resumed.set_state(state)
        assert_same(take(resumed, 6), expected)
        iterator.set_state(state)
        assert_same(take(iterator, 6), expected)
