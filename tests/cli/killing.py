"""Runs of the command line in processes of their own, that are killed or kill themselves.

They are forked from a server that has imported what takes long, so that many of them are quick.
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["emloc_jax.cli._finetune", "matplotlib.pyplot", "transformers.models.auto.tokenization_auto"]
)


class Runs:
    """Starts runs that share what XLA has compiled.

    Args:
      folder: gets their output and the compiled programs.
    """

    def __init__(self, folder):
        self.log, self._cache = folder / "log", folder / "compiled"

    def start(self, arguments, *, moment=None):
        """A process that runs `emloc`, after `moment`: one of those below, for it to die at."""
        given = (arguments, str(self.log), str(self._cache), moment)
        process = SERVER.Process(target=_run, args=given)
        process.start()
        return process

    def finish(self, arguments):
        """A whole run."""
        process = self.start(arguments)
        process.join()
        assert process.exitcode == 0, self.log.read_text()


def _run(arguments, log, cache, moment):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    import jax

    from emloc_jax.cli import main

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if moment is not None:
        moment()
    sys.exit(main(arguments))


def kill_after(process, run, step, pause=0.0):
    """SIGKILL some time after the metrics hold `step` lines."""
    while process.is_alive() and lines(run) < step:
        time.sleep(0.005)
    time.sleep(pause)
    process.kill()
    process.join()


def lines(run):
    """How many records the run has written."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def records(run):
    """The metrics without what a clock says."""
    clocks = ("seconds", "tokens_per_second", "compile_seconds")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if key not in clocks} for one in found]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_fit(count):
    """Death when the fit number `count` of projectors has been computed, before it is used."""
    from emloc_jax.offload import _stream_refit

    fit, calls = _stream_refit.fit, itertools.count(1)

    def dying(*args, **kwargs):
        result = fit(*args, **kwargs)
        if next(calls) == count:
            die()
        return result

    _stream_refit.fit = dying


def die_while_saving(count):
    """Death as soon as something of the checkpoint number `count` is on the disk."""
    from emloc_jax.training._run_checkpoints import RunCheckpoints

    save, calls = RunCheckpoints.save, itertools.count(1)

    def dying(self, step, *rest):
        save(self, step, *rest)  # goes on in the background
        if next(calls) == count:
            while not any(path.name.startswith(str(step)) for path in self._folder.iterdir()):
                time.sleep(0.0002)
            die()

    RunCheckpoints.save = dying
