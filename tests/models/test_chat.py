"""Chat messages through a tokenizer's own template."""

import pytest
import tokenizers
import transformers

from emloc_jax.errors import DataError
from emloc_jax.models import encode_chat

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<s>", "<user>", "<assistant>", "hello", "?"]


@pytest.fixture
def tokenizer():
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE)


def test_the_template_writes_everything(tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    assert encode_chat(tokenizer, messages) == [1, 3, 2]  # no second <s> from the tokenizer
    assert encode_chat(tokenizer, messages, reply_next=False) == [1, 3]


def test_no_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_chat(tokenizer, [{"role": "user", "content": "hello"}])


def test_messages_that_the_template_refuses(tokenizer):
    with pytest.raises(DataError, match="no robots"):
        encode_chat(tokenizer, [{"role": "robot", "content": "hello"}])
