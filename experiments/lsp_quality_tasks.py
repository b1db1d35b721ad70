"""Models with their tasks: SmolLM2-135M on E2E and GSM8K, a BERT of six layers on Banking77."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emloc_jax.checkpoints import load_pretrained, minilm_path, smollm2_path
from emloc_jax.kernels import KernelSpec, find_kernels, intercept
from emloc_jax.training import encode_rows, make_loss, padded_batches, read_rows


@dataclasses.dataclass(frozen=True)
class Task:
    train: str
    test: str
    columns: dict
    max_length: int
    steps: int
    batch_size: int = 4
    test_rows: int = 24
    dev_rows: int = 24
    calibration_batches: int = 4  # of `batch_size` rows, to fit projectors on
    subspace: float = 0.5
    nnz: int = 4
    refit_every: int = 100
    fit_steps: int = 40
    threshold: float = 0.3
    normalize: bool = True  # of LSP: steps as long as Adam's own
    higher: int = 0  # first guesses of the rate are so many places further up the grid


TASKS = {
    "e2e": Task(
        "e2e/devset.csv",
        "e2e/testset_w_refs.csv",
        {"prompt": "Facts: {mr}\nSentence:", "completion": " {ref}"},
        max_length=80,
        steps=32,
    ),
    "gsm8k": Task(
        "gsm8k/train.jsonl",
        "gsm8k/test.jsonl",
        {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
        max_length=112,
        steps=24,
    ),
    "banking77": Task(
        "banking77/train.csv",
        "banking77/test.csv",
        {"prompt": "{text}", "completion": "{category}"},
        max_length=32,
        steps=160,
        batch_size=16,
        test_rows=512,
        dev_rows=256,
        higher=1,
    ),
}


class Bench:
    """A model with a task: its kernels, loss, batches and scores."""

    task: Task
    params: Any
    kernels: dict[str, KernelSpec]

    def loss(self, params, batch):
        """Sum of the losses, and what to divide it by."""
        raise NotImplementedError

    def batches(self, rows, size, seed=None):
        """One pass in the given order, or endless in an order of `seed`'s."""
        raise NotImplementedError

    def hits(self, params, batch):
        """Rows that are answered right, for tasks that count them."""
        del params, batch
        return None

    def evaluator(self):
        both = jax.jit(lambda params, batch: (self.loss(params, batch), self.hits(params, batch)))

        def evaluate(params, rows):
            total = weight = hits = 0.0
            for batch in self.batches(rows, 32):
                (one, own), right = both(params, batch)
                total, weight = total + float(one), weight + float(own)
                hits += 0.0 if right is None else float(right)
            scores = {"loss": total / weight}
            return scores if right is None else scores | {"accuracy": hits / weight}

        return evaluate


class Language(Bench):
    """SmolLM2-135M; loss over the completions."""

    def __init__(self, task, data):
        self.task = task
        base = load_pretrained(smollm2_path(), scan_layers=True)
        self.params = jax.device_put(base.params)
        self.apply = intercept(base.model.apply)
        self.token_loss = make_loss(self.apply, chunk=128)
        found = find_kernels(base.model.apply, self.params, jax.ShapeDtypeStruct((1, 8), np.int32))
        self.kernels = {path: spec for path, spec in found.items() if not spec.tied}

        def examples(file, rows):
            read = read_rows(data / file, columns=task.columns)
            order = np.random.default_rng(12345).permutation(len(read))
            chosen = [read[i] for i in order[: 4 * rows]]
            encoded = encode_rows(chosen, base.tokenizer, max_length=2048)
            return [e for e in encoded if len(e.tokens) <= task.max_length][:rows]

        rows = examples(task.train, 1024 + task.dev_rows)
        self.dev, self.train = rows[: task.dev_rows], rows[task.dev_rows :]
        self.test = examples(task.test, task.test_rows)

    def loss(self, params, batch):
        return self.token_loss(params, batch)

    def batches(self, rows, size, seed=None):
        how = {"shuffle": False, "epochs": 1} if seed is None else {"seed": seed}
        return padded_batches(rows, batch_size=size, buckets=[self.task.max_length], **how)


class Classifier(Bench):
    """all-MiniLM-L6-v2, a BERT of six layers, with a fresh head; accuracy."""

    def __init__(self, task, data):
        self.task = task
        train = read_rows(data / task.train, columns=task.columns)
        test = read_rows(data / task.test, columns=task.columns)
        labels = sorted({row.completion for row in train})
        base = load_pretrained(minilm_path(), num_labels=len(labels), scan_layers=True)
        self.params = jax.device_put(base.params)
        self.apply = intercept(base.model.apply)
        found = find_kernels(base.model.apply, self.params, jax.ShapeDtypeStruct((1, 8), np.int32))
        self.kernels = {path: spec for path, spec in found.items() if not spec.tied}
        number = {label: i for i, label in enumerate(labels)}

        def arrays(rows):
            tokens = np.zeros((len(rows), task.max_length), np.int32)
            segments = np.zeros_like(tokens)
            for i, row in enumerate(rows):
                own = base.tokenizer(row.prompt)["input_ids"]
                if len(own) > task.max_length:  # cut, but the last token ends a sequence
                    own = own[: task.max_length - 1] + own[-1:]
                tokens[i, : len(own)], segments[i, : len(own)] = own, 1
            answers = np.array([number[row.completion] for row in rows], np.int32)
            return {"tokens": tokens, "segments": segments, "labels": answers}

        order = np.random.default_rng(12345).permutation(len(train))
        shuffled = [train[i] for i in order]
        self.dev = arrays(shuffled[: task.dev_rows])
        self.train = arrays(shuffled[task.dev_rows :])
        order = np.random.default_rng(12345).permutation(len(test))
        self.test = arrays([test[i] for i in order[: task.test_rows]])

    def logits(self, params, batch):
        return self.apply({"params": params}, batch["tokens"], segments=batch["segments"])

    def loss(self, params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self.logits(params, batch), batch["labels"]
        )
        return losses.sum(), jnp.float32(len(losses))

    def hits(self, params, batch):
        return jnp.sum(jnp.argmax(self.logits(params, batch), -1) == batch["labels"])

    def batches(self, rows, size, seed=None):
        count = len(rows["tokens"])
        if seed is None:
            orders = [np.arange(count)[i : i + size] for i in range(0, count, size)]
        else:
            orders = endless(np.random.default_rng(seed), count, size)
        return ({name: array[own] for name, array in rows.items()} for own in orders)


def endless(generator, count, size):
    while True:
        order = generator.permutation(count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))
