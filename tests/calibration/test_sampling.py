from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.sampling import Sample, sample
from calibration.sources import ConversationRow, LoadedRows, load_rows
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage, PreferencePair
from runtime.conversations.rendering import RenderedConversation


class FakeRenderer:
    """A token a character, four a turn; refuses what is longer than its positions, as the real one does."""

    def __init__(self, max_positions: int = 10_000):
        self.max_positions = max_positions

    def render(self, messages: Sequence[ChatMessage], *, where: str = "") -> RenderedConversation:
        ids = [ord(c) for message in messages for c in f"<{message['role'][0]}>{message['content']}."]
        if len(ids) > self.max_positions:
            raise ConversationError(f"{where}: {len(ids)} tokens, but the model has {self.max_positions}")
        return RenderedConversation(ids, len(ids) - 1)


def user(text: str) -> ChatMessage:
    return {"role": "user", "content": text}


def assistant(text: str) -> ChatMessage:
    return {"role": "assistant", "content": text}


def pair(prompt: str, name: str = "", category: str = "all", size: int = 5) -> PreferencePair:
    good, bad = [assistant(f"good {name}".ljust(size))], [assistant(f"bad {name}".ljust(size))]
    return PreferencePair([user(prompt)], good, bad, category, f"rows:{prompt}{name}")


def rows_of(pairs: list[PreferencePair], conversations: Sequence[ConversationRow] = ()) -> LoadedRows:
    return LoadedRows("rows.jsonl", list(pairs), list(conversations))


def prompts(of: Sample) -> tuple[set[str], set[str]]:
    calibration = {row.conversation.messages[0]["content"] for row in of.calibration}
    return calibration, {pair.pair.prompt[0]["content"] for pair in of.parity}


RENDERER: FakeRenderer = FakeRenderer()


def test_a_pair_gives_both_its_conversations_and_no_prompt_serves_twice():
    taken = sample(rows_of([pair(f"p{i}") for i in range(20)]), RENDERER, rows_wanted=12)
    calibration, parity = prompts(taken)
    assert len(taken.calibration) == 12 and len(taken.parity) == 14
    assert len(calibration) == 6 and len(parity) == 14 and not calibration & parity
    assert {row.conversation.messages[-1]["content"] for row in taken.calibration} == {"good ", "bad  "}
    for row in taken.calibration:
        assert row.rendered == RENDERER.render(row.conversation.messages)
    for comparison in taken.parity:
        assert comparison.chosen == RENDERER.render(comparison.pair.chosen_conversation)
        assert comparison.rejected == RENDERER.render(comparison.pair.rejected_conversation)


def test_an_odd_number_of_rows_is_met_exactly():
    taken = sample(rows_of([pair(f"p{i}") for i in range(9)]), RENDERER, rows_wanted=5)
    assert len(taken.calibration) == 5 and len(taken.parity) == 6
    assert taken.calibration[-1].conversation.messages[-1]["content"] == "good "


