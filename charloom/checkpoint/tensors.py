"""The safetensors format: written without a copy, read with the library's own checks.

The library's `save` copies all tensors: 63 MB of trainer state take it 155 ms and, at its peak,
twice their memory, where hashing takes 65, writing 40 and waiting for the device 20 ms.
The header is small and simple, so `pack` writes it and lends the arrays' own memory; a test holds
that the bytes are the library's. Reading trusts nothing: the library checks header length,
overlaps, gaps and shapes against the bytes at hand.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from charloom.architecture import Architecture

TOKEN_COUNTS = "token_counts"
FAULTS_SHOWN = 3

# In the order of the library's files: the widest first, so that every tensor is aligned.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
RANKS = {code: rank for rank, code in enumerate(DTYPES)}


def pack(arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """The buffers of a safetensors file, in order; they are the arrays' memory where it is dense.

    Raises ValueError for a dtype that the format does not have, and for the one name it keeps for
    itself, `__metadata__`.
    """
    coded = []
    for name, array in arrays.items():
        # `asarray` and not `ascontiguousarray`, which would make a vector of a scalar.
        dense = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        code = CODES.get(dense.dtype)
        if name == "__metadata__":
            raise ValueError("safetensors keeps the name '__metadata__' for itself")
        if code is None:
            raise ValueError(f"safetensors cannot hold {name!r} of dtype {array.dtype}")
        coded.append((code, name, dense))
    coded.sort(key=lambda item: (RANKS[item[0]], item[1]))
    header: dict[str, Any] = {}
    end = 0
    for code, name, dense in coded:
        start, end = end, end + dense.nbytes
        header[name] = {"dtype": code, "shape": dense.shape, "data_offsets": (start, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    bodies = [dense.reshape(-1).view(np.uint8).data for _, _, dense in coded]
    return [struct.pack("<Q", len(text)) + text, *bodies]


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, each with memory of its own; ValueError names a fault."""
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]  # the library's stub has none
    except SafetensorError as error:
        detail = str(error).removeprefix("Error while deserializing: ")
        raise ValueError(f"is no sound safetensors file ({detail})") from error
    arrays = {}
    for name, entry in sorted(entries):  # the library gives them in an order of chance
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"holds {name!r} of dtype {entry['dtype']}, which is not ours")
        arrays[name] = np.frombuffer(entry["data"], dtype=dtype).reshape(entry["shape"])
    return arrays


def data_bytes(architecture: Architecture) -> int:
    """Bytes of a model's tensors and token counts, to which a weights file adds its header."""
    return (
        architecture.parameters * DTYPES["F32"].itemsize
        + architecture.vocabulary * DTYPES["I64"].itemsize
    )


def model_fault(arrays: Mapping[str, NDArray[Any]], architecture: Architecture) -> str | None:
    """What is wrong with a model's arrays, tensors and token counts together; None if nothing is.

    The same rule for what is saved and for what is loaded, so that neither can surprise the other.
    """
    if architecture.layers > len(arrays):
        # Before the shapes are listed: a damaged number of layers would make a list without end.
        return f"holds {len(arrays)} tensors, too few for {architecture.layers} layers"
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        name: (shape, "F32") for name, shape in architecture.tensor_shapes().items()
    }
    expected[TOKEN_COUNTS] = ((architecture.vocabulary,), "I64")
    faults = [f"lacks {name!r}" for name in expected if name not in arrays]
    faults += [f"holds an unknown {name!r}" for name in arrays if name not in expected]
    for name, (shape, code) in expected.items():
        array = arrays.get(name)
        if array is None:
            continue
        if array.shape != shape or array.dtype != DTYPES[code]:
            faults.append(
                f"holds {name!r} as {array.dtype} {array.shape} where the architecture has "
                f"{DTYPES[code]} {shape}"
            )
        elif code == "F32" and not np.isfinite(array).all():
            faults.append(f"holds NaN or infinite values in {name!r}")
        elif code == "I64" and (array < 0).any():
            faults.append(f"holds negative counts in {name!r}")
    if not faults:
        return None
    more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    return "; ".join(faults[:FAULTS_SHOWN]) + more
