"""What the group's options say to every command."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The object that click hands to a command through `pass_obj`."""

    models: Path
    """The folder in which a bare model name is looked up."""