def test_pairs_are_taken_until_they_have_the_tokens_wanted():
    rows = rows_of([pair(f"p{i:02}", size=20) for i in range(40)])
    taken = sample(rows, RENDERER, tokens_wanted=300, parity_pairs=10, exact_pairs=False)
    prompt, response = len("<u>p00."), len("<a>") + 20 + 1
    shared = len(os.path.commonprefix([row.rendered.token_ids for row in taken.calibration[:2]]))
    assert shared == prompt + 3
    each = 2 * (prompt + response) - shared
    assert len(taken.calibration) == 2 * -(-300 // each) and len(taken.parity) == 10


def test_half_of_the_prompts_at_most_are_kept_for_parity():
    rows = rows_of([pair(f"p{i:02}") for i in range(9)])
    taken = sample(rows, RENDERER, tokens_wanted=10**6, parity_pairs=500, exact_pairs=False)
    assert (len(taken.calibration), len(taken.parity)) == (10, 4)
    few = sample(rows, RENDERER, tokens_wanted=10**6, parity_pairs=2, exact_pairs=False)
    assert (len(few.calibration), len(few.parity)) == (14, 2)
    with pytest.raises(ConversationError, match="leave 4 pairs .* but at least 500 was"):
        sample(rows, RENDERER, tokens_wanted=10**6, parity_pairs=500)


def test_prompts_that_differ_in_case_space_punctuation_or_system_turn_are_one():
    variants = [pair(text, str(i)) for i, text in enumerate(["What is it?", "what  is it", " WHAT IS IT !\n"])]
    system = {"role": "system", "content": "Be brief."}
    variants.append(PreferencePair([system, user("What is it?")], [assistant("a")], [assistant("b")]))
    single = ConversationRow([user("what is IT"), assistant("c")])
    rows = rows_of([*variants, pair("other")], [single])
    for seed in range(6):
        taken = sample(rows, RENDERER, rows_wanted=2, seed=seed)
        calibration = [row.conversation for row in taken.calibration]
        if calibration[0].messages[0] == user("other"):
            assert len(taken.parity) == len(variants)
        else:
            assert [comparison.pair for comparison in taken.parity] == [pair("other")]


def test_every_area_has_its_share_of_both_sides():
    sizes = {"maths": 60, "code/python": 20, "code/c": 10, "chat": 9}
    pairs = [
        pair(f"{top_category} {i}", category=top_category) for top_category, size in sizes.items() for i in range(size)
    ]
    for seed in range(5):
        taken = sample(rows_of(pairs), RENDERER, rows_wanted=66, parity_pairs=33, seed=seed)
        category_counts = taken.category_counts()
        assert set(category_counts) == {"maths", "code", "chat"}
        for top_category, total in (("maths", 60), ("code", 30), ("chat", 9)):
            rows, compared = category_counts[top_category]
            assert abs(rows / 2 - total / 3) <= 2
            assert abs(compared - total / 3) <= 3


def test_areas_of_one_prompt_are_spread_over_both_sides():
    taken = sample(rows_of([pair(f"p{i}", category=f"c{i}") for i in range(300)]), RENDERER, rows_wanted=200)
    assert (len(taken.calibration), len(taken.parity)) == (200, 200)


def test_the_order_of_the_lines_changes_nothing_and_the_seed_does():
    pairs = [pair(f"p{i % 40}", f"n{i}", category=f"c{i % 3}") for i in range(90)]
    first = sample(rows_of(pairs), RENDERER, rows_wanted=20, seed=3)
    shuffled = random.Random(1).sample(pairs, len(pairs))
    again = sample(rows_of(shuffled), RENDERER, rows_wanted=20, seed=3)
    assert (first.calibration, first.parity) == (again.calibration, again.parity)
    assert first.fingerprint() == again.fingerprint()
    assert sample(rows_of(pairs), RENDERER, rows_wanted=20, seed=4).fingerprint() != first.fingerprint()


def test_the_split_is_the_same_on_every_machine():
    taken = sample(rows_of([pair(f"p{i}") for i in range(12)]), RENDERER, rows_wanted=6, seed=0)
    order = [comparison.pair.prompt[0]["content"] for comparison in taken.parity]
    assert order == ["p0", "p7", "p3", "p10", "p2", "p6", "p5", "p9", "p8"]
    assert taken.fingerprint().startswith("0ad861c0994229cf")


def test_fingerprint_sees_every_token_and_where_rows_end():
    def fingerprint(*ids: list[int]) -> str:
        rendered = [RenderedConversation(list(row), len(row) - 1) for row in ids]
        return Sample([], [(pair("p"), *rendered)]).fingerprint()  # type: ignore[list-item,arg-type]

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3])
    assert len({fingerprint([1, 2], [3]), fingerprint([1], [2, 3]), fingerprint([1, 2], [4])}) == 3


def test_long_rows_are_left_out_whole_and_counted():
    pairs = [pair(f"p{i}", size=5 if i % 3 else 200) for i in range(30)]
    taken = sample(rows_of(pairs), RENDERER, rows_wanted=10, max_tokens=100)
    assert taken.too_long > 0 and taken.too_long % 2 == 0
    assert max(len(row.rendered.token_ids) for row in taken.calibration) <= 100
    assert len(taken.parity) == 15
    assert taken.notes == [f"skipped, longer than 100 tokens: {taken.too_long} conversations"]
    positions = sample(rows_of(pairs), FakeRenderer(100), rows_wanted=10, max_tokens=5_000)
    assert positions.calibration == taken.calibration and positions.parity == taken.parity
    assert "the first: rows:p" in positions.notes[0]


def test_a_long_response_costs_calibration_only_its_own_row():
    long_chosen = PreferencePair([user("p")], [assistant("x" * 500)], [assistant("short")])
    taken = sample(rows_of([long_chosen]), RENDERER, rows_wanted=1, parity_pairs=0, max_tokens=100)
    assert taken.calibration[0].conversation.messages[-1]["content"] == "short"


def test_few_prompts_with_many_pairs_leave_half_the_prompts_for_parity():
    pairs = [pair(f"p{i % 6}", f"n{i}") for i in range(120)]
    taken = sample(rows_of(pairs), RENDERER, rows_wanted=64)
    assert len(taken.calibration) == 64
    assert [len(side) for side in prompts(taken)] == [3, 3]
    assert len(taken.parity) == 60


def test_parity_takes_one_pair_of_each_prompt_first():
    pairs = [pair(f"p{i % 10}", f"n{i}") for i in range(100)]
    taken = sample(rows_of(pairs), RENDERER, rows_wanted=2, parity_pairs=9)
    assert max(Counter(c.pair.prompt[0]["content"] for c in taken.parity).values()) == 1


