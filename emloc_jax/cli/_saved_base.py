"""A base with a fresh head, in a file: adapters must find the head they were made for."""

import dataclasses

from emloc_jax.checkpoints import save_pretrained
from emloc_jax.cli._console import status
from emloc_jax.cli._run import Run
from emloc_jax.cli._session import Session

__all__ = ["with_saved_base"]


def with_saved_base(run: Run, session: Session) -> Session:
    """The session with the folder `base` of its run as the source of its model.

    Args:
      run: where the folder is written, unless a resumed run did so before.
      session: with parameters, and a head that its source lacks.
    """
    folder = run / "base"
    if not run.has("base"):
        with status("Writing the base with its new head"):
            save_pretrained(folder, session.base.params, like=session.base)
    base = dataclasses.replace(session.base, source=folder.absolute(), fresh=(), unused=())
    return dataclasses.replace(session, base=base)
