"""GSM8K: grade-school word problems with worked answers (Cobbe et al. 2021, arXiv:2110.14168)."""

import dataclasses
import re
from decimal import Decimal

from distill.data.base import Example, register_dataset
from distill.data.files import file_tables
from distill.data.hf import hub_tables
from distill.data.table import Columns, InMemoryDataset, choose_split

HUB_ID = "openai/gsm8k"
# Both take time linear in the text, whatever a model or a file holds.
_NUMBER = re.compile(r"####\s*(?:\$\s*)?(-?[\d,]*\.?\d+)")
_PLAIN_NUMBER = re.compile(r"\$?\s*(-?\d[\d,]*(?:\.\d+)?)\.?")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


@register_dataset("gsm8k")
class GSM8KDataset(InMemoryDataset):
    """Splits: 'train', 'validation' (unique problems held out of train), 'all' (both), 'test'.

    A response is the worked answer without its <<48/2=24>> calculator notes, ending in the line
    '#### number'; the answer is that number. `path` is a folder with train.jsonl and test.jsonl
    of rows {question, answer}; None reads the hub. UserError if there is no such data.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        max_samples: int | None = None,
        path: str | None = None,
        holdout_fraction: float = 0.02,
        max_bad_rows: float = 0.01,
    ):
        columns = Columns(prompt="question", response="answer")
        tables = file_tables(path, columns) if path else hub_tables(HUB_ID, columns, subset="main")
        limits = seed, max_samples, holdout_fraction, max_bad_rows
        examples, bad_rows = choose_split(tables, path or HUB_ID, split, *limits)
        super().__init__(list(map(_with_answer, examples)), bad_rows)

    def get_prompt_template(self) -> str:
        return "{problem}\nReason step by step. End with a line '#### ' and the final number."

    def is_correct(self, example: Example, response: str) -> bool | None:
        """Compares a plain number after the last ####; None (math-verify decides) without one."""
        stated = _PLAIN_NUMBER.fullmatch(response.rpartition("####")[2].strip())
        if stated is None or not isinstance(example.answer, str):
            return None
        return Decimal(stated[1].replace(",", "")) == Decimal(example.answer)


def final_number(text: str) -> str | None:
    """The number after the last '####', without thousands separators, or None."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _with_answer(example: Example) -> Example:
    worked = _CALCULATOR.sub("", example.response or "")
    return dataclasses.replace(example, response=worked, answer=final_number(worked))
