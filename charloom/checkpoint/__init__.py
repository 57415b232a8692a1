"""Models on disk: the only owner of the files under models/.

    models/NAME/config.json                       what the model is, and name, size and sha256 of:
                weights-HASH16.safetensors        tensors, and `token_counts` of the training text
                tokenizer-HASH16.json | .model    the vocabulary
                trainer/state-HASH16.safetensors  what exact resume needs; trainer/ may be deleted
                trainer/values-HASH16.json
                history.jsonl README.md loss.png  for people: nothing is loaded from them
    models/.NAME.lock                             held by the process that writes NAME

The one idea: data files carry their hash in their name and never change, so replacing `config.json`
is the one commit, for weights, trainer state and best-so-far together. A reader sees one committed
version or another, never a mixture, and needs no lock; a writer killed at any moment leaves the
version before. The price is room for two versions while one replaces the other.

    name         what a model may be called, and where a name or path leads
    layout       the names of files
    strict_json  JSON without NaN and infinity
    disk         durable writes and bounded reads
    lock         one writer per model
    tensors      the safetensors format, without a copy
    manifest     `config.json`
    history      `history.jsonl`, as functions of its bytes
    ownership    whether a folder is ours to write in
    reading      load, load_trainer, read_history, verify
    writing      ModelWriter
    listing      list_models, inspect_model, stamp
    removal      remove

Nothing here is executable and nothing is pickled: JSON, safetensors, and the tokenizer's own file.
"""

from charloom.checkpoint.listing import ModelEntry, Stamp, inspect_model, list_models, stamp
from charloom.checkpoint.manifest import FORMAT_VERSION
from charloom.checkpoint.name import check_name, find_model, model_names
from charloom.checkpoint.reading import (
    Checkpoint,
    TrainerState,
    load,
    load_trainer,
    read_history,
    verify,
)
from charloom.checkpoint.removal import remove
from charloom.checkpoint.writing import ModelWriter, WriteMode

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "ModelEntry",
    "ModelWriter",
    "Stamp",
    "TrainerState",
    "WriteMode",
    "check_name",
    "find_model",
    "inspect_model",
    "list_models",
    "load",
    "load_trainer",
    "model_names",
    "read_history",
    "remove",
    "stamp",
    "verify",
]
