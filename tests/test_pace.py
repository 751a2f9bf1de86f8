"""How many tokens a pass of a prefill takes."""

import pytest

import blockffn_mlx as bf
from blockffn_mlx.pace import FIRST_PASS, LEAST_PASS, PrefillPace, pace_of
from helpers.models import tiny_model


def passes(pace: PrefillPace, clock: list[float], total: int, speed: float) -> list[int]:
    """The passes of a prompt on a machine that reads so many tokens a second."""
    pace.start()
    taken = []
    while sum(taken) < total:
        taken.append(pace.next(total - sum(taken)))
        clock[0] += taken[-1] / speed
    return taken


@pytest.mark.parametrize("speed, usual", [(10, LEAST_PASS), (100, 32), (1030, 512), (1e6, 2048)])
def test_passes_take_half_a_second_on_any_machine(speed, usual):
    clock = [0.0]
    pace = PrefillPace(2048, clock=lambda: clock[0])
    first = passes(pace, clock, 20_000, speed)
    assert first[0] == FIRST_PASS and sum(first) == 20_000
    assert set(first[3:-1]) == {usual}
    clock[0] += 100  # somebody thinks about the next question
    assert passes(pace, clock, 20_000, speed)[0] == usual


def test_a_number_is_so_many():
    assert [pace_of(512).next(left) for left in (2000, 512, 3)] == [512, 512, 3]
    pace = PrefillPace()
    assert pace_of(pace) is pace


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_a_paced_prompt_is_the_same_prompt(draft):
    model, seen = tiny_model(), []
    prompt = [3, 5, 7, 9] * 30
    pace = PrefillPace(16)
    options = dict(max_tokens=6, prompt_progress_callback=lambda *at: seen.append(at), draft=draft)
    paced = list(bf.stream_generate(model, None, prompt, prefill_step_size=pace, **options))
    once = list(bf.stream_generate(model, None, prompt, max_tokens=6, draft=draft))
    assert [r.token for r in paced] == [r.token for r in once]
    assert seen == [*((done, 120) for done in range(0, 119, 16)), (119, 120), (120, 120)]
    with pytest.raises(ValueError, match="logits processors"):
        list(
            bf.stream_generate(
                model, None, prompt, prefill_step_size=pace, logits_processors=[lambda t, x: x]
            )
        )
