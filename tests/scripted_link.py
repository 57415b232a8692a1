"""A link to an engine that says what it is told to; run by the tests that stop short of one."""

import struct
from collections.abc import Callable
from typing import Any

from service.errors import invalid, unknown_model
from service.messages import (
    AskMetrics,
    AskStatus,
    Describe,
    Detokenise,
    Embed,
    Embeddings,
    Judged,
    ModelCard,
    Models,
    ScoreCard,
    Scores,
    ScoreTexts,
    Status,
    Submit,
    Text,
    Tokenise,
    Tokens,
)

FINGERPRINT = "0123456789abcdef" * 4

CARD = ModelCard(
    name="demo",
    created=1795186800,
    fingerprint=FINGERPRINT,
    architecture={"cell": "lstm", "hidden": 2, "tied": False},
    parameters=1234,
    tokenizer="characters",
    vocabulary=65,
    documents="none",
    bits_per_character=2.5,
    is_loaded=False,
)


class ScriptedLink:
    """Stands in for `service.link.Link`; `answers` holds a function for each type of question.

    Without changes it serves one model, whose tokens are code points and whose vectors are
    [length of the input, -0.5].
    """

    def __init__(self) -> None:
        self.cards = [CARD]
        self.asked: list[Any] = []
        self.timeouts: list[float | None] = []
        self.tallies: list[tuple[str, str, int, float]] = []
        self.submit: Callable[..., Any] = self._submit
        self.answers: dict[type, Callable[[Any], Any]] = {
            AskMetrics: lambda _: Text(text="# HELP up Whether it is.\nup 1.0\n"),
            AskStatus: lambda _: Status(active=1, waiting=0, queue=8, models=1, step_age=0.0),
            Describe: self._describe,
            Detokenise: self._detokenise,
            Embed: self._embed,
            ScoreTexts: self._score,
            Tokenise: lambda ask: Tokens(
                tokens=[[ord(c) for c in text] for text in ask.texts],
                pieces=[list(text) for text in ask.texts],
            ),
        }

    def ask(
        self, part: Any, *, timeout: float | None = None, look: Callable[[], None] | None = None
    ) -> Any:
        """Note the question, look whether its answer is wanted, and give it."""
        if look is not None:
            look()
        self.asked.append(part)
        self.timeouts.append(timeout)
        return self.answers[type(part)](part)

    def tally(self, *answer: Any) -> None:
        """Note an answer."""
        self.tallies.append(answer)

    def fail(self, error: Exception) -> None:
        """Raise this at every question and order from now on."""

        def answer(_: Any, **_options: Any) -> Any:
            raise error

        self.submit = answer
        self.answers = dict.fromkeys(self.answers, answer)

    def _submit(self, order: Submit, **_options: Any) -> Any:
        raise invalid(f"No text is scripted for {order.prompts}.")

    def _describe(self, ask: Describe) -> Models:
        if ask.model is None:
            return Models(cards=self.cards)
        cards = [card for card in self.cards if card.name == ask.model]
        if not cards:
            raise unknown_model(ask.model)
        return Models(cards=cards)

    def _detokenise(self, ask: Detokenise) -> Text:
        if max(ask.tokens, default=0) >= CARD.vocabulary + 64:
            raise invalid("tokens holds a number beyond the vocabulary.", "tokens")
        return Text(text="".join(map(chr, ask.tokens)))

    def _score(self, ask: ScoreTexts) -> Scores:
        cards = []
        for text in ask.texts:
            top = [("a", -0.25), ("b", -1.5)][: ask.top]
            cards.append(
                ScoreCard(
                    judged=Judged(
                        tokens=list(text),
                        ids=[ord(c) for c in text],
                        logprobs=[None, *[-0.25] * (len(text) - 1)][: len(text)],
                        top=[None, *[top] * (len(text) - 1)][: len(text)],
                    ),
                    ranks=[None, *[1] * (len(text) - 1)][: len(text)],
                    entropies=[None, *[0.75] * (len(text) - 1)][: len(text)],
                    bits_per_character=0.36 if len(text) > 1 else None,
                    bits_per_byte=0.36 if len(text) > 1 else None,
                    characters=max(len(text) - 1, 0),
                    unknown=0,
                )
            )
        return Scores(model=ask.model, fingerprint=FINGERPRINT, precision="int8", cards=cards)

    def _embed(self, ask: Embed) -> Embeddings:
        return Embeddings(
            model=ask.model,
            fingerprint=FINGERPRINT,
            precision="float32",
            vectors=[struct.pack("<2f", len(one), -0.5) for one in ask.inputs],
            tokens=sum(map(len, ask.inputs)),
        )
