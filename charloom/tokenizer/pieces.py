"""Subword pieces by the sentencepiece library, made lossless.

Pieces are trained by unigram, byte-pair encoding (bpe) or single characters (char). The library's
defaults lose text in four ways: they normalise it, squeeze its spaces, drop rare characters, and
write the space as U+2581, so that a U+2581 in the text comes back as a space. The first two are
switched off and byte pieces catch whatever has no piece of its own. For the last, U+2581 is always
encoded as its three byte pieces, and decoding joins bytes without the library. (The usual remedy,
a normalisation rule to U+E000 and back, only moves the loss to U+E000.)

Encoding cuts the text by one fixed rule: after the last line feed within 4,096 characters, or after
all 4,096. No piece spans a line feed, so this changes nothing where lines are shorter; and the
unigram model sums its scores in 32 bits, which over 65,536 characters rounds enough to pick other
pieces than it would line by line. encode(a + b) is still not encode(a) + encode(b).

Training reads the whole text once and keeps a uniform sample of at most 1,024 such windows, 4 Mi
characters, in the order of the text. Measured on Python source, 8,000 unigram pieces: 5 seconds and
85 MB for that sample, 50 seconds and 360 MB for 16 million characters.
"""

import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import accumulate
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from charloom.errors import CorpusError, OptionError
from charloom.params import UnknownPolicy
from charloom.tokenizer.base import (
    END_NAME,
    REPLACEMENT,
    fingerprint_of,
    is_surrogate,
)
from charloom.tokenizer.utf8 import Utf8Tokenizer, name_byte, well_formed

PieceModel = Literal["unigram", "bpe", "char"]
PIECE_MODELS: tuple[PieceModel, ...] = get_args(PieceModel)

WINDOW = 4096  # characters
SAMPLE_WINDOWS = 1024

SPACE = "\u2581"  # how sentencepiece writes a space
# Never part of a trained piece: line ends; NUL, which the trainer drops; the library's space; and
# U+2585, for which it would silently leave out the whole line. In a text they are byte pieces.
NEVER_IN_PIECES = "\0\n\r" + SPACE + "\u2585"

FIXED_TOKENS = 259  # the 256 bytes, the space, the unknown piece and the end piece
MAX_VOCABULARY = 1 << 16
# The share of the text whose characters must have pieces: what sentencepiece recommends for large
# alphabets. unigram and bpe leave the rarer ones to byte pieces, and the room to longer pieces; the
# choice must not depend on the vocabulary size, or the size that an error advises might fail too.
COVERAGE = 0.9995

# The one of the library's messages that names a remedy.
TOO_MANY_PIECES = re.compile(r"Vocabulary size too high .* value <= (\d+)")

# What a model that normalises, strips or drops would not give back.
PROBE = f" a  b\t\r\n\0e\u0301 \ufb01\u2460\u3000</s><0x0A>{SPACE}\u2585\ue000\U0001f469\u200d "


def windows(chunks: Iterable[str]) -> Iterator[str]:
    """Cut the joined chunks by the fixed rule, holding one chunk and less than one window."""
    pending: list[str] = []
    held = 0
    for chunk in chunks:
        pending.append(chunk)
        held += len(chunk)
        if held < WINDOW:
            continue
        text = "".join(pending)
        start = 0
        while len(text) - start >= WINDOW:
            line_feed = text.rfind("\n", start, start + WINDOW)
            stop = start + WINDOW if line_feed < 0 else line_feed + 1
            yield text[start:stop]
            start = stop
        pending = [text[start:]]
        held = len(text) - start
    if held:
        yield "".join(pending)


def sample_windows(chunks: Iterable[str], seed: int) -> list[str]:
    """Keep a uniform sample of the text's windows, in their order (Vitter's Algorithm R)."""
    generator = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for index, window in enumerate(windows(chunks)):
        if index < SAMPLE_WINDOWS:
            kept.append((index, window))
            continue
        # `random` alone is promised to stay the same from one Python to the next.
        slot = int(generator.random() * (index + 1))
        if slot < SAMPLE_WINDOWS:
            kept[slot] = (index, window)
    return [window for _, window in sorted(kept)]


