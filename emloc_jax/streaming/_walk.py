"""Walking the blocks of a model whose parameters lie elsewhere, the next one on its way."""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from emloc_jax.models import BlockSource

__all__ = ["walk"]


def walk(
    source: BlockSource,
    order: Iterable[int],
    *,
    ahead: int = 1,
    put: Callable[[Any], Any] = jax.device_put,
) -> Iterator[tuple[int, Any]]:
    """Yields `(index, parameters on the device)` in the order asked for.

    While the caller computes with one block, a thread reads the next and sends it off, so the
    device holds `ahead + 1` blocks at most, if the caller drops a block before it asks for the
    next. A caller that stops early leaves nothing running.

    Args:
      source: of the blocks.
      order: which blocks, `range(L)` or its reverse say.
      ahead: blocks to fetch in advance; 0 fetches when asked.
      put: sends a block's arrays to the device.

    Example:
      >>> import numpy as np
      >>> class Two:
      ...     num_blocks = 2
      ...     def outer(self): return {}
      ...     def block(self, index): return {"scale": np.full(3, index)}
      >>> [(index, int(params["scale"].sum())) for index, params in walk(Two(), [1, 0])]
      [(1, 3), (0, 0)]
    """

    def fetch(index: int) -> Any:
        return put(source.block(index))

    if ahead == 0:
        for index in order:
            yield index, fetch(index)
        return
    waiting: list[tuple[int, concurrent.futures.Future[Any]]] = []
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="blocks") as pool:
        try:
            for index in order:
                waiting.append((index, pool.submit(fetch, index)))
                if len(waiting) > ahead:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _first(waiting: list[tuple[int, "concurrent.futures.Future[Any]"]]) -> tuple[int, Any]:
    """Takes the first out, so that the list does not keep its arrays."""
    index, future = waiting.pop(0)
    return index, future.result()
