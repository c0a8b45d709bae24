"""pe-nlp/math-cl: competition problems in the order of a curriculum, validated on MATH-500.

The curriculum concatenates shuffled copies (MATH level 3-5 twice, DeepScaleR easy twice, medium 15
and hard 20 times), so its order is kept and a hold-out goes by problem, never by row.
"""

from distill.base.errors import UserError
from distill.data.base import Example, register_dataset
from distill.data.files import file_tables
from distill.data.hf import hub_tables
from distill.data.table import Columns, InMemoryDataset, Tables, choose_split

HUB_ID = "pe-nlp/math-cl"
MATH500_HUB_ID = "HuggingFaceH4/MATH-500"
_CURRICULUM = Columns(prompt="problem", answer="ground_truth_answer")
_MATH500 = Columns(prompt="problem", answer="answer")


@register_dataset("math_cl")
class MathCLDataset(InMemoryDataset):
    """Splits: 'train', 'validation' (unique problems held out of train), 'all', 'math500'.

    'math500' is the separate MATH-500 test set. `path` is a local copy instead of the hub's: a
    .jsonl or .parquet file, or a folder of them in which MATH-500 is math500.* or test.*. Where it
    holds the curriculum alone, 'math500' is still the hub's. See `choose_split` for the rest.

    Raises:
        UserError: the hub or the path has no such data.
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
        if split == "math500":
            if path and _holds_only_the_curriculum(path):
                path = None
            tables = _math500_tables(path)
            # A file of its own has no split name.
            split = next((name for name in ("math500", "test") if name in tables), "all")
            where = path or MATH500_HUB_ID
        else:
            tables = file_tables(path, _CURRICULUM) if path else hub_tables(HUB_ID, _CURRICULUM)
            where = path or HUB_ID
        limits = seed, max_samples, holdout_fraction, max_bad_rows
        super().__init__(*choose_split(tables, where, split, *limits))

    def get_prompt_template(self) -> str:
        return "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


def _math500_tables(path: str | None) -> Tables:
    if path:
        return file_tables(path, _MATH500)
    # data.path is where the training data comes from.
    instead = "data.validation.path=FILE with columns problem, answer"
    return hub_tables(MATH500_HUB_ID, _MATH500, instead=instead)


def _holds_only_the_curriculum(path: str) -> bool:
    """Whether a local path has no table of MATH-500, by name or by columns, but the curriculum."""
    tables = file_tables(path, _MATH500)
    if "train" not in tables or {"math500", "test"} & tables.keys():
        return False
    return not _is_readable(tables) and _is_readable(file_tables(path, _CURRICULUM))


def _is_readable(tables: Tables) -> bool:
    try:
        rows = tables["train"]()
    except UserError:
        return False
    return any(isinstance(row, Example) for row in rows)
