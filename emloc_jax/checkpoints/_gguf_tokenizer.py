"""A tokenizer rebuilt from the metadata of a GGUF file: byte-level BPE, as GPT-2 introduced it."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from emloc_jax.errors import CheckpointError, UnsupportedArchitectureError

__all__ = ["tokenizer_from_gguf"]

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types for special and for added plain tokens

# How text is cut before the merges, by llama.cpp's name for it (`tokenizer.ggml.pre`).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of a GGUF file as a `transformers` fast tokenizer, chat template included.

    Args:
      metadata: the file's key-value pairs (`tokenizer.ggml.*`, `tokenizer.chat_template`).

    Returns:
      `transformers.PreTrainedTokenizerFast`.

    Raises:
      UnsupportedArchitectureError: another kind of tokenizer than the byte-level BPE of SmolLM,
        GPT-2, Llama 3 and Qwen 2.
      CheckpointError: tokens, merges or special tokens are missing or contradict one another.
    """
    kind, cut = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    cutters = _cutters()
    if kind != "gpt2" or cut not in cutters:
        raise UnsupportedArchitectureError(
            f"The GGUF file holds a tokenizer of kind {kind!r} with pre-tokenizer {cut!r}; only "
            f"kind 'gpt2' with {', '.join(cutters)} can be rebuilt. Load with tokenizer=False and "
            "take the tokenizer from the model's Hugging Face folder."
        )
    try:
        return _build(metadata, cut, cutters[cut])
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(
            f"The tokenizer in the GGUF file is damaged: {error!r}. Get the file again, or load "
            "with tokenizer=False."
        ) from error


def _build(metadata: Mapping[str, Any], cut: str, cutter: Any) -> Any:
    from transformers import PreTrainedTokenizerFast  # slow to import, so only where needed

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens = get("tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        fuse_unk=False,
        ignore_merges=cut == "llama-bpe",
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = cutter
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = get("token_type", [])
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, found in zip(tokens, kinds, strict=False)
            if found == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    roles = {
        f"{role}_token": tokens[get(f"{key}_token_id")]
        for role, key in names.items()
        if get(f"{key}_token_id") is not None
    }
    if get("add_bos_token", False):
        bos = roles["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, get("bos_token_id"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=_context(metadata),
        **roles,
    )


def _cutters() -> dict[str, Any]:
    def words(digits: str) -> Any:
        cut = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([cut, plain])

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single_digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "smollm": pre_tokenizers.Sequence([single_digits, byte_level]),
        "gpt-2": byte_level,
        "llama-bpe": words("{1,3}"),
        "qwen2": words(""),
    }


def _context(metadata: Mapping[str, Any]) -> int:
    return metadata.get(f"{metadata.get('general.architecture')}.context_length", 1 << 30)
