"""From sources and options to an encoded corpus: everything of this package in order.

1. Find the files; copy to the cache what can be read only once (`source`).
2. If the same request was answered before and no file has changed, take that answer (`cache`).
3. First pass: count characters, hash the text and its documents (`census`).
4. If the text and the options were encoded before under whatever names, take that.
5. Choose the tokenizer, and which side is held out.
6. Second pass: write the tokens (`encoder`), then move the folder to its place in the cache.

Held out is either the tail, `int(n * (1 - validation))` characters being kept for training (as in
nanoGPT, so that losses compare), or the documents whose hash says so (`census.HeldOut`). The
vocabulary is taken from the whole corpus, held-out text included: which characters exist is no
secret that validation should keep, and a character that training never saw is then scored like any
other. No count of the held-out side reaches the tokenizer but through `min_count`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from charloom.errors import CorpusError
from charloom.tokenizer import (
    PIECE_MODELS,
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from training.corpus.cache import Cache, canonical_hash, default_cache
from training.corpus.census import Census, HeldOut, take_census
from training.corpus.documents import TextStream, separated
from training.corpus.download import shown_address
from training.corpus.encoded import FORMAT_VERSION, EncodedCorpus, Split, write_manifest
from training.corpus.encoder import SideWriter, encode_corpus
from training.corpus.options import AUTO, CorpusOptions, Documents
from training.corpus.records import refuse_unnamed_field
from training.corpus.source import Finder, printable
from training.corpus.text import TextFile, guess_encoding

TRAINING_TOKENS = 64
VALIDATION_TOKENS = 16


def prepare_corpus(
    sources: Sequence[str],
    options: CorpusOptions,
    *,
    cache: Path | None = None,
    stdin: BinaryIO | None = None,
    report: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int | None], None] | None = None,
    model_tokenizer: Tokenizer | None = None,
) -> EncodedCorpus:
    """Encode what the sources hold, or find it encoded in the cache.

    `report` is told sentences for the user, `progress` how many bytes of how many are done.
    `model_tokenizer` is used as it is in place of a new one; characters it lacks become unknown.
    Raises `CorpusError` for text that cannot be read, split or learnt.
    """
    job = _Job(
        options=options,
        cache=Cache(default_cache() if cache is None else cache),
        report=report,
        progress=progress,
        given=model_tokenizer,
        training=True,
    )
    return job.run(list(sources), stdin)


def encode_text(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    documents: Documents = "none",
    field: str | None = None,
    encoding: str = "utf-8",
    cache: Path | None = None,
    stdin: BinaryIO | None = None,
    report: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Split:
    """All text of the sources in a given model's tokens, to be scored: any length but none."""
    job = _Job(
        options=CorpusOptions(documents=documents, field=field, encoding=encoding, validation=0.0),
        cache=Cache(default_cache() if cache is None else cache),
        report=report,
        progress=progress,
        given=tokenizer,
        training=False,
    )
    return job.run(list(sources), stdin).train


