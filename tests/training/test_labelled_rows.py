"""Labelled rows: read, tokenised, batched, and the loss and metrics of their predictions."""

import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from emloc_jax.errors import ConfigError, DataError, NonFiniteError, NoTokensError
from emloc_jax.training import (
    LabelledRow,
    check_label_metrics,
    encode_labelled_rows,
    evaluate_labels,
    label_metrics,
    label_names,
    make_label_loss,
    pad_labelled_examples,
    padded_batches,
    read_labelled_rows,
)

WORDS = ["[PAD]", "[CLS]", "[SEP]", *"abcdefgh"]
COLUMNS = {"text": "text", "label": "category"}


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")


def row(text, pair=None, label="x", number=1):
    return LabelledRow(f"row {number}", text, pair, label)


def encode(rows, tokenizer, **options):
    given = {"names": ("x", "y"), "max_length": 99, "token_types": True}
    return encode_labelled_rows(rows, tokenizer, **(given | options))


def test_banking77_s_csv(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('text,category\n"Where, please?",card\nWhy?,fee\nHow?,card\n')
    rows = read_labelled_rows(path, columns=COLUMNS)
    assert [(r.text, r.text_pair, r.label) for r in rows[:2]] == [
        ("Where, please?", None, "card"),
        ("Why?", None, "fee"),
    ]
    assert rows[1].origin == f"{path}:3" and label_names(rows) == ("card", "fee")


def test_pairs_templates_and_numbers_as_labels():
    records = [{"q": "a", "title": "t", "body": "b", "label": n} for n in (10, 9, 2)]
    rows = read_labelled_rows(
        records, columns={"text": "{title}: {body}", "text_pair": "q", "label": "label"}
    )
    assert (rows[0].text, rows[0].text_pair) == ("t: b", "a")
    assert label_names(rows) == ("2", "9", "10")


@pytest.mark.parametrize(
    "record, words",
    [
        ({"text": "a"}, "row 1.*'category' cannot be filled"),
        ({"text": 3, "category": "x"}, "row 1: column 'text' must be text, found int"),
        ({"text": " ", "category": "x"}, "nothing to classify"),
        ({"text": "a", "category": 0.5}, "a name or a whole number, found 0.5"),
        ({"text": "a", "category": True}, "found True"),
        ({"text": "a", "category": ""}, "found ''"),
    ],
)
def test_malformed_rows(record, words):
    with pytest.raises(DataError, match=words):
        read_labelled_rows([record], columns=COLUMNS)


def test_impossible_columns_and_no_rows():
    for wrong in ({"text": "a"}, {"text": "a", "label": "b", "prompt": "c"}):
        with pytest.raises(ConfigError, match="'text' and 'label'"):
            read_labelled_rows([], columns=wrong)
    with pytest.raises(DataError, match="no row"):
        read_labelled_rows([])


def test_pairs_are_one_sequence_with_token_types(tokenizer):
    one, other = encode([row("a b", "c"), row("d", "", label="y")], tokenizer)
    assert one.tokens.tolist() == [1, 3, 4, 2, 5, 2]
    assert one.token_types.tolist() == [0, 0, 0, 0, 1, 1]
    assert other.tokens.tolist() == [1, 6, 2, 2]
    assert one.label.dtype == np.int32 and (int(one.label), int(other.label)) == (0, 1)
    (single,) = encode([row("a b")], tokenizer, token_types=False)
    assert single.tokens.tolist() == [1, 3, 4, 2] and single.token_types is None
    (score,) = encode([row("a", label=4.75)], tokenizer, names=())
    assert score.label.dtype == np.float32 and float(score.label) == 4.75


def test_long_rows_are_refused_or_cut_on_the_side_that_is_asked(tokenizer):
    rows = [row("a b c d", "e f")]
    with pytest.raises(DataError, match="row 1: the row has 9 tokens, the context holds 7"):
        encode(rows, tokenizer, max_length=7)
    for side, first in (("right", "ab"), ("left", "cd")):
        (cut,) = encode(rows, tokenizer, max_length=7, truncate=side)
        wanted = [1, *(WORDS.index(letter) for letter in first), 2]
        assert cut.tokens[:4].tolist() == wanted and len(cut.tokens) == 7
    assert tokenizer.truncation_side == "right"
    with pytest.raises(ConfigError, match="truncate"):
        encode(rows, tokenizer, truncate="middle")


def test_labels_that_nobody_learns_and_half_pairs(tokenizer):
    with pytest.raises(DataError, match="row 2: the label 'z' is none of the 2.*x, y"):
        encode([row("a"), row("b", label="z", number=2)], tokenizer)
    with pytest.raises(DataError, match="make them all alike"):
        encode([row("a"), row("b", "c")], tokenizer)


def test_batches_are_padded_weighted_and_resumable(tokenizer):
    rows = [row("a b c", "d", label="y"), row("a", "b"), row("c", "d")]
    examples = encode(rows, tokenizer)
    batch = pad_labelled_examples(examples[:2], batch_size=3, length=8)
    assert batch["tokens"][1].tolist() == [1, 3, 2, 4, 2, 0, 0, 0]
    assert batch["segments"].sum(1).tolist() == [7, 5, 0]
    assert batch["positions"][1].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch["token_types"][0].tolist() == [0] * 5 + [1, 1, 0]
    assert batch["labels"].tolist() == [1, 0, 0] and batch["weights"].tolist() == [1, 1, 0]
    first, last = padded_batches(
        examples, batch_size=2, shuffle=False, epochs=1, pad=pad_labelled_examples
    )
    assert first["tokens"].shape == (2, 32) and last["weights"].tolist() == [1, 0]
    one, other = (
        padded_batches(made, batch_size=2, pad=pad_labelled_examples).fingerprint
        for made in (examples, encode([row("a b c", "d"), *rows[1:]], tokenizer))
    )
    assert one != other  # they differ in a label alone


LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 1])
PREDICTED = np.array([0, 1, 0, 1, 1, 0, 1, 1])  # 4 true, 1 false positive; 2 true, 1 false negative


