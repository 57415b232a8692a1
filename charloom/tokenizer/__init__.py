"""Text to token numbers and back, without losing a character on the way.

    Tokenizer
      CharacterTokenizer       a token per code point of the training text: the default
      Utf8Tokenizer            tokens that stand for bytes of UTF-8
        ByteTokenizer          the 256 bytes
        SentencePieceTokenizer unigram, bpe or char pieces, the 256 bytes beneath them

The one idea: a tokenizer is a table, and the file that holds the table is the tokenizer. Its
fingerprint goes into the checkpoint, because weights under a reordered vocabulary of the same size
load without complaint and write cipher text.

Text here means a Python string without lone surrogates. Any such text comes back from
`decode(encode(text))` unchanged if the tokenizer has a token for each of its characters, which
bytes and sentencepiece have always; there is no normalisation, no stripping, no newline
translation. Encoding is cut into blocks by rules that look at the text alone, so a stream encodes
to the same tokens however it arrives.

Measured on one core of an AMD EPYC (Zen 5) over tinyshakespeare, sentencepiece with at most 1,000
tokens:

                            characters  bytes  unigram   bpe  char
    encode, M characters/s         850  3,500       30     8    39
    decode, M characters/s         180     14       25    27    10
    one token in a stream, ns       36     63       63    63    63
    tokens for a character           1      1     0.43  0.43     1
"""

from charloom.errors import CheckpointError
from charloom.tokenizer.base import StreamDecoder, Tokenizer, Tokens
from charloom.tokenizer.characters import CharacterTokenizer
from charloom.tokenizer.pieces import PIECE_MODELS, PieceModel, SentencePieceTokenizer
from charloom.tokenizer.utf8 import ByteTokenizer, Utf8Tokenizer

__all__ = [
    "PIECE_MODELS",
    "ByteTokenizer",
    "CharacterTokenizer",
    "PieceModel",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "Tokens",
    "Utf8Tokenizer",
    "load_tokenizer",
]

KINDS: dict[str, type[Tokenizer]] = {
    tokenizer.kind: tokenizer
    for tokenizer in (CharacterTokenizer, ByteTokenizer, SentencePieceTokenizer)
}


def load_tokenizer(kind: str, data: bytes) -> Tokenizer:
    """Read what `Tokenizer.to_bytes` of the same kind wrote.

    Raises `CheckpointError` when the kind is unknown or the content is damaged or foreign.
    """
    if kind not in KINDS:
        raise CheckpointError(
            f"The tokenizer kind is {kind!r}, and this Charloom knows {', '.join(KINDS)}; restore "
            "the model's config.json, or load the model with the Charloom that wrote it."
        )
    try:
        return KINDS[kind].from_bytes(data)
    except ValueError as error:
        raise CheckpointError(
            f"The model's {KINDS[kind].file_name} is not a sound {kind} tokenizer: {error}; "
            "restore the file from a copy, or train the model again."
        ) from error
