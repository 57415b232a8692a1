import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save

from charloom.checkpoint.tensors import DTYPES, pack, unpack

any_array = st.sampled_from(sorted(DTYPES.values(), key=str)).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name != "__metadata__"
)


@given(st.dictionaries(names, any_array, max_size=5))
def test_packed_bytes_are_those_of_the_library(tensors) -> None:
    """`pack` writes byte for byte what safetensors writes for the same arrays."""
    assert b"".join(pack(tensors)) == save(tensors)


@given(st.dictionaries(names, any_array, max_size=5))
def test_unpacked_arrays_are_those_that_were_packed(tensors) -> None:
    """Every dtype, shape and bit, NaN included, comes back."""
    back = unpack(b"".join(pack(tensors)))
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_layout_in_memory_does_not_show() -> None:
    """Transposed, strided and big-endian arrays are saved as the values they hold."""
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    for array in (plain.T, plain[:, ::2], plain.astype(">f4")):
        assert np.array_equal(unpack(b"".join(pack({"x": array})))["x"], array)


def test_dense_arrays_are_lent_and_not_copied() -> None:
    """The buffer of a dense array is its own memory."""
    array = np.zeros(1000, np.float32)
    _, buffer = pack({"x": array})
    array[0] = 1.0
    assert bytes(buffer) == array.tobytes()


@pytest.mark.parametrize(
    "tensors", [{"x": np.array(["text"])}, {"x": np.zeros(2, np.complex128)}, {"x": np.array([{}])}]
)
def test_what_the_format_does_not_have_is_refused(tensors) -> None:
    """A dtype outside the format is an error that names the array."""
    with pytest.raises(ValueError, match="'x'"):
        pack(tensors)


def test_the_header_of_metadata_is_no_array() -> None:
    """The one name that the format keeps for itself is refused."""
    with pytest.raises(ValueError, match="__metadata__"):
        pack({"__metadata__": np.zeros(2)})
