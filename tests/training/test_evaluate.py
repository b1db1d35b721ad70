"""Evaluation: token-weighted losses, generated answers, and the scores by name."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError, NonFiniteError, NoTokensError
from emloc_jax.training import (
    Row,
    evaluate_generation,
    evaluate_loss,
    json_equal,
    last_number,
    make_loss,
    padded_batches,
    register_score,
    score_named,
)
from tests.training.toy import Toy, toy_examples, toy_params


def test_loss_is_weighted_by_tokens_whatever_the_batches():
    examples, params = toy_examples(9), toy_params()
    traces = []

    def apply(*args, **kwargs):
        traces.append(kwargs["method"])
        return Toy().apply(*args, **kwargs)

    loss = make_loss(apply)
    reports = [
        evaluate_loss(loss, params, padded_batches(examples, batch_size=size, epochs=1))
        for size in (2, 9)
    ]
    assert reports[0].weight == reports[1].weight == sum(e.weights.sum() for e in examples)
    np.testing.assert_allclose(reports[0].loss, reports[1].loss, rtol=1e-6)
    assert reports[0].perplexity == math.exp(reports[0].loss)
    count = len(traces)
    done = []
    stream = padded_batches(examples, batch_size=2, epochs=1)
    evaluate_loss(loss, params, stream, on_batch=done.append)
    assert len(traces) == count, "a second evaluation compiles nothing"
    assert done == [1, 2, 3, 4, 5]


def test_loss_refusals():
    with pytest.raises(NoTokensError):
        evaluate_loss(lambda p, b: (b, b), None, [])
    with pytest.raises(NonFiniteError, match="nan"):
        evaluate_loss(lambda p, b: (b * jnp.nan, b), None, [np.float32(1)])


def test_generation_scores_each_answer():
    rows = [Row(f"row {i}", prompt=f"{i} + 1 =", completion=f" {i + 1}") for i in range(5)]
    calls, done = [], []

    def generate(prompts):
        calls.append(prompts)
        return [str(int(p.split()[0]) + (1 if p[0] != "3" else 5)) + "." for p in prompts]

    report = evaluate_generation(
        generate,
        rows,
        scores=("exact_match", "last_number"),
        batch_size=2,
        on_batch=done.append,
    )
    assert report.scores == {"exact_match": 0.0, "last_number": 0.8}
    assert [len(c) for c in calls] == [2, 2, 1] and done == [2, 4, 5]
    wrong = report.answers[3]
    assert (wrong.origin, wrong.prompt, wrong.reference, wrong.prediction) == (
        "row 3", "3 + 1 =", " 4", "8.",
    )  # fmt: skip
    tokens = evaluate_generation(
        lambda prompts: [str(sum(p)) for p in prompts],
        rows[:1],
        prompt=lambda row: [0, 1],
        scores=["operator:eq"],
    )
    assert tokens.scores == {"operator:eq": 0.0} and tokens.answers[0].prompt == [0, 1]


def test_generation_refusals():
    rows = [Row("row 7", prompt="p", completion="no number")]
    with pytest.raises(DataError, match="row 7: last_number: the reference has no number"):
        evaluate_generation(lambda p: ["1"], rows, scores=["last_number"])
    with pytest.raises(DataError, match="0 answers to 1 prompts"):
        evaluate_generation(lambda p: [], rows)
    with pytest.raises(DataError, match="no rows"):
        evaluate_generation(lambda p: [], [])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        evaluate_generation(lambda p: [], rows, batch_size=0)
    with pytest.raises(ConfigError, match="no score is named 'rouge'; there are exact_match"):
        evaluate_generation(lambda p: [], rows, scores=["rouge"])
    for missing in ("no_such_module:f", "math:no_such_function"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            score_named(missing)
    with pytest.raises(ConfigError, match="exists already"):
        register_score("exact_match")


@pytest.mark.parametrize(
    "text, number, equal",
    [
        ("48+24 = <<48+24=72>>72 clips.\n#### 72", "72", 1.0),
        ("it costs $1,234,567.", "1234567", 1.0),
        ("about 7.50 dollars", "7.5", 1.0),
        ("-3", "3", 0.0),
        ("about .5", "0.5", 1.0),
        ("1,2", "2", 1.0),  # a list, not thousands
        ("no number", "3", 0.0),
        ("", "3", 0.0),
        ("10-5", "-5", 1.0),
    ],
)
def test_last_number(text, number, equal):
    assert last_number(text, f"#### {number}") == equal


def test_json_equal_is_by_value_and_type():
    assert json_equal(' {"a": [1, {"b": null}]}\n', '{"a":[1,{"b":null}]}') == 1.0
    assert json_equal('{"a": true}', '{"a": 1}') == 0.0
    assert json_equal('{"a": 1} and more', '{"a": 1}') == 0.0
    assert json_equal("[" * 100_000, "{}") == 0.0
    with pytest.raises(DataError, match="not JSON"):
        json_equal("{}", "free text")