def open_corpus(fingerprint: str, *, cache: Path | None = None) -> EncodedCorpus | None:
    """A corpus prepared before, or None when it is no longer cached, or not whole."""
    opened = Cache(default_cache() if cache is None else cache)
    try:
        return opened.open(fingerprint)
    except OSError as error:
        raise _unusable(opened, error) from error


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call: what was asked, and the steps."""

    options: CorpusOptions
    cache: Cache
    report: Callable[[str], None]
    progress: Callable[[int, int | None], None] | None
    given: Tokenizer | None
    training: bool

    def run(self, sources: list[str], stdin: BinaryIO | None) -> EncodedCorpus:
        try:
            with self.cache.workshop() as workshop:
                return self._run(sources, stdin, workshop)
        except OSError as error:
            # What goes wrong with a source is a CorpusError where it happens.
            raise _unusable(self.cache, error) from error

    def _run(self, sources: list[str], stdin: BinaryIO | None, workshop: Path) -> EncodedCorpus:
        finder = Finder(
            workshop=workshop,
            downloads=self.cache.downloads,
            lock=partial(self.cache.lock, report=self.report),
            stdin=stdin,
            report=self.report,
        )
        files = finder.find(sources)
        if len(files) > 1:
            self.report(f"The corpus is made of {len(files):,} files.")
        named = {"sources": [_shown(source) for source in sources]}
        stamps = [file.stamp() for file in files]
        key = canonical_hash(
            [
                FORMAT_VERSION,
                [stamp[0] for stamp in stamps],
                self._identity(),
                [self.options.field, self.options.encoding, self.training],
            ]
        )
        # What lies in the workshop is gone after this call, so nothing is remembered about it.
        lasting = not any(
            file.path is not None and file.path.is_relative_to(workshop) for file in files
        )
        with self.cache.lock(key, self.report):
            if lasting and (known := self.cache.recall(key, stamps)) is not None:
                corpus, request = known
                self._report_guesses(request["encodings"])
                self.report("The text is unchanged since it was encoded; its tokens are reused.")
                return _described(corpus, {**request, **named})
            files = self._with_encodings(files)
            request = {
                **named,
                "files": len(files),
                "encodings": dict(Counter(file.encoding for file in files)),
                "options": self.options.to_json(),
            }
            self._report_guesses(request["encodings"])
            corpus = self._encoded(files, request, workshop)
            if lasting:
                self.cache.remember(key, stamps, corpus.fingerprint, request)
            return _described(corpus, request)

    def _with_encodings(self, files: list[TextFile]) -> list[TextFile]:
        settled = []
        for file in files:
            encoding = file.encoding
            if encoding is None:
                guess = self.options.encoding == AUTO
                encoding = guess_encoding(file) if guess else self.options.encoding
            settled.append(replace(file, encoding=encoding))
            if self.options.field is None:
                refuse_unnamed_field(settled[-1])
        return settled

    def _report_guesses(self, encodings: Mapping[str, int]) -> None:
        if self.options.encoding == AUTO:
            guesses = ", ".join(f"{name} ({count})" for name, count in encodings.items())
            self.report(f"The encoding is guessed to be (with the number of files): {guesses}.")

    def _encoded(
        self, files: list[TextFile], request: Mapping[str, Any], workshop: Path
    ) -> EncodedCorpus:
        stream = TextStream(
            files=files,
            documents=self.options.documents,
            field=self.options.field,
            advance=_Meter(self.progress, self._passes() * sum(file.size() for file in files)).add,
        )
        hashes = workshop / "hashes"
        documents = self.options.documents != "none"
        census = take_census(stream.pieces(), hashes=hashes if documents else None)
        self._check(census, request["sources"])
        fingerprint = canonical_hash([FORMAT_VERSION, census.content, self._identity()])
        if (corpus := self.cache.open(fingerprint)) is not None:
            self.report("The same text was encoded before; its tokens are reused.")
            return corpus
        held_out = HeldOut.choose(hashes, self.options.validation) if documents else None
        tokenizer = self._tokenizer(census, stream)
        folder = workshop / "corpus"
        folder.mkdir()
        sides = encode_corpus(
            stream.pieces,
            folder,
            tokenizer=tokenizer,
            kept=int(census.characters * (1 - self.options.validation)),
            held_out=held_out,
            content=census.content,
        )
        self._check_length(census, sides.train, sides.validation)
        write_manifest(
            folder,
            fingerprint=fingerprint,
            documents=self.options.documents,
            tokenizer=tokenizer,
            sides={
                name: {"characters": side.characters, "bytes": side.bytes}
                for name, side in (("train", sides.train), ("validation", sides.validation))
            },
            description={
                **request,
                "documents": self.options.documents,
                "characters": census.characters,
                "bytes": census.bytes,
                "distinct_characters": census.distinct,
                "train": sides.train.facts(),
                "validation": sides.validation.facts(),
            },
        )
        self.cache.publish(folder, fingerprint)
        corpus = self.cache.open(fingerprint)
        if corpus is None:
            raise CorpusError(
                f"The corpus just written to {self.cache.folder} reads back damaged; check that "
                "disk, or name another folder in the environment variable CHARLOOM_CACHE."
            )
        return corpus

    def _identity(self) -> dict[str, Any]:
        """The options that decide, with the text, what the corpus is."""
        identity = self.options.identity()
        if self.given is None:
            return identity
        return {
            "documents": identity["documents"],
            "validation": identity["validation"],
            "model_tokenizer": self.given.fingerprint,
        }

    def _passes(self) -> int:
        return 3 if self.given is None and self.options.tokenizer in PIECE_MODELS else 2

    def _tokenizer(self, census: Census, stream: TextStream) -> Tokenizer:
        if self.given is not None:
            return self.given
        if self.options.tokenizer == "characters":
            counts = census.character_counts()
            return CharacterTokenizer.from_counts(counts, min_count=self.options.min_count)
        if self.options.tokenizer == "bytes":
            return ByteTokenizer()
        assert self.options.tokenizer != "sentencepiece", "the options call it unigram"
        return SentencePieceTokenizer.train(
            separated(stream.pieces()),
            model_type=self.options.tokenizer,
            vocabulary_size=self.options.pieces,
        )

    def _check(self, census: Census, sources: Sequence[str]) -> None:
        """Refuse, before any work, what can never be learnt."""
        named = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
        if not census.characters:
            raise CorpusError(f"{named} holds no text; give a corpus that is not empty.")
        if not self.training:
            return
        if census.distinct == 1:
            only = next(iter(census.character_counts()))
            raise CorpusError(
                f"{named} holds one distinct character only ({only!r}, U+{ord(only):04X}), so "
                "there is nothing to learn; give text with at least two."
            )
        if self.given is None and self.options.min_count > 1:
            common = sum(n >= self.options.min_count for n in census.character_counts().values())
            if common < 2:
                raise CorpusError(
                    f"{named} has {common} characters that occur --min-count "
                    f"{self.options.min_count} times, and at least two are needed; lower "
                    "--min-count."
                )
        if census.bytes + census.documents < self._needed():
            raise self._too_short(census)

    def _check_length(self, census: Census, train: SideWriter, validation: SideWriter) -> None:
        if not self.training:
            return
        enough = self.options.validation == 0 or validation.tokens >= VALIDATION_TOKENS
        if train.tokens < TRAINING_TOKENS or not enough:
            raise self._too_short(
                census,
                f", which leaves {train.tokens} tokens to train on and {validation.tokens} to "
                "validate with",
            )

    def _too_short(self, census: Census, split: str = "") -> CorpusError:
        share = self.options.validation
        among = f" in {census.documents} documents" if census.documents else ""
        return CorpusError(
            f"The corpus is too short: it has {census.characters} characters{among}{split}; "
            f"with --validation {share:g} about {self._needed()} characters are the least, for "
            f"{TRAINING_TOKENS} tokens to train on"
            + (f" and {VALIDATION_TOKENS} to validate with" if share > 0 else "")
            + ". Give more text"
            + (", or another --validation." if share > 0 else ".")
        )

    def _needed(self) -> int:
        """The fewest tokens of which the split leaves enough to both sides."""
        share = self.options.validation
        needed = math.floor(TRAINING_TOKENS / (1 - share))
        if share > 0:
            needed = max(needed, math.floor((VALIDATION_TOKENS - 1) / share))
        while (kept := int(needed * (1 - share))) < TRAINING_TOKENS or (
            share > 0 and needed - kept < VALIDATION_TOKENS
        ):
            needed += 1
        return needed


class _Meter:
    """Adds up the bytes gone by and tells how many there are in all."""

    def __init__(self, progress: Callable[[int, int | None], None] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, size: int) -> None:
        self._done += size
        if size and self._progress is not None:
            self._progress(self._done, self._total)


def _unusable(cache: Cache, error: OSError) -> CorpusError:
    reason = error.strerror if error.strerror is not None else str(error)
    return CorpusError(
        f"The cache folder {cache.folder} cannot be used: {reason}. Make room there, or name "
        "another folder in the environment variable CHARLOOM_CACHE."
    )


def _shown(source: str) -> str:
    return (
        shown_address(source) if source.startswith(("http://", "https://")) else printable(source)
    )


def _described(corpus: EncodedCorpus, request: Mapping[str, Any]) -> EncodedCorpus:
    """The corpus with a description in the words of this call, not of the one that made it."""
    return replace(corpus, description={**corpus.description, **request})
