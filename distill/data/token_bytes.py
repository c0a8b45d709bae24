"""The bytes that tokens stand for, exactly: what tokenizers of two families have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from distill.base.errors import UserError
from distill.data.tokenizer import Vocabulary, response_end

# Byte-level BPE spells every byte as one printable character (GPT-2's table).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + number): byte for number, byte in enumerate(_OTHERS)}
_SPACE, _BYTE = "\u2581", re.compile("<0x([0-9A-F]{2})>")  # of SentencePiece


def bytes_of_tokens(vocabulary: Vocabulary, model: str) -> list[bytes | None]:
    """Of every id; None for control tokens and ends of responses, which are no text.

    Raises:
      UserError: the tokenizer, that of `model`, is of a kind whose tokens have no exact bytes.
    """
    tokenizer = vocabulary.tokenizer
    spelled = _speller(tokenizer.backend_tokenizer.decoder, model)
    added = tokenizer.added_tokens_decoder
    control = {*vocabulary.end_ids, *tokenizer.all_special_ids}
    control |= {id for id, token in added.items() if token.special}
    found: list[bytes | None] = [None] * vocabulary.size
    for token, id in tokenizer.get_vocab().items():
        if id < vocabulary.size and id not in control:
            found[id] = added[id].content.encode() if id in added else spelled(token)
    return found


def _speller(decoder: Any, model: str) -> Callable[[str], bytes | None]:
    """Bytes of a vocabulary's entry, by how the tokenizer turns entries into text."""
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [state])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return _of_byte_level
    replaced = any(step.get("pattern") == {"String": _SPACE} for step in steps)
    if replaced or "Metaspace" in kinds:
        return _of_sentence_piece if "ByteFallback" in kinds else _with_spaces
    kind = " and ".join(sorted(filter(None, kinds))) or "none"
    raise UserError(
        f"the tokens of {model} have no exact bytes (its tokenizer's decoder: {kind}), by which "
        "teacher.alignment aligns: it takes byte-level BPE and SentencePiece"
    )


def _of_byte_level(token: str) -> bytes | None:
    spelled = [_BYTES.get(character) for character in token]
    return None if None in spelled else bytes(byte for byte in spelled if byte is not None)


def _of_sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _with_spaces(token)


def _with_spaces(token: str) -> bytes:
    return token.replace(_SPACE, " ").encode()


def pair_ids(
    student: Vocabulary,
    teacher: Vocabulary,
    bytes_s: list[bytes | None],
    bytes_t: list[bytes | None],
) -> np.ndarray:
    """For every id of the student the teacher's of the same bytes, int32, -1 where there is none.

    Each is in one pair at most: of several spellings the last, which is that of a text rather than
    of a single byte. The ends of responses are a pair by what they are.
    """
    ours, theirs = (
        {spelled: id for id, spelled in enumerate(table) if spelled} for table in (bytes_s, bytes_t)
    )
    pairs = np.full(student.size, -1, np.int32)
    for spelled in ours.keys() & theirs.keys():
        pairs[ours[spelled]] = theirs[spelled]
    pairs[response_end(student.tokenizer)] = response_end(teacher.tokenizer)
    return pairs
