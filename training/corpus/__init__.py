"""Turns text from anywhere into memory-mapped tokens, once, in bounded memory.

The one idea: text is read twice as a stream, first to take its census (which characters, how long,
which documents, what hash), then to encode it, so that no step ever holds more than a few megabytes
of it. What was encoded is kept in a cache under the hash of its content, and never changes there.

The rooms, each taking only from those before it:

    options     what a user may choose
    text        one file of text: decompress, decode, refuse what is not text
    records     the chosen field of JSONL and CSV
    documents   files as one stream of text that knows where documents end
    builtin, download, source    names on the command line -> files of text
    census      the first pass
    encoded     the result, and its folder in the cache
    encoder     the second pass
    cache       folders, locks, and which sources gave which corpus
    prepare     all of it in order
"""

from training.corpus.cache import default_cache
from training.corpus.encoded import EncodedCorpus, Split
from training.corpus.options import CorpusOptions
from training.corpus.prepare import encode_text, open_corpus, prepare_corpus

__all__ = [
    "CorpusOptions",
    "EncodedCorpus",
    "Split",
    "default_cache",
    "encode_text",
    "open_corpus",
    "prepare_corpus",
]