def test_single_conversations_calibrate_but_do_not_compare():
    singles = [ConversationRow([user(f"p{i}"), assistant("a")]) for i in range(8)]
    taken = sample(rows_of([], singles), RENDERER, rows_wanted=8)
    assert len(taken.calibration) == 8 and taken.parity == []
    assert "no parity: the data has single conversations only" in taken.summary()
    assert sample(rows_of([], singles), RENDERER, rows_wanted=8, parity_pairs=0).notes == []


@pytest.mark.parametrize(
    ("pairs", "wanted", "message"),
    [
        (3, {"rows_wanted": 8}, "6 of the 8 requested calibration rows are available in 3 pairs and 0 single"),
        (
            3,
            {"rows_wanted": 6},
            "6 calibration rows leave 0 pairs .* of 3 pairs .* at least 1 .*request fewer",
        ),
        (5, {"rows_wanted": 4, "parity_pairs": 4}, "4 calibration rows leave 3 pairs .* 4 was requested"),
        (9, {"rows_wanted": 4, "max_tokens": 3}, r"0 of the 4 .* \(skipped, longer than 3 tokens: 18"),
    ],
)
def test_too_little_data_is_refused_with_its_numbers(pairs, wanted, message):
    with pytest.raises(ConversationError, match=f"^rows.jsonl: {message}"):
        sample(rows_of([pair(f"p{i}") for i in range(pairs)]), RENDERER, **wanted)


def test_summary_of_the_bundled_set():
    taken = sample(load_rows(), RENDERER, rows_wanted=128)
    lines = taken.summary().splitlines()
    assert lines[0].startswith("calibration: 128 conversations, ")
    assert lines[1].startswith(f"parity: {len(taken.parity)} pairs on other prompts, ")
    assert all(rows and pairs for rows, pairs in taken.category_counts().values())


def fitting(unit: PreferencePair | ConversationRow) -> int:
    """How many of a unit's conversations have at most 100 tokens."""
    if isinstance(unit, ConversationRow):
        return len(RENDERER.render(unit.messages).token_ids) <= 100
    both = (unit.chosen_conversation, unit.rejected_conversation)
    return sum(len(RENDERER.render(messages).token_ids) <= 100 for messages in both)


UNITS = st.tuples(st.integers(0, 15), st.integers(0, 3), st.booleans(), st.integers(0, 120))


@settings(deadline=None)
@given(st.lists(UNITS, max_size=40), st.integers(1, 20), st.none() | st.integers(0, 6), st.integers(0, 3))
def test_a_sample_is_exact_disjoint_and_within_limits_or_refused(units, rows_wanted, parity_pairs, seed):
    pairs, singles = [], []
    for number, (prompt, category, is_pair, size) in enumerate(units):
        unit = pair(f"p{prompt}", f"n{number}", f"c{category}", size)
        if is_pair:
            pairs.append(unit)
        else:
            singles.append(ConversationRow(unit.chosen_conversation, unit.category))
    arguments = {"rows_wanted": rows_wanted, "parity_pairs": parity_pairs, "max_tokens": 100, "seed": seed}
    rows = rows_of(pairs, singles)
    try:
        taken = sample(rows, RENDERER, **arguments)
    except ConversationError:
        fits = [fitting(unit) for unit in [*pairs, *singles]]
        prompts_with_pairs = {unit.prompt[0]["content"] for unit in pairs if fitting(unit) == 2}
        wanted = 1 if parity_pairs is None else parity_pairs
        left = len(prompts_with_pairs) - rows_wanted - sum(not fit for fit in fits)
        assert sum(fits) < rows_wanted or left < wanted  # plenty is never refused
        assert sum(fits) < rows_wanted or wanted > 0
        return
    assert len(taken.calibration) == rows_wanted
    assert not prompts(taken)[0] & prompts(taken)[1]
    known = {unit.id for unit in pairs}
    assert all(comparison.pair.id in known for comparison in taken.parity)
    ids = [row.conversation.id for row in taken.calibration] + [c.pair.id for c in taken.parity]
    assert len(set(ids)) == len(ids)
    assert parity_pairs is None or len(taken.parity) == (parity_pairs if pairs else 0)
    rendered = [row.rendered for row in taken.calibration]
    rendered += [side for comparison in taken.parity for side in (comparison.chosen, comparison.rejected)]
    assert all(len(one.token_ids) <= 100 for one in rendered)
    assert taken.calibration_tokens + taken.parity_tokens == sum(len(one.token_ids) for one in rendered)
    assert sample(rows, RENDERER, **arguments).fingerprint() == taken.fingerprint()
