"""Encoders on the command line: fine-tuned as classifiers, evaluated, saved, judged by torch."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from emloc_jax.checkpoints import load_adapter, load_pretrained
from emloc_jax.cli import main
from emloc_jax.cli._task import Task, fit_task
from emloc_jax.kernels import flatten_leaves
from emloc_jax.models import EncoderConfig
from emloc_jax.training import glue_task

ANIMALS, TOOLS = "cat dog fox owl".split(), "saw axe drill rasp".split()
SPECIAL = {"bert": ["[PAD]", "[CLS]", "[SEP]"], "roberta": ["<s>", "<pad>", "</s>"]}
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
LSP = ["method=lsp", "lsp.nnz=2", "lsp.fit_steps=5", "lsp.calibration_rows=4", "lsp.refit_every=3"]


def tokenizer_of(family):
    """Whole words; BERT's token types, RoBERTa's doubled separator."""
    words = SPECIAL[family] + ANIMALS + TOOLS + ["and", "old"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    begin, pad, end = ("[CLS]", "[PAD]", "[SEP]") if family == "bert" else ("<s>", "<pad>", "</s>")
    between = end if family == "bert" else f"{end} {end}"
    second = ":1" if family == "bert" else ""
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {between} $B{second} {end}{second}",
        special_tokens=[(token, words.index(token)) for token in (begin, end)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Random tiny encoders as transformers saves them, one of them with a head."""
    folder = tmp_path_factory.mktemp("encoders")
    made = {"bert": transformers.BertModel, "roberta": transformers.RobertaForMaskedLM}
    made["roberta-labels"] = transformers.RobertaForSequenceClassification
    for name, kind in made.items():
        family = name.split("-")[0]
        tokenizer = tokenizer_of(family)
        config = kind.config_class(
            vocab_size=len(tokenizer),
            max_position_embeddings=24,
            type_vocab_size=2 if family == "bert" else 1,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            **SIZES,
        )
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def words_csv(tmp_path_factory):
    """Is it an animal or a tool? In one word or two."""
    file = tmp_path_factory.mktemp("rows") / "train.csv"
    rows = [(word, "animal") for word in ANIMALS] + [(word, "tool") for word in TOOLS]
    rows += [(f"old {word}", label) for word, label in rows]
    file.write_text("text,category\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return file


@pytest.fixture(scope="module")
def rte(tmp_path_factory):
    """Pairs in the layout of GLUE's RTE: is the second word in the first text?"""
    file = tmp_path_factory.mktemp("rte") / "train.tsv"
    pairs = [(f"{a} and {b}", c) for a in ANIMALS[:3] for b in TOOLS[:3] for c in (a, "owl")]
    lines = [
        f"{i}\t{text}\t{word}\t{'entailment' if word in text else 'not_entailment'}\n"
        for i, (text, word) in enumerate(pairs)
    ]
    file.write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(lines))
    return file


def options(model, rows, *extra, test=True):
    columns = ["data.columns={text: text, label: category}"] if rows.suffix == ".csv" else []
    return [
        f"model.source={model}", f"data.train={rows}", *([f"data.test={rows}"] if test else []),
        *columns, "data.max_length=16", "train.steps=5", "train.batch_size=6",
        "train.learning_rate=0.03", "train.warmup=1", "eval.batch_size=5",
        *extra,
    ]  # fmt: skip


def inputs_of(tokenizer, family, pair, kind):
    types = family == "bert"
    return dict(tokenizer(*pair, return_tensors=kind, return_token_type_ids=types))


def in_torch(folder, family, pairs):
    """Logits of torch on texts or pairs, one by one: no padding that could go wrong."""
    kind = transformers.AutoModelForSequenceClassification
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        outputs = [model.eval()(**inputs_of(tokenizer, family, pair, "pt")) for pair in pairs]
    return np.stack([output.logits[0].numpy() for output in outputs]), model.config


def ours(folder, family, pairs):
    base, outputs = load_pretrained(folder), []
    apply = jax.jit(base.model.apply)
    for pair in pairs:
        inputs = inputs_of(base.tokenizer, family, pair, "np")
        tokens, types = inputs["input_ids"], inputs.get("token_type_ids")
        outputs.append(apply({"params": base.params}, tokens, token_types=types)[0])
    return np.stack(outputs)


def stages(run):
    return json.loads((run / "report.json").read_text())["stages"]


