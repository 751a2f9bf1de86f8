"""Where an answer ends by its text."""

from collections.abc import Sequence

from mlx_lm.generate import TextStateMachine


class StopTexts:
    """Passes text on up to the first stop text, holding back what may be the start of one.

    Attributes:
        found: Whether a stop text was met; nothing is passed on from then on.
    """

    def __init__(self, stop: Sequence[str]):
        ends = [(text, None) for text in stop if text]
        self.state = TextStateMachine({"answer": ends}).make_state("answer")

    @property
    def found(self) -> bool:
        return self.state[0] is None

    def feed(self, text: str) -> str:
        """Takes new text, returns what is certain to belong to the answer."""
        if self.found:
            return ""
        self.state, segments = TextStateMachine.split(self.state, text)
        return "".join(piece for _, piece in segments)

    def rest(self) -> str:
        """What was held back, once no more text can come."""
        if self.found:
            return ""
        self.state, held, _ = TextStateMachine.flush(self.state)
        return held
