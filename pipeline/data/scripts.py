"""Holds a rendered conversation as pieces of text that its turns share, so that each piece is tokenized only once."""

from dataclasses import dataclass
from typing import NamedTuple


class Turn(NamedTuple):
    """An assistant turn that the model learns: where its prompt is in the script, and its completion.

    Attributes:
        settled: the prompt begins with this number of the script's settled pieces.
        start, stop: the prompt goes on with this slice of the script's recent pieces.
        opening: the end of the prompt, after which the model continues.
        completion: the text that the model learns, with the stop token.
    """

    settled: int
    start: int
    stop: int
    opening: str
    completion: str


@dataclass(frozen=True)
class Script:
    """A rendered conversation.

    Attributes:
        settled: the messages up to an answer, without the reasoning before it. Each piece begins with a special token.
        recent: the messages since an answer, with their reasoning.
        turns: the turns to learn, in order.
    """

    settled: list[str]
    recent: list[str]
    turns: list[Turn]

    def prompt(self, turn: Turn) -> str:
        """Return the text of a turn's prompt, exactly as at inference."""
        return "".join([*self.settled[: turn.settled], *self.recent[turn.start : turn.stop], turn.opening])

    def texts(self) -> list[str]:
        """Return the pieces that the turns need."""
        settled = max((turn.settled for turn in self.turns), default=0)
        needed = [*self.settled[:settled], *self.recent]
        return needed + [text for turn in self.turns for text in (turn.opening, turn.completion)]