def turn_head(folder):
    """The same classifier with its classes in another order."""
    config = json.loads((folder / "config.json").read_text())
    names = list(config["id2label"].values())[::-1]
    config |= {"id2label": {str(i): name for i, name in enumerate(names)}}
    config |= {"label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_f1_stays_with_its_class_whatever_order_the_head_has():
    """MRPC's is of pairs that are equivalent."""
    own = glue_task("mrpc").labels
    task = Task(own, ("f1",), known=True)
    for names in (own, own[::-1]):
        config = EncoderConfig(
            vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1
        ).with_labels(2)
        labels = {"id2label": {str(i): name for i, name in enumerate(names)}}
        found = SimpleNamespace(config=config, source="folder", hf_config=labels)
        fitted = fit_task(task, found, fresh_head=False)
        assert fitted.names == names and fitted.names[fitted.positive] == "equivalent"


def test_lsp_makes_a_classifier_of_named_rows(tmp_path, encoders, words_csv, capsys):
    run, rows = tmp_path / "run", options(encoders / "bert", words_csv, *LSP)
    assert main(["finetune", *rows, "train.evaluate_every=5", f"output={run}"]) == 0
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "report.json", "merged", "checkpoints"}
    zero, tuned = stages(run)
    assert (zero["name"], tuned["name"]) == ("zero-shot", "all parameters tuned")
    assert tuned["loss"] < zero["loss"] and 0 <= tuned["scores"]["accuracy"] <= 1
    assert "accuracy" in capsys.readouterr().out
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["test_accuracy"] == tuned["scores"]["accuracy"]
    assert records[-1]["test_loss"] == pytest.approx(tuned["loss"])

    texts = [("cat",), ("old drill",), ("old fox",)]
    theirs, config = in_torch(run / "merged", "bert", texts)
    assert config.id2label == {0: "animal", 1: "tool"} and config.label2id["tool"] == 1
    np.testing.assert_allclose(ours(run / "merged", "bert", texts), theirs, atol=1e-4)

    # The head is trained densely; what no rule names stays as it was.
    before = load_pretrained(encoders / "bert", num_labels=2, tokenizer=False).params
    after = load_pretrained(run / "merged", tokenizer=False).params
    before, after = flatten_leaves(before), flatten_leaves(after)
    changed = {path for path in before if (np.asarray(before[path]) != after[path]).all()}
    head = {f"{part}/{leaf}" for part in ("pooler", "classifier") for leaf in ("kernel", "bias")}
    assert changed - head == {path for path in before if re.fullmatch("layers/.*/kernel", path)}
    assert head <= changed
    np.testing.assert_array_equal(before["embed_tokens/embedding"], after["embed_tokens/embedding"])

    # Evaluated as saved, and with its classes in another order.
    saved = [option for option in options(run / "merged", words_csv) if option[:6] != "train."]
    for number in range(2):
        assert main(["eval", *saved, f"output={tmp_path}/eval{number}"]) == 0
        (again,) = stages(tmp_path / f"eval{number}")
        assert again["loss"] == pytest.approx(tuned["loss"], rel=1e-5)
        assert again["scores"] == tuned["scores"]
        turn_head(run / "merged")


def test_pairs_of_glue_resume_to_the_same_bits(tmp_path, encoders, rte):
    """On a RoBERTa whose head is there, with classes that have no names yet."""
    run = tmp_path / "run"
    arguments = options(encoders / "roberta-labels", rte, *LSP, "model.scan_layers=false")
    arguments += ["data.format=glue/rte", "train.save_every=3", f"output={run}"]
    assert main(["finetune", *arguments]) == 0
    zero, tuned = stages(run)
    # Five steps on pairs change the model; that they teach it is not claimed.
    assert tuned["loss"] != zero["loss"] and set(tuned["scores"]) == {"accuracy"}
    pairs = [("cat and axe", "cat"), ("dog and saw", "owl")]
    theirs, config = in_torch(run / "merged", "roberta", pairs)
    assert list(config.id2label.values()) == ["entailment", "not_entailment"]
    np.testing.assert_allclose(ours(run / "merged", "roberta", pairs), theirs, atol=1e-4)

    whole = load_file(run / "merged" / "model.safetensors")
    for name in ("merged", "report.json"):  # as if it had been killed after a checkpoint
        (run / name).rename(tmp_path / f"away_{name}")
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    newest.rename(tmp_path / "away_checkpoint")
    assert main(["finetune", "--resume", *arguments]) == 0
    resumed = load_file(run / "merged" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name])


