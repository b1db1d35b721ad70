"""One piece of advice."""

import dataclasses
from typing import Literal

__all__ = ["Advice"]


@dataclasses.dataclass(frozen=True)
class Advice:
    """What was found on a machine, and what to do about it.

    Attributes:
      level: a warning will cost a run memory, time or digits; a note is good to know.
      what: what was found.
      why: what comes of it.
      do: how to change it, or to live with it.
    """

    level: Literal["warning", "note"]
    what: str
    why: str
    do: str