class SentencePieceTokenizer(Utf8Tokenizer):
    """The pieces of a sentencepiece model that gives back any text.

    Raises `ValueError` when the bytes are no model, or one that lacks an end piece or loses text.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        # An empty model loads, and then complains on standard error.
        if not model:
            raise ValueError("it is empty")
        try:
            processor = SentencePieceProcessor(model_proto=model)
            tokens = range(processor.vocab_size())
            pieces = [processor.id_to_piece(token) for token in tokens]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError("it is not a sentencepiece model") from error
        if processor.eos_id() < 0:
            raise ValueError("it has no piece for the end of a document")
        byte_tokens = {pieces[token]: token for token in tokens if processor.is_byte(token)}
        if any(f"<0x{byte:02X}>" not in byte_tokens for byte in range(256)):
            raise ValueError("it lacks byte pieces, so there is text that it cannot encode")
        super().__init__([_bytes_of(processor, token) for token in tokens], end=processor.eos_id())
        self.fingerprint = fingerprint_of(self.kind, model)
        self._model = model
        self._processor = processor
        self._space = np.array(
            [byte_tokens[f"<0x{byte:02X}>"] for byte in SPACE.encode()], np.int32
        )
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError("it changes text, which must come back from it as it went in")

    @classmethod
    def train(
        cls,
        chunks: Iterable[str],
        *,
        model_type: PieceModel,
        vocabulary_size: int,
        seed: int = 0,
    ) -> Self:
        """Train pieces on a sample of the joined chunks; equal arguments give equal models.

        `vocabulary_size` counts every token. unigram and bpe meet it exactly; with char it is a
        limit, and the most frequent characters have pieces. Raises `OptionError` when it is too
        small for the text's characters or larger than the text can fill, `CorpusError` when the
        text has nothing to train on.
        """
        problems = []
        if model_type not in PIECE_MODELS:
            choices = ", ".join(PIECE_MODELS)
            problems.append(f"model_type is {model_type!r}; choose one of {choices}.")
        if type(vocabulary_size) is not int or vocabulary_size > MAX_VOCABULARY:
            problems.append(
                f"--vocab-size is {vocabulary_size!r}; give a whole number of at most "
                f"{MAX_VOCABULARY:,}."
            )
        if problems:
            raise OptionError(problems)
        sample = "\n".join(sample_windows(chunks, seed))
        characters = _piece_characters(sample, vocabulary_size, model_type) | {" "}
        never = dict.fromkeys(map(ord, set(sample) - characters), "\n")
        lines = [line for line in sample.translate(never).split("\n") if line]
        # Without a piece of its own a space would be encoded as the bytes of U+2581.
        lines.append(" ")
        model = BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocabulary_size,
                hard_vocab_limit=model_type != "char",
                character_coverage=1.0,
                # In bytes; a longer line would be left out without a word.
                max_sentence_length=4 * WINDOW,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            most = TOO_MANY_PIECES.search(str(error))
            if most is None:
                raise
            raise OptionError(
                [
                    f"--vocab-size is {vocabulary_size}, but this text yields only {most[1]} "
                    f"{model_type} tokens; give at most {most[1]}, or more text."
                ]
            ) from None
        return cls(model.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the tokenizer file's content; raises `ValueError` saying what is wrong with it."""
        return cls(data)

    def to_bytes(self) -> bytes:
        """Return the file's content: the sentencepiece model itself."""
        return self._model

    def _blocks(self, chunks: Iterable[str]) -> Iterator[str]:
        return windows(chunks)

    def _encode_block(self, block: str, unknown: UnknownPolicy, position: int) -> NDArray[np.int32]:
        first, *others = well_formed(block, unknown, position).split(SPACE)
        tokens = [self._processor.encode_as_numpy(first)]
        for part in others:
            tokens += [self._space, self._processor.encode_as_numpy(part)]
        return np.concatenate(tokens)

    def drawable(self, *, documents: bool) -> NDArray[np.bool_]:
        """Return the tokens that sampling may ever draw: pieces and bytes, and maybe the end."""
        drawable = super().drawable(documents=documents)
        for token in range(self.vocabulary_size):
            if token != self.end and not _is_text(self._processor, token):
                drawable[token] = False
        return drawable

    def describe(self, token: int) -> str:
        """Return a printable name of one token."""
        self.check([token])
        if token == self.end:
            return END_NAME
        if self._processor.is_byte(token):
            return name_byte(self.token_bytes[token][0])
        if not _is_text(self._processor, token):
            return f"special piece {self._processor.id_to_piece(token)}"
        return repr(self.token_bytes[token].decode())


def _is_text(processor: SentencePieceProcessor, token: int) -> bool:
    return not (
        processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token)
    )


def _bytes_of(processor: SentencePieceProcessor, token: int) -> bytes:
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    if processor.is_unknown(token):
        return REPLACEMENT.encode()
    if processor.is_control(token):
        return b""
    return piece.replace(SPACE, " ").encode()


def _piece_characters(sample: str, vocabulary_size: int, model_type: PieceModel) -> set[str]:
    """Choose the characters that pieces are made of, beside the space; the rest will be bytes."""
    counts = Counter(sample)
    for character in [c for c in counts if c in NEVER_IN_PIECES + " " or is_surrogate(c)]:
        del counts[character]
    if not counts:
        raise CorpusError(
            "The text has no characters but spaces, line ends and the like to train pieces on; "
            "give another corpus, or choose the tokenizer characters or bytes."
        )
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    covered = list(accumulate(counts[character] for character in by_frequency))
    needed = bisect_left(covered, COVERAGE * covered[-1]) + 1
    room = vocabulary_size - FIXED_TOKENS
    if room < needed:
        raise OptionError(
            [
                f"--vocab-size is {vocabulary_size}, but the {needed} characters that make up "
                f"{COVERAGE:.2%} of this text and the {FIXED_TOKENS} fixed tokens of {model_type} "
                f"take {FIXED_TOKENS + needed}; give at least that, or choose the tokenizer "
                "characters or bytes."
            ]
        )
    return set(by_frequency[: room if model_type == "char" else needed])
