"""Text for the demo model, and greedy decoding that knows where it was sure."""

import mlx.core as mx
import numpy as np

REQUEST = "Tell me a story about a brave mouse."
# Written for the tests: no training text is in the repository.
PASSAGE = (
    "The old lighthouse keeper climbed the stairs every evening. He lit the lamp, looked out over "
    "the dark water and waited for the ships to come home. One night a small boat came out of the "
    "storm, and in it sat a girl with a lantern."
)
NEAR_TIE = 0.05  # logits; below, two right computations may choose differently


def greedy(model, ids: list[int], steps: int, near_tie: float = NEAR_TIE) -> tuple[list[int], int]:
    """Greedy tokens, and how many come before the first near-tie."""
    cache, tokens, sure = model.make_cache(), [], steps
    for step in range(steps):
        logits = np.array(model(mx.array([ids]), cache)[0, -1].astype(mx.float32))
        second, first = np.partition(logits, -2)[-2:]
        if first - second < near_tie:
            sure = min(sure, step)
        tokens.append(int(logits.argmax()))
        ids = tokens[-1:]
    return tokens, sure
