"""pe-nlp/math-cl: competition problems in the order of a curriculum, validated on MATH-500.

The curriculum concatenates shuffled copies (MATH level 3-5 twice, DeepScaleR easy twice, medium 15
and hard 20 times), so its order is kept and a hold-out goes by problem, never by row.
"""

from distill.data.base import register_dataset
from distill.data.files import file_tables
from distill.data.hf import hub_tables
from distill.data.table import Columns, InMemoryDataset, choose_split

HUB_ID = "pe-nlp/math-cl"
MATH500_HUB_ID = "HuggingFaceH4/MATH-500"


@register_dataset("math_cl")
class MathCLDataset(InMemoryDataset):
    """Splits: 'train', 'validation' (unique problems held out of train), 'all', 'math500'.

    Args:
        split: see above; 'math500' is the separate MATH-500 test set.
        seed: chooses the held-out problems.
        max_samples: first rows kept; None keeps all.
        path: local copy instead of the hub's: a .jsonl or .parquet file, or a folder of them in
            which MATH-500 is math500.* or test.*.
        holdout_fraction: share of the unique problems that is held out.

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
    ):
        if split == "math500":
            columns = Columns(prompt="problem", answer="answer")
            tables = _load(MATH500_HUB_ID, path, columns)
            # A file of its own has no split name.
            split = next((name for name in ("math500", "test") if name in tables), "all")
        else:
            columns = Columns(prompt="problem", answer="ground_truth_answer")
            tables = _load(HUB_ID, path, columns)
        examples = choose_split(
            tables, split, seed=seed, holdout_fraction=holdout_fraction, where=path or HUB_ID
        )
        super().__init__(examples[:max_samples])

    def get_prompt_template(self) -> str:
        return "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


def _load(hub_id: str, path: str | None, columns: Columns):
    return file_tables(path, columns) if path else hub_tables(hub_id, columns)
