"""A teacher with another tokenizer: it reads the student's responses byte for byte as its tokens.

Where both tokenizers cut the same bytes, and both ids are a pair, next-token distributions are
compared. Between, a *span* reaches from one common cut to the next. Ends of responses are a pair.
A response is read up to its first control token and the first bytes that are no UTF-8, or that the
teacher's tokenizer does not give back; what is behind carries no loss of the teacher's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np

from distill.data.chat import Chat
from distill.data.sequences import Sequences
from distill.data.token_bytes import bytes_of_tokens, pair_ids
from distill.data.tokenizer import Vocabulary, response_end
from distill.kernels.linear_divergence import SharedIds


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Two vocabularies, and what they share.

    Attributes:
      student, teacher: their vocabularies.
      folders: theirs, for errors.
      spans: whether what is cut otherwise is trained on, too.
    """

    student: Vocabulary
    teacher: Vocabulary
    folders: tuple[Path, Path]
    spans: bool

    @functools.cached_property
    def pairs_v(self) -> np.ndarray:
        """For every id of the student the teacher's of the same string, -1: none."""
        return pair_ids(self.student, self.teacher, *self._bytes)

    @functools.cached_property
    def shared(self) -> SharedIds:
        return SharedIds.of_pairs(self.pairs_v, self.teacher.size)

    @functools.cached_property
    def _bytes(self) -> tuple[list[bytes | None], list[bytes | None]]:
        """Of all ids of both."""
        ours, theirs = map(str, self.folders)
        return bytes_of_tokens(self.student, ours), bytes_of_tokens(self.teacher, theirs)

    @functools.cached_property
    def _chat(self) -> Chat:
        return Chat(self.teacher.tokenizer)

    def recut(self, responses: Sequences, starts_b: np.ndarray, most_b: np.ndarray) -> Sequences:
        """The responses in the teacher's tokens, with the columns `piece` and `piece_size`.

        Args:
          starts_b: where in their sequences the responses begin.
          most_b: tokens that there is room for; what is behind is not read.
        """
        read = [self._readable(tokens_r.tolist()) for tokens_r in responses.split("tokens")]
        texts = [self._chat.protected(whole.decode()) for _, whole, _ in read]
        cuts = self._chat.encode(texts, add_special_tokens=False)
        views = [
            self._pieces(*each, cut, int(start), int(most))
            for each, cut, start, most in zip(read, cuts, starts_b, most_b, strict=True)
        ]
        tokens, piece, size = (list(columns) for columns in zip(*views, strict=True))
        return Sequences.of_tokens(
            tokens, weight=1, piece=np.concatenate(piece), piece_size=np.concatenate(size)
        )

    def shares(self, number: int, view: Sequences) -> tuple[float, float, float]:
        """Of so many tokens of responses with this view: cut alike, in spans, and left out."""
        piece, size = view["piece"], view["piece_size"]
        sequence_n = np.repeat(np.arange(len(view)), view.lengths_b)
        _, first = np.unique(np.stack([sequence_n, piece]), axis=1, return_index=True)
        alike, spans = int(((piece >= 0) & (size == 0)).sum()), int(size[first].sum())
        return alike / number, spans / number, 1 - (alike + spans) / number

    def _readable(self, tokens: list[int]) -> tuple[list[int], bytes, bool]:
        """The tokens up to the first that is no text, their whole characters, and if all ends."""
        spelled = self._bytes[0]
        stop = next((i for i, token in enumerate(tokens) if not spelled[token]), len(tokens))
        whole = b"".join(spelled[token] or b"" for token in tokens[:stop])
        try:
            whole.decode()
        except UnicodeDecodeError as error:
            return tokens[:stop], whole[: error.start], False
        ends = stop == len(tokens) - 1 and tokens[stop] in self.student.end_ids
        return tokens[:stop], whole, ends

    def _pieces(
        self,
        tokens_s: list[int],
        whole: bytes,
        ends: bool,
        tokens_t: list[int],
        start: int,
        most: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The teacher's tokens of one response, with the columns of their pieces."""
        (spelled_s, spelled_t), cut = self._bytes, []
        for token in tokens_t:
            cut.append(spelled_t[token] or b"")
        joined = b"".join(cut)
        if joined == b" " + whole:  # that SentencePiece puts before a text
            joined, cut[0] = whole, cut[0][1:]
        agree = len(os.path.commonprefix([joined, whole]))
        ends_s, ends_t = (
            np.cumsum([len(each) for each in spelled], dtype=np.int64)
            for spelled in ([spelled_s[token] or b"" for token in tokens_s], cut)
        )
        common = np.intersect1d(ends_s, ends_t)
        has_room = np.searchsorted(ends_t, common) < most
        common = common[(common <= agree) & has_room]
        read = common[-1] if len(common) else 0
        # Up to the token that reaches the last cut: what spells nothing behind it is unknown text.
        ends_t = ends_t[: np.searchsorted(ends_t, read) + 1 if len(common) else 0]
        tokens = np.array(tokens_t[: len(ends_t)], np.int32)
        of_s, of_t = (np.searchsorted(common, x) for x in (ends_s[ends_s <= read], ends_t))
        number = np.arange(len(common))
        first, size = np.searchsorted(of_s, number), np.bincount(of_s, minlength=len(common))
        size_t, first_t = np.bincount(of_t, minlength=len(common)), np.searchsorted(of_t, number)
        ids = np.array(tokens_s, np.int64)[first]
        alike = (size == 1) & (size_t == 1) & (self.pairs_v[ids] == tokens[first_t])
        piece, size = start + first[of_t], np.where(alike, 0, size)[of_t]
        if ends and read == len(whole) and len(tokens) < most:
            tokens = np.append(tokens, response_end(self.teacher.tokenizer))
            piece, size = np.append(piece, start + len(tokens_s)), np.append(size, 0)
        return tokens, piece, size
