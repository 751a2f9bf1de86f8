"""Prompt lookup against a plain search."""

import random

from blockffn_mlx.speculative.lookup_drafter import LookupDrafter


def proposal(drafter, root, total_tokens=8, max_depth=63):
    return drafter.draft(root, total_tokens, max_depth).tokens.tolist()


def test_the_longest_match_wins_and_scales_the_draft():
    drafter = LookupDrafter(draft_per_match=1)
    drafter.observe(None, [1, 2, 3, 4, 5, 6, 9, 9, 2, 3, 7, 8, 9, 1, 2])
    # "1 2 3" (length 3) beats the later "2 3".
    assert drafter.ready(3)
    assert proposal(drafter, 3) == [3, 4, 5, 6]
    assert proposal(drafter, 3, total_tokens=3) == [3, 4, 5]
    assert proposal(drafter, 3, max_depth=1) == [3, 4]


def test_the_latest_of_equal_matches_wins():
    drafter = LookupDrafter(draft_per_match=1)
    drafter.observe(None, [1, 2, 5, 5, 1, 2, 6, 6, 0, 1])
    assert proposal(drafter, 2) == [2, 6, 6]


def test_no_match_proposes_the_root_alone():
    drafter = LookupDrafter()
    assert not drafter.ready(3)
    assert proposal(drafter, 3) == [3]
    drafter.observe(None, [1, 2, 3, 4])
    assert not drafter.ready(2)
    assert proposal(drafter, 2) == [2]


def test_a_loop_is_followed_into_the_draft_itself():
    drafter = LookupDrafter()
    drafter.observe(None, [7, 1, 2, 1, 2, 1])
    assert proposal(drafter, 2, total_tokens=6) == [2, 1, 2, 1, 2, 1]


def test_reset_forgets_the_text_and_counts_from_the_offset():
    drafter = LookupDrafter()
    drafter.observe(None, [1, 2, 1])
    assert drafter.length == 3 and drafter.ready(2)
    drafter.reset(10)
    assert drafter.length == 10 and not drafter.ready(2)


def test_rewind_forgets_the_end_only():
    drafter = LookupDrafter(draft_per_match=1)
    drafter.reset(4)
    drafter.observe(None, [1, 2, 3, 1, 2, 5, 1])
    assert proposal(drafter, 2) == [2, 5, 1]
    drafter.rewind(8)
    assert drafter.length == 8 and proposal(drafter, 2) == [2, 3, 1]
    drafter.rewind(2)
    assert drafter.length == 2 and not drafter.ready(2)


def test_random_texts_match_a_plain_search():
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(2, 40))]
        drafter = LookupDrafter(min_ngram=2, max_ngram=5)
        drafter.observe(None, tokens[:-1])
        expected = (0, 0)
        for size in range(5, 1, -1):
            ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]]
            if len(tokens) > size and ends:
                expected = (ends[-1], size)
                break
        assert drafter.longest_match(tokens[-1]) == expected
