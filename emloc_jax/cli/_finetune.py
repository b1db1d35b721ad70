"""The whole job: calibrate, emulate, train, correct, merge, evaluate."""

from emloc_jax.cli._adapters import adapted_paths
from emloc_jax.cli._budget import check_budget, finetune_setting, keep_budget
from emloc_jax.cli._checks import (
    check_correction,
    check_data,
    check_emulation,
    check_emulator_options,
    check_model,
    check_moments,
    check_scores,
    check_training,
    check_weights,
)
from emloc_jax.cli._curves import draw_curves
from emloc_jax.cli._data import encode
from emloc_jax.cli._job import Job
from emloc_jax.cli._job_emloc import run_emloc
from emloc_jax.cli._job_original import run_full, run_lora, run_lsp
from emloc_jax.cli._lsp import open_trainer
from emloc_jax.cli._options import FinetuneConfig
from emloc_jax.cli._polish import check_polish
from emloc_jax.cli._report import RunReport
from emloc_jax.cli._rows import RowSource, read_source
from emloc_jax.cli._run import Run, check_run
from emloc_jax.cli._session import load_parameters, open_session
from emloc_jax.cli._stream import finetune_streams
from emloc_jax.cli._task import task_of

__all__ = ["finetune"]


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    train_rows: RowSource | None = None,
    test_rows: RowSource | None = None,
) -> RunReport:
    """Runs `config.method` into the new folder `config.output`.

    Args:
      config: everything.
      resume: go on with an unfinished run of the same configuration.
      train_rows: rows instead of those of `config.data.train`.
      test_rows: rows instead of those of `config.data.test`.

    Returns:
      The report that `report.json` holds.
    """
    check_run(config, resume=resume)
    data = config.data
    test = data.test if test_rows is None else test_rows
    rows = read_source(data.train if train_rows is None else train_rows, data)
    kept = None if test is None else read_source(test, data, first=config.eval.rows)
    task = task_of(rows, data, config.eval)
    check_scores(config.eval, task)
    if config.method == "emloc":
        check_emulator_options(config.emulator)
        check_correction(config.correct)
        check_moments(config.emulator, config.correct)
    check_polish(config.polish, config.method)
    streamed = finetune_streams(config)
    session = open_session(
        config.model,
        chunk=config.train.chunk,
        abstract=True,
        task=task,
        fresh_head=True,
        seed=config.seed,
    )
    check_model(session, config.method)
    check_budget(session, config.memory_budget)
    if config.method == "emloc":
        check_emulation(session, config.emulator)
    lora = config.lora if config.method in ("emloc", "lora") else None
    check_training(session, config.train, lora)
    if config.method == "emloc" and config.correct.weighted:
        check_weights(session, adapted_paths(session, config.lora))
    train_data = encode(session, rows, data)
    test_data = None if kept is None else encode(session, kept, data)
    check_data(session, config, train_data, test_data)
    if config.memory_budget is not None:
        planned = finetune_setting(config, session, train_data, test_data, stream=streamed)
        keep_budget(session, config.memory_budget, *planned)
    if not streamed:
        # LSP-Offload puts the parameters on the device itself, block by block.
        on_device = config.method != "lsp"
        session = load_parameters(session, config.model, on_device=on_device, seed=config.seed)
    trainer = open_trainer(session, config, train_data) if config.method == "lsp" else None
    run = Run(config, resume=resume)  # nothing is written before all of the above is in order
    job = Job(config, run, session, train_data, test_data)
    match config.method:
        case "emloc":
            run_emloc(job)
        case "lora":
            run_lora(job)
        case "full":
            run_full(job)
        case "lsp":
            assert trainer is not None
            run_lsp(job, trainer)
    run.write_json("report.json", job.report.to_dict())
    draw_curves(run.folder)
    return job.report
