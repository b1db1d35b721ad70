"""The `emloc` command."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape

import emloc_jax.cli._options as options
from emloc_jax.cli._config import load_config
from emloc_jax.cli._console import console, set_up_logging
from emloc_jax.cli._plan_options import PlanConfig
from emloc_jax.errors import EmlocError

__all__ = ["main"]

_OVERVIEW = """\
Fine-tune a model in the memory you already need to run it.

  emloc demo                                      the whole story on a small real model
  emloc finetune --config configs/gsm8k.yaml      your model and data, from start to end
  emloc doctor                                    what this machine offers, with advice
  emloc VERB --help                               every option of a verb, with its default

Options are `key=value`, after an optional YAML file; the resolved configuration is written beside
the results. An unknown key is an error. No existing output is overwritten."""

_VERBS: dict[str, type] = {
    "doctor": options.DoctorConfig,
    "plan": PlanConfig,
    "emulate": options.EmulateConfig,
    "finetune": options.FinetuneConfig,
    "correct": options.CorrectConfig,
    "merge": options.MergeConfig,
    "export": options.ExportConfig,
    "eval": options.EvalConfig,
    "generate": options.GenerateConfig,
}
_RESUMABLE = {"finetune", "emulate", "merge"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Status 0: done. 2: the request cannot be carried out, with a message that says why. 130:
    interrupted. Anything else is a bug and comes with a traceback.
    """
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (parsed.verb == "demo" or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # The tokenizers need no torch, and nobody here misses it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    parsed.overrides = [*getattr(parsed, "overrides", []), *rest]  # also those behind a flag
    sys.path.insert(0, os.getcwd())  # so that a score `module:function` of yours is found
    set_up_logging(parsed.verbose)
    _calm_blas()
    try:
        _runner(parsed)()
    except EmlocError as error:
        console.print(f"[bold red]emloc {parsed.verb}:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"emloc {parsed.verb}: interrupted.")
        return 130
    return 0


def _calm_blas() -> None:
    """One thread for LAPACK on a small machine: XLA's pool has the cores, and two pools thrash.

    On two cores with other work, decompositions were thirty times slower with two threads.
    """
    if (os.cpu_count() or 1) > 4:
        return
    import scipy.linalg  # noqa: F401  XLA calls the LAPACK that scipy loads
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1, user_api="blas")


def _runner(parsed: argparse.Namespace) -> Callable[[], Any]:
    """The function that does the work; imports wait until the configuration is known to be good."""
    if parsed.verb == "demo":
        from emloc_jax.cli._demo import demo

        return lambda: demo(parsed.output, seed=parsed.seed, resume=parsed.resume)
    config = load_config(_VERBS[parsed.verb], parsed.config, parsed.overrides)
    if parsed.verb == "finetune":
        from emloc_jax.cli._finetune_verb import run_finetune

        return lambda: run_finetune(config, resume=parsed.resume)
    if parsed.verb == "plan":
        from emloc_jax.cli._plan import run_plan

        return lambda: run_plan(config)
    if parsed.verb == "doctor":
        from emloc_jax.cli._doctor import run_doctor

        return lambda: run_doctor(config)
    import emloc_jax.cli._verbs as verbs

    run = getattr(verbs, f"run_{parsed.verb}")
    if parsed.verb in _RESUMABLE:
        return lambda: run(config, resume=parsed.resume)
    return lambda: run(config)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("emloc", description=_OVERVIEW, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    demo = verbs.add_parser(
        "demo", help="the whole story on a small real model", formatter_class=raw
    )
    demo.add_argument("--output", default="runs/demo", help="new folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data and training (default: 0)")
    demo.add_argument("--resume", action="store_true", help="go on with an unfinished demo")
    demo.add_argument("-v", "--verbose", action="store_true", help="show the library's log")
    for name, kind in _VERBS.items():
        summary = (kind.__doc__ or "").strip()
        verb = verbs.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=f"{summary}\n\n{_option_list(kind)}",
            formatter_class=raw,
        )
        verb.add_argument("--config", metavar="FILE", help="YAML file with options")
        verb.add_argument("-v", "--verbose", action="store_true", help="show the library's log")
        if name in _RESUMABLE:
            verb.add_argument("--resume", action="store_true", help="go on with an unfinished run")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="options, see above")
    return parser


def _option_list(kind: type) -> str:
    lines = options.describe(kind)
    width = max(len(f"{name}={default}") for name, default, _ in lines)
    return "options:\n" + "\n".join(
        f"  {f'{name}={default}':{width}}  {doc}" for name, default, doc in lines
    )


if __name__ == "__main__":
    sys.exit(main())
