"""Commits version 1, 2, ... of the model given as argument, a line before each, until killed."""

import sys
from itertools import count
from pathlib import Path

from versions import version

from charloom.checkpoint import ModelWriter

with ModelWriter(Path(sys.argv[1]), mode="new") as writer:
    for number in count(1):
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        writer.append_history({"step": number})
        writer.commit(**version(number))
