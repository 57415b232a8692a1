"""Options about how a network is computed, the same for every command that reads or writes text."""

from typing import get_args

import click

from charloom.params import Precision

precision_option = click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="auto",
    show_default=True,
    help="Arithmetic of the network's step; auto is int8 where this processor computes it exactly, "
    "else float32.",
)

threads_option = click.option(
    "--threads",
    type=int,
    help="Processor threads; they change no result.  [default: as many as can run at once]",
)
