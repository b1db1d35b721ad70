"""A tiny checkpoint with a tokenizer, and rows to learn."""

import json

import pytest
import torch
import transformers

from tests.training.tokenizers_for_tests import byte_level


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random Qwen2 (it has biases) of two layers, as transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = byte_level()
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """JSONL rows: repeat the word."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = "hello three there plus one two what is".split()
    rows = [{"prompt": f"say {a} {b}:", "completion": f" {a} {b}"} for a in words for b in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def common(model_folder, rows_file):
    """Options that every finetuning test shares."""
    return [
        f"model.source={model_folder}",
        f"data.train={rows_file}",
        f"data.test={rows_file}",
        "data.max_length=48",
        "emulator.ratio=0.5",
        "emulator.calibration_rows=16",
        "lora.rank=2",
        "lora.alpha=6",
        "train.steps=6",
        "train.batch_size=4",
        "train.warmup=1",
        "train.save_every=2",
        "eval.rows=8",
        "eval.max_new_tokens=4",
        "eval.batch_size=4",
    ]
