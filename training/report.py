"""A run in words: the plan before it, its end, figures of a text, and the model card."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from charloom.architecture import Architecture
from charloom.checkpoint import ModelWriter, read_history
from training import curves
from training.corpus import EncodedCorpus
from training.evaluation import Loss
from training.plan import Plan
from training.runlog import duration
from training.trainer import Outcome, Trainer

_ENDS = {
    Outcome.NO_PROGRESS: "Stopped early: the held-out loss no longer improves.",
    Outcome.OUT_OF_TIME: "Stopped early: the time is up.",
}
_PROTOCOLS = {
    "windows": "windows of 256 from a fresh start",
    "stateful": "read once, hidden state carried on",
}


def plan_text(plan: Plan, corpus: EncodedCorpus) -> str:
    """What is going to happen, one fact to a line."""
    recipe, told = plan.recipe, corpus.description
    temperature = plan.options.output_temperature
    train, held_out = len(corpus.train.tokens), len(corpus.validation.tokens)
    how = "the end of the text" if corpus.documents == "none" else "documents by their hash"
    threads = f"{plan.threads} thread{'s' if plan.threads > 1 else ''}"
    rows = {
        "corpus": f"{', '.join(told['sources'])}: {told['characters']:,} characters",
        "split": f"{corpus.train.characters:,} characters to train on, "
        f"{corpus.validation.characters:,} held out ({held_out / (train + held_out):.1%}, {how})",
        "vocabulary": f"{plan.architecture.vocabulary:,} tokens ({corpus.tokenizer.kind})",
        "network": describe(plan.architecture),
        "recipe": f"{plan.recipe_name}: dropout {recipe.dropout:g}, weight drop "
        f"{recipe.weight_drop:g}, learning rate {recipe.learning_rate:g}, weight decay "
        f"{recipe.weight_decay:g}, clip norm {recipe.clip_norm:g}, output temperature "
        + ("fitted" if temperature is None else f"{temperature:g}"),
        "plan": f"{plan.steps:,} steps of {recipe.batch_size} x {recipe.sequence_length} tokens, "
        f"{plan.epochs:.1f} passes over the text, {plan.precision} on {plan.device}, {threads}, "
        f"seed {plan.options.seed}, patience {plan.options.patience}",
        "again": f"--recipe {plan.recipe_name} --precision {plan.precision} --steps {plan.steps}",
        "expected": duration(plan.expected_seconds),
    }
    return "\n".join(f"{label:<12}{text}" for label, text in rows.items())


def end_text(outcome: Outcome, model: str, summary: Mapping[str, Any], seconds: float) -> str:
    """How a run ended, how good the model is and what to do next."""
    if outcome is Outcome.INTERRUPTED:
        return (
            f"Stopped and saved after step {summary['step']:,} of {summary['steps']:,}. "
            f"Go on with: {_resume_command(model)}"
        )
    lines = [_ENDS[outcome]] if outcome in _ENDS else []
    lines += [
        f"{protocol:<12}{loss['nats_per_character']:.4f} nats, "
        f"{loss['bits_per_character']:.4f} bits per character "
        f"({loss['characters']:,} held-out characters, {_PROTOCOLS[protocol]})"
        for protocol, loss in summary["validation"].items()
    ]
    lines.append(f"Done in {duration(seconds)}. Try: charloom sample {shlex.quote(model)}")
    return "\n".join(lines)


def loss_table(losses: Mapping[str, Loss]) -> str:
    """The figures of a text by each protocol, as a table."""
    rows = [("protocol", "nats/char", "bits/char", "bits/byte", "characters")]
    rows += [
        (
            protocol,
            f"{loss.nats_per_character:.4f}",
            f"{loss.bits_per_character:.4f}",
            f"{loss.bits_per_byte:.4f}",
            f"{loss.characters:,}",
        )
        for protocol, loss in losses.items()
    ]
    return "\n".join(
        f"{first:<10}" + "".join(f"{cell:>12}" for cell in rest) for first, *rest in rows
    )


def leave_companions(writer: ModelWriter, trainer: Trainer, *, model: str, is_over: bool) -> None:
    """Write what people look at into the model's folder: the curves and the model card."""
    history = read_history(writer.path)
    writer.write_bytes("loss.png", curves.draw(history, title=writer.path.name))
    summary = {**trainer.summary(), "finished": is_over}
    card = model_card(model, trainer.architecture, summary, sample=trainer.sample(300))
    writer.write_text("README.md", card)


