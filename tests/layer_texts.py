"""Any value of a unit's field ``layers``, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from lib_ipadapter.layer_weights import SD, TYPES, write

_factors = st.floats(-5, 5).map(lambda value: value + 0.0)  # -0.0 is written as 0

layer_factors = st.dictionaries(st.integers(0, SD - 1), _factors, min_size=1).filter(lambda each: any(each.values()))
layer_texts = st.sampled_from(list(TYPES)) | layer_factors.map(write)
