"""Arrays of token data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]


Float32Array = NDArray[np.float32]


BoolArray = NDArray[np.bool_]


def frozen(values: Any, dtype: type[np.generic], name: str) -> NDArray[Any]:
    """Return ``values`` as a read-only one-dimensional array.

    Raises:
        ValueError: if the values do not form one dimension.
    """
    array = np.asarray(values, dtype=dtype)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.flags.writeable:
        array = array.copy() if array.base is not None or array is values else array
        array.setflags(write=False)
    return array
