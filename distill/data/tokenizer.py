"""Hugging Face tokenizers: loading, agreement of two vocabularies, end-of-sequence ids, training.

A tokenizer is a `transformers` fast tokenizer everywhere in the project; nothing wraps it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.base.errors import UserError

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
# For models of random weights: prompt, one separator, response.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Tokenizer of a model folder; a missing padding token becomes the end-of-sequence token.

    Raises:
      UserError: the folder holds no loadable tokenizer.
    """
    try:
        # Left open, transformers would ask on the terminal whether to run a model's own code.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no tokenizer can be loaded from {folder} ({reason}): it needs tokenizer.json and "
            "tokenizer_config.json as saved by save_pretrained"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no eos_token: responses could never end; set it in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer) -> int:
    """Number of ids in use; heads may be padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_vocabulary(student, teacher) -> None:
    """Raises UserError with the first token on which the two tokenizers differ."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    names = sorted(ours.keys() | theirs.keys(), key=lambda name: (ours.get(name, 2**40), name))
    name = next(name for name in names if ours.get(name) != theirs.get(name))

    def place(vocabulary):
        return f"id {vocabulary[name]}" if name in vocabulary else "absent"

    raise UserError(
        f"student and teacher have different tokenizers: first difference at token {name!r}, "
        f"student {place(ours)}, teacher {place(theirs)}; distillation compares probabilities id "
        "by id, so pick a pair from one model family"
    )


def end_ids(tokenizer, folder: str | Path) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's and those of generation_config.json, sorted."""
    ids = {tokenizer.eos_token_id}
    path = Path(folder) / "generation_config.json"
    if path.exists():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read as a JSON object: {error}") from None
        listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(each) is int for each in listed):
            raise UserError(f"{path}: eos_token_id={listed!r} must be an id or a list of ids")
        ids.update(listed)
    return tuple(sorted(ids))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that student and teacher share.

    Attributes:
      tokenizer: the student's.
      size: ids in use; output heads may be padded beyond it.
      end_ids: ids that end a response.
    """

    tokenizer: PreTrainedTokenizerFast
    size: int
    end_ids: tuple[int, ...]

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def within(self, rows: int, model: Path) -> Vocabulary:
        """The ids of which a model has embedding rows.

        Raises:
          UserError: it lacks rows of more than added tokens, which a container's other parts use.
        """
        if self.size <= rows:
            return self
        added = self.tokenizer.added_tokens_decoder
        if beyond := [i for i in range(rows, self.size) if i not in added or i in self.end_ids]:
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise UserError(
                f"the tokenizer has {self.size} ids, but the model in {model} only {rows} rows in "
                f"its embedding, none for id {beyond[0]}, {token!r}: use the tokenizer that the "
                "model was trained with"
            )
        return dataclasses.replace(self, size=rows)


def shared_vocabulary(student_folder: Path, teacher_folder: Path | None = None) -> Vocabulary:
    """The student's tokenizer; the ids at which either model ends a response.

    A base model and an instruction-tuned one of one family end responses differently: what the
    student learns from the teacher must end its own too.
    """
    tokenizer = load_tokenizer(student_folder)
    ends = set(end_ids(tokenizer, student_folder))
    if teacher_folder is not None:
        teacher_tokenizer = load_tokenizer(teacher_folder)
        check_same_vocabulary(tokenizer, teacher_tokenizer)
        ends.update(end_ids(teacher_tokenizer, teacher_folder))
    return Vocabulary(tokenizer, vocabulary_size(tokenizer), tuple(sorted(ends)))


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character; for the built-in arithmetic models."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [PADDING, END_OF_TEXT, *characters]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, PADDING))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def train_bpe_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `size` entries, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PADDING, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        chat_template=PLAIN_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