def _resume_command(model: str) -> str:
    """What resumes a model that is meant by its name, or by its folder where that is elsewhere."""
    folder = Path(model)
    where = [] if folder.name == model else ["--models", str(folder.parent)]
    return shlex.join(["charloom", *where, "train", "--resume", "--name", folder.name])


def model_card(
    model: str, architecture: Architecture, summary: Mapping[str, Any], *, sample: str
) -> str:
    """Markdown: what the model is, what it was trained on, how good it is, how to use it."""
    corpus, options = summary["corpus"], summary["options"]
    facts = [
        f"- {describe(architecture)}",
        f"- corpus: {', '.join(corpus['sources'])} ({corpus['characters']:,} characters)",
        f"- tokenizer: {corpus['options']['tokenizer']}, {architecture.vocabulary:,} tokens",
        f"- trained for {summary['step']:,} of {summary['steps']:,} steps "
        f"({summary['epochs']:.1f} passes, {duration(summary['seconds'])}) in "
        f"{summary['precision']}, seed {options['seed']}",
    ]
    if summary["temperature"] != 1.0:
        facts.append(f"- output layer divided by {summary['temperature']:.3g}, its temperature")
    if not summary["finished"]:
        facts.append(f"- unfinished: `{_resume_command(model)}` goes on")
    rows = [
        f"| {_PROTOCOLS[protocol]} | {loss['nats_per_character']:.4f} | "
        f"{loss['bits_per_character']:.4f} | {loss['bits_per_byte']:.4f} | "
        f"{loss['characters']:,} |"
        for protocol, loss in summary["validation"].items()
    ]
    quality = (
        [
            "Held-out text, never trained on, but it chose which weights to keep and how sure.",
            "",
            "| protocol | nats per character | bits per character | bits per byte | characters |",
            "|---|---|---|---|---|",
            *rows,
        ]
        if rows
        else [
            "Not measured yet: the run was stopped before its first evaluation."
            if corpus["validation"]["tokens"]
            else "No text was held out, so nothing is known of its quality."
        ]
    )
    fence = "`" * max(3, _longest_run(sample) + 1)
    return "\n".join(
        [
            f"# {Path(model).name}",
            "",
            "A character-level language model trained with Charloom.",
            "",
            *facts,
            "",
            "## Quality",
            "",
            *quality,
            "",
            "The curves are in `loss.png`, the figures behind them in `history.jsonl`.",
            "",
            "## A sample",
            "",
            "Temperature 0.8, not chosen:",
            "",
            fence,
            sample,
            fence,
            "",
            "## Use",
            "",
            "```sh",
            f'charloom sample {shlex.quote(model)} "Once" --temperature 0.8',
            "```",
            "",
            "The model writes what its corpus makes likely: it knows nothing, and where the corpus",
            "is small it may repeat passages of it word by word.",
            "",
        ]
    )


def describe(architecture: Architecture) -> str:
    """One line: cell, layers x hidden size, embedding, extras, parameters."""
    extras = [
        word
        for word, is_on in (("residual", architecture.residual), ("tied", architecture.tied))
        if is_on
    ]
    return ", ".join(
        [
            f"{architecture.cell.upper()} {architecture.layers} x {architecture.hidden}",
            f"embedding {architecture.embedding}",
            *extras,
            f"{architecture.parameters:,} parameters",
        ]
    )


def _longest_run(text: str) -> int:
    """Length of the longest run of backquotes, which a fence must exceed."""
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
