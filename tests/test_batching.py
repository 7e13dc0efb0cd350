from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.batching import SHORTEST_SHARED, pack
from runtime.chat import Rendered


@st.composite
def conversations(draw) -> list[Rendered]:
    """Few tokens and much repetition, so that prefixes nest, end inside one another and whole rows recur."""
    stems = draw(st.lists(st.lists(st.integers(0, 2), max_size=SHORTEST_SHARED), min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        parts = draw(st.lists(st.sampled_from(stems), max_size=4))
        token_ids = [token for part in parts for token in part] + draw(st.lists(st.integers(0, 2), min_size=1))
        rows.append(Rendered(token_ids, draw(st.integers(0, len(token_ids) - 1))))
    return rows


@given(conversations(), st.integers(1, 200), st.booleans())
def test_every_conversation_is_whole_on_its_path(rendered, budget, share):
    batches = pack(rendered, budget, first_row=5, share=share)
    assert sorted(row - 5 for batch in batches for row in batch.rows) == list(range(len(rendered)))
    for batch in batches:
        assert batch.tokens <= budget or len(batch.rows) == 1
        for row, path, scored in zip(batch.rows, batch.paths, batch.scored.tolist(), strict=True):
            places = [place for start, end in path for place in range(start, end)]
            assert batch.token_ids[places].tolist() == rendered[row - 5].token_ids
            assert batch.positions[places].tolist() == list(range(len(places)))
            assert places[rendered[row - 5].scored_index] == scored
            for place in places:
                first = batch.row_at(place)
                assert first <= row and place in [
                    p for s, e in batch.paths[batch.rows.index(first)] for p in range(s, e)
                ]


@given(conversations(), st.integers(1, 200))
def test_segments_cover_the_batch_and_follow_their_context(rendered, budget):
    for batch in pack(rendered, budget):
        assert [segment.start for segment in batch.segments] == [0, *(segment.end for segment in batch.segments[:-1])]
        assert batch.segments[-1].end == batch.tokens == len(batch.positions)
        ranges = {(segment.start, segment.end): segment.context for segment in batch.segments}
        for path in batch.paths:
            for depth, piece in enumerate(path):
                assert ranges[piece] == path[:depth]


def test_a_shared_prompt_is_there_once():
    prompt = list(range(100))
    rows = [Rendered([*prompt, 200 + row, 300 + row], 101) for row in range(8)]
    (batch,) = pack(rows, 1000)
    assert batch.tokens == 100 + 8 * 2
    (whole,) = pack(rows, 1000, share=False)
    assert whole.tokens == 8 * 102


def test_a_short_prefix_is_not_shared():
    head = list(range(SHORTEST_SHARED - 1))
    (batch,) = pack([Rendered([*head, 50], len(head)), Rendered([*head, 51], len(head))], 1000)
    assert batch.tokens == 2 * (len(head) + 1)