def test_emloc_trains_the_head_whole_and_every_verb_takes_it(tmp_path, encoders, words_csv, capsys):
    """On a BERT without a head; the adapter brings it, to torch `peft` too."""
    run, base, out = tmp_path / "run", encoders / "bert", tmp_path
    emulator = ["emulator.ratio=0.6", "emulator.where=['layers/.*','pooler']"]
    extra = ["method=emloc", *emulator, "lora.rank=4", "lora.dropout=0.1", "train.accumulation=2"]
    arguments = options(base, words_csv, *extra, "polish.steps=1", "polish.warmup=0")
    assert main(["finetune", *arguments, f"output={run}"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "selects pooler/kernel of the classification head, which is never compressed" in said
    zero, emulated, plain, corrected, polished = stages(run)
    assert emulated["loss"] < zero["loss"] and polished["loss"] < zero["loss"]
    assert not (run / "base").exists()
    boxed = json.loads((run / "emulator" / "emulator_config.json").read_text())["ranks"]
    assert len(boxed) == 6 and all(path.startswith("layers/") for path in boxed)

    # The head is in the adapter, and what was pretrained of it, the pooler, is not.
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    found = load_pretrained(base, num_labels=2, tokenizer=False)
    trained, done = (load_adapter(run / f"adapter{end}", found) for end in ("", "_corrected"))
    assert (trained["classifier/bias"].value != 0).all()
    for path in ("classifier/kernel", "classifier/bias"):
        np.testing.assert_array_equal(trained[path].value, done[path].value)

    texts = [("cat",), ("old drill",), ("old fox",)]
    theirs, config = in_torch(run / "merged", "bert", texts)
    assert config.id2label == {0: "animal", 1: "tool"}
    np.testing.assert_allclose(ours(run / "merged", "bert", texts), theirs, atol=1e-4)
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2)
    model = peft.PeftModel.from_pretrained(model, run / "adapter_polished").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        served = [model(**inputs_of(tokenizer, "bert", text, "pt")).logits[0] for text in texts]
    np.testing.assert_allclose(np.stack(served), theirs, atol=1e-4)

    # Each stage by itself; the classes are named by the adapter, since the base cannot.
    given = [f"model.source={base}", *(a for a in arguments if a.startswith("data."))]
    both = [f"emulator={run}/emulator", f"adapter={run}/adapter"]
    for number, (how, stage) in enumerate(
        [(both[1:], plain), ([f"adapter={run}/adapter_corrected"], corrected), (both, emulated)]
    ):
        assert main(["eval", *given, *how, f"output={out}/eval{number}"]) == 0
        assert stages(out / f"eval{number}")[0]["loss"] == pytest.approx(stage["loss"], rel=1e-4)
    rows = [a for a in given if not a.startswith("data.test=")]
    assert main(["emulate", *rows, *emulator, f"output={out}/emulator"]) == 0
    same_tensors(run, out, "emulator/emulator.safetensors")
    limit = json.loads((run / "report.json").read_text())["facts"]["correction limit"]
    correct = [*both, f"correct.limit={limit}", f"output={out}/adapter_corrected"]
    assert main(["correct", given[0], *correct]) == 0
    same_tensors(run, out, "adapter_corrected/adapter_model.safetensors")
    last = [given[0], f"adapter={run}/adapter_polished"]
    assert main(["merge", *last, f"output={out}/merged"]) == 0
    same_tensors(run, out, "merged/model.safetensors")
    assert (out / "merged/config.json").read_text() == (run / "merged/config.json").read_text()
    assert main(["export", *last, "format=peft", f"output={out}/adapter_polished"]) == 0
    same_tensors(run, out, "adapter_polished/adapter_model.safetensors")


def same_tensors(folder, other, file):
    one, same = load_file(folder / file), load_file(other / file)
    assert one.keys() == same.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])


def test_lora_on_a_roberta_resumes_to_the_same_bits(tmp_path, encoders, words_csv):
    """Its head has two layers and was not there."""
    run, away = tmp_path / "run", tmp_path / "away"
    arguments = options(encoders / "roberta", words_csv, "method=lora", "lora.rank=4")
    arguments += ["train.save_every=3", "lora.dropout=0.1", f"output={run}"]
    assert main(["finetune", *arguments]) == 0
    zero, tuned = stages(run)
    assert tuned["loss"] < zero["loss"]
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {name for name in stored if "lora_" not in name} == {
        f"base_model.model.classifier.{layer}.{part}"
        for layer in ("dense", "out_proj")
        for part in ("weight", "bias")
    }
    away.mkdir()
    for name in ("adapter", "merged", "report.json"):  # as if killed after a checkpoint
        (run / name).rename(away / name)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    newest.rename(away / "checkpoint")
    assert main(["finetune", "--resume", *arguments]) == 0
    same_tensors(away, run, "adapter/adapter_model.safetensors")


