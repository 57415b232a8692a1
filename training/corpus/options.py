"""What a user may choose about the reading of a corpus: defaults, limits and explanations.

Options that change what the text is (`field`, `encoding`) act before the text is hashed, so they
are no part of a corpus's fingerprint; the others are, see `CorpusOptions.identity`.
"""

import dataclasses
import io
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from charloom.cli.options import flag
from charloom.errors import OptionError
from charloom.tokenizer import PIECE_MODELS
from training.limits import option, range_problem

Documents = Literal["none", "files", "lines", "records"]
TokenizerChoice = Literal["characters", "bytes", "unigram", "bpe", "char", "sentencepiece"]
DEFAULT_PIECES = 1000
AUTO = "auto"
# Shares beyond these leave one side of any corpus empty.
SMALLEST_SHARE = 0.000001
LARGEST_SHARE = 0.999


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusOptions:
    """How text is read, cut into documents and tokens, and held out.

    Raises `OptionError` with one sentence for every field out of range.
    """

    documents: Documents = dataclasses.field(
        default="none",
        metadata=option("Where documents end in the text.", choices=get_args(Documents)),
    )
    field: str | None = dataclasses.field(
        default=None, metadata=option("Field of JSONL or column of CSV that holds the text.")
    )
    encoding: str = dataclasses.field(
        default="utf-8",
        metadata=option("Encoding of the text: a name that Python knows, or auto to guess it."),
    )
    validation: float = dataclasses.field(
        default=0.1,
        metadata=option("Share of the text held out for validation.", least=0.0, below=1.0),
    )
    tokenizer: TokenizerChoice = dataclasses.field(
        default="characters",
        metadata=option(
            "What one token is; unigram (also called sentencepiece), bpe and char are the kinds of "
            "sentencepiece.",
            choices=get_args(TokenizerChoice),
        ),
    )
    vocabulary_size: int | None = dataclasses.field(
        default=None,
        metadata=option(
            f"Number of pieces of unigram, bpe and char [default: {DEFAULT_PIECES}].",
            least=260,
            most=65_536,
            flag="vocab_size",
        ),
    )
    min_count: int = dataclasses.field(
        default=1,
        metadata=option(
            "Occurrences a character needs for a token of its own.", least=1, most=2**53
        ),
    )

    def __post_init__(self) -> None:
        if self.tokenizer == "sentencepiece":
            object.__setattr__(self, "tokenizer", "unigram")  # one name for one thing
        problems = [
            problem
            for item in fields(self)
            if (problem := range_problem(item, getattr(self, item.name)))
        ]
        problems += [
            f"{flag(item)} is None; leave it out for {item.default!r}."
            for item in fields(self)
            if getattr(self, item.name) is None and item.default is not None
        ]
        if (
            isinstance(self.validation, float)
            and not SMALLEST_SHARE <= self.validation <= LARGEST_SHARE
            and 0 < self.validation < 1
        ):
            problems.append(
                f"--validation is {self.validation!r}; give 0, or a share between "
                f"{SMALLEST_SHARE} and {LARGEST_SHARE}."
            )
        if self.documents == "records" and self.field is None:
            problems.append("--documents records needs --field; name the field with the text.")
        if self.field is not None and (not isinstance(self.field, str) or not self.field):
            problems.append(f"--field is {self.field!r}; give the name of a field.")
        if problem := _encoding_problem(self.encoding):
            problems.append(problem)
        if self.vocabulary_size is not None and self.tokenizer not in PIECE_MODELS:
            problems.append(
                f"--vocab-size {self.vocabulary_size} has no effect with --tokenizer "
                f"{self.tokenizer}; leave it out, or choose one of {', '.join(PIECE_MODELS)}."
            )
        if self.min_count != 1 and self.tokenizer != "characters":
            problems.append(
                f"--min-count {self.min_count} has no effect with --tokenizer {self.tokenizer}; "
                "leave it out, or choose characters."
            )
        if problems:
            raise OptionError(problems)

    @property
    def pieces(self) -> int:
        """Vocabulary size of a SentencePiece tokenizer."""
        return DEFAULT_PIECES if self.vocabulary_size is None else self.vocabulary_size

    def identity(self) -> dict[str, Any]:
        """The choices that, with the text, decide what the encoded corpus is."""
        chosen: dict[str, Any] = {
            "documents": self.documents,
            "validation": float(self.validation),
            "tokenizer": self.tokenizer,
        }
        if self.tokenizer == "characters":
            chosen["min_count"] = self.min_count
        if self.tokenizer in PIECE_MODELS:
            chosen["vocabulary_size"] = self.pieces
        return chosen

    def to_json(self) -> dict[str, Any]:
        """Every field, for a model card."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def _encoding_problem(name: object) -> str | None:
    """Why this cannot be the encoding of text, or None; tried on what Python opens text with."""
    remedy = "give a name that Python knows, such as utf-8, cp1252 or gb18030, or auto"
    if name is None or name == AUTO:
        return None
    if not isinstance(name, str):
        return f"--encoding is {name!r}; {remedy}."
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=name).close()
    except (LookupError, ValueError):
        return f"--encoding is {name!r}, which is not an encoding of text; {remedy}."
    return None
