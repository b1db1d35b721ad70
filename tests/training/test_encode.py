"""Tokenised rows: exactly the completions are learnt, and prompts are those of generation."""

import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training import Row, encode_rows, prompt_text, prompt_tokens
from tests.training.tokenizers_for_tests import REWRITING, byte_level, prefix_space

PAIR = Row("row 1", prompt="what is one plus two?", completion=" three.")
TURNS = Row(
    "row 2",
    messages=(
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "what is one"},
        {"role": "user", "content": "plus"},
        {"role": "assistant", "content": '{"a": 1}'},
    ),
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def encode(row, tokenizer, **options):
    (example,) = encode_rows([row], tokenizer, **({"max_length": 99} | options))
    assert example.tokens.dtype == example.targets.dtype == np.int32
    assert example.weights.dtype == np.float32
    assert (example.tokens[1:] == example.targets[:-1]).all()
    return example


def learnt(example, tokenizer):
    """Texts of the runs of learnt targets."""
    edges = np.flatnonzero(np.diff(np.r_[0, example.weights, 0]))
    runs = edges.reshape(-1, 2)
    return [tokenizer.decode(example.targets[a:b]) for a, b in runs]


def test_plain_row_learns_completion_and_end(tokenizer):
    example = encode(PAIR, tokenizer)
    assert learnt(example, tokenizer) == [" three.<|im_end|>"]
    whole = np.r_[example.tokens, example.targets[-1]]
    assert tokenizer.decode(whole) == "what is one plus two? three.<|im_end|>"
    prompt = prompt_tokens(PAIR, tokenizer)
    assert whole[: len(prompt)].tolist() == prompt


def test_chat_learns_assistant_turns_only(tokenizer):
    example = encode(TURNS, tokenizer)
    assert learnt(example, tokenizer) == ["what is one<|im_end|>", '{"a": 1}<|im_end|>']
    # Nothing after the last answer is kept, for it teaches nothing.
    assert example.weights[-1] == 1
    text = tokenizer.apply_chat_template(list(TURNS.messages), tokenize=False)
    assert tokenizer.decode(np.r_[example.tokens, example.targets[-1]]) == text.rstrip("\n")
    prompt = prompt_tokens(TURNS, tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(prompt).endswith("plus<|im_end|>\n<|im_start|>assistant\n")


def test_pair_wrapped_as_chat_with_system(tokenizer):
    example = encode(PAIR, tokenizer, chat=True, system="Answer in JSON")
    assert learnt(example, tokenizer) == [" three.<|im_end|>"]
    text = prompt_text(PAIR, tokenizer, chat=True, system="Answer in JSON")
    assert text.startswith("<|im_start|>system\nAnswer in JSON<|im_end|>\n<|im_start|>user\nwhat")
    assert tokenizer.decode(example.tokens).startswith(text)


def test_special_text_inside_a_plain_completion_is_learnt_too(tokenizer):
    row = Row("row 1", prompt="hello", completion="a<|im_start|>b")
    assert learnt(encode(row, tokenizer), tokenizer) == ["a<|im_start|>b<|im_end|>"]


def test_template_that_does_not_close_turns_gets_an_end():
    tokenizer = byte_level("{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
                           "{% if add_generation_prompt %}[{% endif %}")  # fmt: skip
    row = Row("row 1", prompt="hello", completion="three")
    assert learnt(encode(row, tokenizer, chat=True), tokenizer) == ["three]<|im_end|>"]


def test_begin_token_comes_once():
    tokenizer = byte_level(begin=True)
    example = encode(PAIR, tokenizer)
    begin = tokenizer.bos_token_id
    assert (example.tokens == begin).sum() == 1 and example.tokens[0] == begin
    assert prompt_tokens(PAIR, tokenizer)[0] == begin
    assert learnt(example, tokenizer) == [" three.<|im_end|>"]


def test_completion_is_tokenised_behind_its_prompt():
    tokenizer = prefix_space()
    row = Row("row 1", prompt="hello{", completion="three")
    example = encode(row, tokenizer)
    whole = np.r_[example.tokens, example.targets[-1]].tolist()
    plain, alone = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("hello{three", "three")
    )
    assert whole == [*plain, tokenizer.eos_token_id]
    assert plain[-len(alone) :] != alone  # which would mark a beginning a second time


def test_tokens_never_merge_across_the_prompt(tokenizer):
    row = Row("row 1", prompt="hel", completion="lo there")
    prompt = tokenizer("hel", add_special_tokens=False)["input_ids"]
    assert tokenizer("hello", add_special_tokens=False)["input_ids"][: len(prompt)] != prompt
    example = encode(row, tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert learnt(example, tokenizer) == ["lo there<|im_end|>"]


def test_too_long_rows_are_refused_by_name(tokenizer):
    size = len(encode(PAIR, tokenizer).tokens)
    assert len(encode(PAIR, tokenizer, max_length=size).tokens) == size
    with pytest.raises(DataError, match=rf"row 1: the row has {size} tokens, .* {size - 1};"):
        encode(PAIR, tokenizer, max_length=size - 1)
    prompt = len(prompt_tokens(PAIR, tokenizer))
    with pytest.raises(DataError, match=rf"row 1: the prompt has {prompt} tokens.*{prompt - 1}"):
        encode(PAIR, tokenizer, max_length=prompt - 1)
    with pytest.raises(DataError, match="row 1: the prompt has"):
        prompt_tokens(PAIR, tokenizer, max_length=prompt - 1)


def test_truncation_when_asked(tokenizer):
    whole = encode(PAIR, tokenizer)
    size = len(whole.tokens)
    left = encode(PAIR, tokenizer, max_length=size - 2, truncate="left")
    assert (left.tokens == whole.tokens[2:]).all() and left.weights.sum() == whole.weights.sum()
    right = encode(PAIR, tokenizer, max_length=size - 1, truncate="right")
    assert (right.targets == whole.targets[:-1]).all()
    assert right.weights.sum() == whole.weights.sum() - 1
    shortest = int(whole.weights.sum())
    assert encode(PAIR, tokenizer, max_length=shortest, truncate="left").weights.all()
    for side, length in (("left", shortest - 1), ("right", size - shortest)):
        with pytest.raises(DataError, match=f"row 1: truncating the row \\({side}\\)"):
            encode(PAIR, tokenizer, max_length=length, truncate=side)
    with pytest.raises(ConfigError, match="truncate"):
        encode(PAIR, tokenizer, truncate="middle")


def test_chat_refusals(tokenizer):
    with pytest.raises(DataError, match="row 2: the chat template renders turn 4"):
        encode(TURNS, byte_level(REWRITING))
    last = Row("row 3", messages=TURNS.messages[2:])
    assert learnt(encode(last, byte_level(REWRITING)), tokenizer)[-1].startswith("(thought)")
    with pytest.raises(DataError, match="row 2: a chat needs a tokenizer with a chat template"):
        encode(TURNS, byte_level(None))
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 2: .*refuses the turns.*alternate"):
        encode(TURNS, byte_level(strict))


def test_a_row_without_anything_to_predict_from(tokenizer):
    one = Row("row 9", prompt="", completion="<|im_end|>")
    with pytest.raises(DataError, match="row 9: nothing precedes"):
        encode(one, tokenizer)
