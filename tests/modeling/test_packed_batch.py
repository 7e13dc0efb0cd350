from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from runtime.conversations.rendering import RenderedConversation
from runtime.modeling.packed_batch import MIN_SHARED_PREFIX, pack_batches


@st.composite
def conversations(draw) -> list[RenderedConversation]:
    """Few distinct tokens, so that prefixes nest and whole rows repeat."""
    stems = draw(st.lists(st.lists(st.integers(0, 2), max_size=MIN_SHARED_PREFIX), min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        parts = draw(st.lists(st.sampled_from(stems), max_size=4))
        token_ids = [token for part in parts for token in part] + draw(st.lists(st.integers(0, 2), min_size=1))
        rows.append(RenderedConversation(token_ids, draw(st.integers(0, len(token_ids) - 1))))
    return rows


@given(conversations(), st.integers(1, 200), st.booleans())
def test_token_ranges_give_the_whole_conversation(rendered, budget, share_prefixes):
    batches = pack_batches(rendered, budget, first_row=5, share_prefixes=share_prefixes)
    assert sorted(row - 5 for batch in batches for row in batch.rows) == list(range(len(rendered)))
    for batch in batches:
        assert batch.tokens <= budget or len(batch.rows) == 1
        for row, path, scored in zip(batch.rows, batch.token_ranges, batch.scored.tolist(), strict=True):
            places = [place for start, end in path for place in range(start, end)]
            assert batch.token_ids[places].tolist() == rendered[row - 5].token_ids
            assert batch.positions[places].tolist() == list(range(len(places)))
            assert places[rendered[row - 5].scored_index] == scored
            for place in places:
                first = batch.row_of_token(place)
                assert first <= row and place in [
                    p for s, e in batch.token_ranges[batch.rows.index(first)] for p in range(s, e)
                ]


@given(conversations(), st.integers(1, 200))
def test_segments_cover_the_batch_and_follow_their_prefix(rendered, budget):
    for batch in pack_batches(rendered, budget):
        assert [segment.start for segment in batch.segments] == [0, *(segment.end for segment in batch.segments[:-1])]
        assert batch.segments[-1].end == batch.tokens == len(batch.positions)
        ranges = {(segment.start, segment.end): segment.prefix_ranges for segment in batch.segments}
        for path in batch.token_ranges:
            for depth, piece in enumerate(path):
                assert ranges[piece] == path[:depth]


@given(conversations(), st.integers(1, 20))
def test_chunks_cut_segments_and_keep_their_prefix(rendered, chunk):
    (batch,) = (replace(each, chunk_tokens=chunk) for each in pack_batches(rendered, 10_000))
    covered = []
    for tokens, segments in batch.chunks():
        assert tokens.stop - tokens.start <= chunk and segments[0].start == tokens.start
        assert [each.start for each in segments[1:]] == [each.end for each in segments[:-1]]
        for segment in segments:
            whole = next(each for each in batch.segments if each.start <= segment.start and segment.end <= each.end)
            before = [p for start, end in segment.prefix_ranges for p in range(start, end)]
            expected = [p for start, end in whole.prefix_ranges for p in range(start, end)]
            assert before == expected + [*range(whole.start, segment.start)]
        covered += range(tokens.start, tokens.stop)
        assert segments[-1].end == tokens.stop
    assert covered == [*range(batch.tokens)]


def test_a_shared_prompt_is_stored_once():
    prompt = list(range(100))
    rows = [RenderedConversation([*prompt, 200 + row, 300 + row], 101) for row in range(8)]
    (batch,) = pack_batches(rows, 1000)
    assert batch.tokens == 100 + 8 * 2
    (whole,) = pack_batches(rows, 1000, share_prefixes=False)
    assert whole.tokens == 8 * 102


def test_a_short_prefix_is_not_shared():
    head = list(range(MIN_SHARED_PREFIX - 1))
    (batch,) = pack_batches(
        [RenderedConversation([*head, 50], len(head)), RenderedConversation([*head, 51], len(head))], 1000
    )
    assert batch.tokens == 2 * (len(head) + 1)
