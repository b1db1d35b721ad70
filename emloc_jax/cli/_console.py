"""What a person sees: progress and messages on standard error, results on standard output."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["console", "results", "say", "set_up_logging", "status", "tick", "track"]

T = TypeVar("T")

console = Console(stderr=True)  # progress and messages
results = Console()  # what a command was asked for, fit for a pipe


def set_up_logging(verbose: bool) -> None:
    """Shows the library's log through the same console as the progress bars."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    package = logging.getLogger("emloc_jax")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO if verbose else logging.WARNING)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with a progress bar."""
    with _progress() as progress:
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)


@contextlib.contextmanager
def tick(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A function that sets a bar's position, with a note: `tick(done, note="loss 1.2")`."""
    with _progress() as progress:
        task = progress.add_task(description, total=total, note="")

        def move(done: int, note: str = "", total: int = total) -> None:
            progress.update(task, completed=done, note=note, total=total)

        yield move


@contextlib.contextmanager
def status(description: str) -> Iterator[None]:
    """A spinner for work whose length is unknown."""
    with console.status(description):
        yield


def say(message: Any) -> None:
    """A line for the person at the terminal."""
    console.print(message, soft_wrap=True)
