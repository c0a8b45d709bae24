"""Hugging Face tokenizers: loading, agreement of two vocabularies, end-of-sequence ids, training.

A tokenizer is a `transformers` fast tokenizer everywhere in the project; nothing wraps it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distill.base.errors import UserError, first_line

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
# Whatever transformers makes a tokenizer of.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_SESSION_KEYS = {"backend", "is_local", "local_files_only"}  # how it was loaded, not what it is
# As Qwen2's, whatever class loads the folder: the models made here are of that family.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# For models of random weights: prompt, one separator, response.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
)


def load_tokenizer(folder: str | Path, chat_template: str = "") -> PreTrainedTokenizerFast:
    """Tokenizer of a model folder; a missing padding token becomes the end-of-sequence token.

    Its ids are those of the folder's tokenizer.json. `chat_template`: '' is the model's own, 'none'
    is plain text, else the name of one of several.

    Raises:
      UserError: the folder holds no loadable tokenizer, or no such template.
    """
    folder = Path(folder)
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder} holds no tokenizer: copy the model's tokenizer.json and "
            "tokenizer_config.json into it"
        )
    try:
        tokenizer = _load(folder)
    except Exception as error:
        raise UserError(
            f"no tokenizer can be loaded from {folder} ({first_line(error)}): it needs "
            "tokenizer.json and tokenizer_config.json as saved by save_pretrained"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no eos_token: responses could never end; set it in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = _choose_template(tokenizer.chat_template, chat_template, folder)
    return tokenizer


def _choose_template(templates: str | dict[str, str] | None, name: str, folder: Path) -> str | None:
    if name == "none":
        return None
    if not name and not isinstance(templates, dict):
        return templates
    named = templates if isinstance(templates, dict) else {}
    if (name or "default") in named:
        return named[name or "default"]
    known = ", ".join(sorted(named)) or "one without a name"
    raise UserError(
        f"data.chat_template={name!r}: the chat templates of {folder} are {known}; set the name of "
        "one of them, or none for plain text"
    )


def _load(folder: Path) -> Any:
    exact = folder / "tokenizer.json"
    if not exact.exists():  # converted as the model's type has it
        # Imported late: with it comes torch, where that is installed.
        from transformers import AutoTokenizer

        # Left open, transformers would ask on the terminal whether to run a model's own code.
        converted = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        if not isinstance(converted, PreTrainedTokenizerFast):
            raise ValueError(f"transformers cannot convert a {type(converted).__name__}")
        return converted
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    # AutoTokenizer puts the model type's normaliser and pre-tokeniser in place of the file's, and
    # any class of transformers changes the flags of added tokens: ids would be others.
    backend = Tokenizer.from_file(str(exact))
    backend.no_truncation()
    backend.no_padding()
    known = backend.get_vocab()
    added = sorted(tokenizer.added_tokens_decoder.items())
    backend.add_tokens([token for _, token in added if token.content not in known])
    tokenizer._tokenizer = backend
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer's files, readable by transformers 4 and 5 alike."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows no other of these
    kept = {key: value for key, value in config.items() if key not in _SESSION_KEYS}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def vocabulary_size(tokenizer) -> int:
    """Number of ids in use; heads may be padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def padding(tokenizer, vocab_size: int) -> int:
    """What fills up: any id that the models know does, as masks come from lengths."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None and i < vocab_size)


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
        "by id, so pick a pair from one model family, or set teacher.alignment=spans "
        "(teachers.NAME.alignment), which aligns them by bytes"
    )


def end_ids(tokenizer, folder: str | Path) -> tuple[int, ...]:
    """Ids that end a response: of tokenizer, template, config and generation config, sorted."""
    ids = {tokenizer.eos_token_id, response_end(tokenizer)}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.exists():
            ids.update(_listed_ends(path))
    return tuple(sorted(ids))


def _listed_ends(path: Path) -> list[int]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        listed = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a JSON object: {error}") from None
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(id) is int for id in ids):
        raise UserError(f"{path} has eos_token_id {listed!r}: it must be an id or a list of ids")
    return ids


def response_end(tokenizer) -> int:
    """The special token with which the chat template closes a response, or the end of text."""
    closing = closing_token(tokenizer)
    return tokenizer.eos_token_id if closing is None else closing


def closing_token(tokenizer) -> int | None:
    """First special token that the chat template puts behind a response; None if there is none."""
    if not tokenizer.chat_template:
        return None
    response = "R7esponse"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": response}]
    try:
        _, found, tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(response)
    except Exception:  # a template that takes no such turns, of which the prompts will tell
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in ids if token in special), None)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that student and teacher share.

    Attributes:
      tokenizer: the student's.
      size: ids in use, which all models know; output heads may be padded beyond it.
      end_ids: ids that end a response.
    """

    tokenizer: PreTrainedTokenizerFast
    size: int
    end_ids: tuple[int, ...]

    @property
    def pad_id(self) -> int:
        return padding(self.tokenizer, self.size)

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


def shared_vocabulary(
    student_folder: Path, *teacher_folders: Path, chat_template: str = ""
) -> Vocabulary:
    """The student's tokenizer; the ids at which any of the models ends a response.

    A base model and an instruction-tuned one of one family end responses differently: what the
    student learns from a teacher must end its own too.
    """
    tokenizer = load_tokenizer(student_folder, chat_template)
    ends = set(end_ids(tokenizer, student_folder))
    for teacher_folder in teacher_folders:
        teacher_tokenizer = load_tokenizer(teacher_folder, "none")  # prompts are the student's
        check_same_vocabulary(tokenizer, teacher_tokenizer)
        ends.update(end_ids(teacher_tokenizer, teacher_folder))
    return Vocabulary(tokenizer, vocabulary_size(tokenizer), tuple(sorted(ends)))


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per ASCII character, others are padding; for the built-in arithmetic models.

    A byte-level BPE without merges, which every class that loads the folder cuts alike.
    """
    from tokenizers import decoders, models, pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [split.pre_tokenize_str(character)[0][0] for character in characters]
    words = {word: i for i, word in enumerate([PADDING, END_OF_TEXT, *spelled])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token=PADDING))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def train_bpe_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `size` entries, trained on `texts`."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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
