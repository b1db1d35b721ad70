"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["HeldInterrupt"]

logger = logging.getLogger(__name__)


class HeldInterrupt:
    """While entered, the first Ctrl-C is noted and a second one interrupts at once.

    A step consumes its state, so an interrupt in the middle of one leaves nothing to save. Works in
    the main thread, where Python handles signals; elsewhere it does nothing.

    Attributes:
        noted: whether Ctrl-C was pressed.

    Example:
        >>> with HeldInterrupt() as interrupt:
        ...     interrupt.noted
        False
    """

    def __init__(self):
        self.noted = False
        self._previous: Any = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True
        logger.warning("stopping after this step; press Ctrl-C again to stop at once")

    def __enter__(self) -> HeldInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
