"""Enters a writer for the model given as argument, says so, and holds it until it is killed."""

import sys
from pathlib import Path

from charloom.checkpoint import ModelWriter

with ModelWriter(Path(sys.argv[1]), mode="new"):
    sys.stdout.write("holding\n")
    sys.stdout.flush()
    sys.stdin.read()