def test_full_training_on_scores_of_sts_b(tmp_path, encoders):
    rows = [
        {"sentence1": a, "sentence2": b, "label": 5.0 * (a == b)} for a in ANIMALS for b in ANIMALS
    ]
    file, run = tmp_path / "train.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = options(encoders / "roberta", file, "method=full", "data.format=glue/stsb")
    assert main(["finetune", *arguments, f"output={run}"]) == 0
    zero, tuned = stages(run)
    assert set(tuned["scores"]) == {"pearson", "spearman"} and tuned["loss"] < zero["loss"]
    pairs = [("cat", "cat"), ("cat", "dog")]
    theirs, config = in_torch(run / "merged", "roberta", pairs)
    assert config.problem_type == "regression" and theirs.shape == (2, 1)
    np.testing.assert_allclose(ours(run / "merged", "roberta", pairs), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "extra, words",
    [
        (["method=lora", "stream=true"], "only language models of text"),
        (["method=lora", "memory_budget=1GiB"], "are for language models"),
        (["method=lora", "lora.where=['classifier']"], "is trained whole anyway"),
        (
            ["method=emloc", "emulator.ratio=0.5", "emulator.where=['pooler','classifier']"],
            "selects the classification head alone",
        ),
        (
            ["method=emloc", "emulator.ratio=0.5", "correct.weighted=true", "lora.where=['.*']"]
            + ["lora.rank=2"],
            "pooler/kernel in the head are not calibrated",
        ),
        (["data.packing=true"], "data.packing"),
        (["data.chat=true"], "data.chat"),
        (["data.max_length=3"], "train.csv:10: the row has 4 tokens"),
        (["data.format=glue/rte"], "both given"),
        (["data.columns=null", "data.format=glue/snli"], "data.format=glue/snli does not exist"),
        (["data.columns=null"], "needs 'prompt' and 'completion'"),
        (["data.columns={text: text, label: kind}"], "'kind' cannot be filled"),
        (
            ["data.columns=null", "data.columns={prompt: text, completion: category}"],
            "data.columns={text: COLUMN",
        ),
        (["data.columns={prompt: text}"], "rows to classify need 'text' and 'label'"),
        (["eval.scores=[beauty]"], "'beauty'"),
        (["lsp.train={'layers/.*/kernel': subspace}"], "classifier/kernel, classifier/bias"),
        (["data.test=data.csv"], "data.csv"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, encoders, words_csv, capsys, extra, words):
    run = tmp_path / "run"
    arguments = options(encoders / "bert", words_csv, *LSP, *extra)
    assert main(["finetune", *arguments, f"output={run}"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


def test_rows_and_models_that_do_not_belong_together(
    tmp_path, encoders, model_folder, words_csv, capsys
):
    def refused(*arguments):
        assert main([*arguments, f"output={tmp_path}/out"]) == 2
        assert not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.split())

    labelled = options(model_folder, words_csv, "method=full")
    assert "qwen2 language model" in refused("finetune", *labelled)
    unseen = tmp_path / "test.csv"
    unseen.write_text("text,category\ncat,animal\nsaw,machine\n")
    arguments = options(encoders / "bert", words_csv, "method=full", f"data.test={unseen}")
    said = refused("finetune", *arguments)
    assert "test.csv:3: the label 'machine' is none of the 2" in said
    one = tmp_path / "one.csv"
    one.write_text("text,category\ncat,animal\ndog,animal\n")
    assert "nothing to tell apart" in refused(
        "finetune", *options(encoders / "bert", one, "method=full", test=False)
    )
    three = tmp_path / "three.csv"
    three.write_text("text,category\ncat,animal\nsaw,tool\nold,word\n")
    assert "has 2 outputs, the rows ask for 3" in refused(
        "finetune", *options(encoders / "roberta-labels", three, "method=full", test=False)
    )
    columns = "data.columns={text: text, label: category}"
    unnamed = [f"model.source={encoders}/roberta-labels", f"data.test={words_csv}", columns]
    assert "does not name its classes" in refused("eval", *unnamed)
    bert = [f"model.source={encoders}/bert", f"data.test={words_csv}", columns]
    assert "no classification head to evaluate" in refused("eval", *bert)
    assert main(["generate", bert[0], "prompt=[cat]"]) == 2
    assert "is a bert encoder" in " ".join(capsys.readouterr().err.split())
