"""Which sizes and choices a stage depends on, so that nothing is compiled twice."""

from collections.abc import Callable
from typing import Any, TypeVar

from emloc_jax.memory._setting import Setting

__all__ = ["depends_on", "relevant"]

F = TypeVar("F", bound=Callable[..., Any])


def depends_on(*fields: str) -> Callable[[F], F]:
    """Says of a maker of stages which fields of a `Setting` it looks at.

    Example:
      >>> maker = depends_on("length")(lambda abstract, setting, target: iter(()))
      >>> relevant(maker, Setting(length=8, ratio=0.3)) == relevant(maker, Setting(length=8))
      True
    """

    def mark(maker: F) -> F:
        maker.fields = fields  # pyright: ignore[reportFunctionMemberAccess]
        return maker

    return mark


def relevant(maker: Callable[..., Any], setting: Setting) -> Any:
    """What of a setting decides about a maker's stages: equal values, equal figures."""
    fields = getattr(maker, "fields", None)
    return setting if fields is None else tuple(getattr(setting, name) for name in fields)
