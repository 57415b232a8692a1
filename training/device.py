"""Where a run computes."""

import os

import torch

from charloom.errors import OptionError
from training.config import DEVICE_REMEDY


def choose_device(name: str) -> torch.device:
    """The device of this name; `auto` takes CUDA where it is present, else the processor.

    Raises `OptionError` for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError([f"--device is {name!r}; {DEVICE_REMEDY}."]) from error
    match device.type:
        case "cpu":
            is_present = True
        case "cuda":
            # Read when CUDA starts; without it cuBLAS may sum in another order at the next run.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            index = 0 if device.index is None else device.index
            is_present = index < torch.cuda.device_count()
        case "mps":
            is_present = torch.backends.mps.is_available()
        case _:
            is_present = False
    if not is_present:
        raise OptionError([f"--device is {name!r}, which this machine does not have; try auto."])
    return device
