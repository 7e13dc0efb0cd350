from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.batching import pack
from runtime.chat import Rendered


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), budget=st.integers(1, 64))
def test_every_token_once_in_order_within_budget(lengths, budget):
    rendered = [Rendered([row] * length, length - 1) for row, length in enumerate(lengths)]
    batches = pack(rendered, budget, first_row=5)
    assert [row - 5 for batch in batches for row in batch.rows] == list(range(len(lengths)))
    for batch in batches:
        assert batch.tokens <= budget or len(batch.rows) == 1
        assert len(batch.token_ids) == len(batch.positions) == batch.tokens
        for place, row in enumerate(batch.rows):
            start, end = batch.cu_seqlens[place], batch.cu_seqlens[place + 1]
            assert batch.token_ids[start:end].tolist() == [row - 5] * lengths[row - 5]
            assert batch.positions[start:end].tolist() == list(range(end - start))
            assert batch.scored[place] == end - 1
            assert {batch.row_at(token) for token in range(start, end)} == {row}