def test_metrics_equal_their_formulas():
    scores = label_metrics(["accuracy", "f1", "matthews"], PREDICTED, LABELS)
    assert scores["accuracy"] == 6 / 8
    assert scores["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert scores["matthews"] == pytest.approx((4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3))
    other = label_metrics(["f1"], PREDICTED, LABELS, positive=0)["f1"]
    assert other == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([0.0, 1.0, 5.0, 2.0])
    scores = label_metrics(["pearson", "spearman"], x, y)
    dx, dy = x - 2.5, y - 2.0
    assert scores["pearson"] == pytest.approx((dx @ dy) / math.sqrt((dx @ dx) * (dy @ dy)))
    assert scores["spearman"] == pytest.approx(1)  # the order is the same
    turned = label_metrics(["spearman"], x, np.array([2.0, 1.0, 5.0, 4.0]))["spearman"]
    assert turned == pytest.approx(1 - 6 * 2 / (4 * 15))  # ranks differ by 1, 1, 0, 0


def test_metrics_without_anything_to_tell():
    ones = np.ones(4, int)
    assert label_metrics(["f1", "matthews"], 0 * ones, 0 * ones) == {"f1": 0.0, "matthews": 0.0}
    assert math.isnan(label_metrics(["pearson"], ones * 0.5, np.arange(4.0))["pearson"])


def test_metrics_that_do_not_fit(monkeypatch):
    for names, classes in ((["f1"], 3), (["pearson"], 2), (["accuracy"], 0), (["beauty"], 2)):
        with pytest.raises(ConfigError, match=names[0]):
            check_label_metrics(names, classes)
    with pytest.raises(ConfigError, match="beauty"):
        label_metrics(["beauty"], PREDICTED, LABELS)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    check_label_metrics(["accuracy"], 2)
    with pytest.raises(ConfigError, match=r"pip install 'emloc_jax\[glue\]'"):
        check_label_metrics(["f1"], 2)


def batch_of(labels, weights, dtype=np.int32):
    return {"labels": np.array(labels, dtype), "weights": np.array(weights, np.float32)}


def test_loss_is_over_rows_and_padding_does_not_count():
    logits = np.array([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0], [9.0, np.inf, 0.0]])
    total, weight = make_label_loss(lambda p, b: jnp.asarray(logits))(
        None, batch_of([0, 1, 0], [1, 1, 0])
    )
    rows = [np.log(np.exp(logits[i]).sum()) - logits[i, label] for i, label in ((0, 0), (1, 1))]
    assert float(total) == pytest.approx(sum(rows), rel=1e-6) and float(weight) == 2
    total, _ = make_label_loss(lambda p, b: jnp.array([[1.0], [4.0]]))(
        None, batch_of([3.0, 9.0], [1, 0], np.float32)
    )
    assert float(total) == 4.0


def test_evaluation_pools_rows_of_all_batches():
    def logits(params, batch):
        return params[batch["labels"]]

    params = jnp.array([[2.0, 0.0], [1.0, 0.0]])  # always class 0
    batches = [batch_of([0, 1], [1, 1]), batch_of([0, 1], [1, 0])]
    report = evaluate_labels(logits, params, batches, metrics=["accuracy"])
    losses = [math.log1p(math.exp(-2)), math.log(math.e + 1), math.log1p(math.exp(-2))]
    assert report.loss == pytest.approx(sum(losses) / 3) and report.rows == 3
    assert report.scores == {"accuracy": 2 / 3}
    with pytest.raises(NonFiniteError):
        evaluate_labels(logits, params * jnp.nan, batches)
    seen = []
    with pytest.raises(ConfigError, match="pearson"):
        evaluate_labels(logits, params, batches, metrics=["pearson"], on_batch=seen.append)
    assert not seen  # before the second batch
    with pytest.raises(NoTokensError):
        evaluate_labels(logits, params, [batch_of([0], [0])])
