"""Rows with images: read, placed in the text, expanded as transformers does, made into batches."""

import functools
import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import InternVLProcessor, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training import (
    ImageProcessor,
    ImageTokens,
    Row,
    encode_image_rows,
    encode_rows,
    image_examples,
    pad_image_examples,
    pad_labelled_images,
    padded_batches,
    prompt_tokens,
    read_image_folder,
    read_image_rows,
    read_rows,
)

IMAGES = dict(
    start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
    video_token="<video>",
)  # fmt: skip
WORDS = ["<pad>", "<eos>", *IMAGES.values(), "which", "animal", "cat", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<eos>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WIDE, SQUARE = (64, 16), (16, 16)  # of four tiles and itself made small, and of one


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE,
        extra_special_tokens=IMAGES,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("wide.png", WIDE), ("square.png", SQUARE)):
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def words(tokenizer):
    processor = ImageProcessor(size=(16, 16), resample=3, most=6)
    return ImageTokens.of(tokenizer, WORDS.index("<IMG_CONTEXT>"), 4, processor)


class WithoutVideos(InternVLProcessor):
    """Videos need a package of their own, and are none of ours."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def write(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_rows_are_written_in_many_ways(folder, words):
    """One image by its own key, in a list, by a column of another name, in parts of a turn."""
    pair = {"prompt": "<image>\nwhich animal", "completion": " cat"}
    parts = [{"type": "image", "path": "wide.png"}, {"type": "text", "text": "which animal"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "cat"}]
    wide = str(folder / "wide.png")
    file = write(folder, [pair | {"image": "wide.png"}, pair | {"images": ["wide.png"]}])
    for row in read_rows(file):
        assert row.images == (wide,) and row.prompt == pair["prompt"]
    columns = {"prompt": "prompt", "completion": "completion", "images": "file"}
    (row,) = read_rows(write(folder, [pair | {"file": "wide.png"}]), columns=columns)
    assert row.images == (wide,)
    (row,) = read_rows(write(folder, [{"messages": chat}]))
    assert row.images == (wide,) and row.messages[0]["content"] == "<image>\nwhich animal"
    (row,) = read_rows(write(folder, [pair | {"image": None}]))
    assert row.images == ()
    # Without a place an image comes first, in a chat before the first words of the user.
    (row,) = read_rows(write(folder, [pair | {"prompt": "which", "images": ["wide.png"] * 2}]))
    assert words.place(row).prompt == "<IMG_CONTEXT>\n<IMG_CONTEXT>\nwhich"


@pytest.mark.parametrize("names", [["wide.png"], ["square.png"], ["square.png", "wide.png"]])
def test_tokens_and_tiles_are_those_of_transformers(folder, tokenizer, words, names):
    """The whole way through transformers' processor, from a chat to ids and pixels."""
    theirs = WithoutVideos(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": 16, "width": 16}, max_patches=6, image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer, video_processor=None, image_seq_length=4, chat_template=TEMPLATE,
    )  # fmt: skip
    parts = [{"type": "image", "path": name} for name in names]
    parts.append({"type": "text", "text": "which animal"})
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "cat"}]
    text = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    expected = theirs(
        text=[text], images=[Image.open(folder / name) for name in names], return_tensors="np"
    )
    (row,) = [words.place(row) for row in read_rows(write(folder, [{"messages": turns}]))]
    prompt = prompt_tokens(row, tokenizer, expand=words.expand)
    assert prompt == expected["input_ids"][0].tolist()

    plain = encode_rows([row], tokenizer, max_length=99, expand=words.expand)
    (example,) = image_examples([row], plain, words)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.targets[example.weights > 0].tolist() == [WORDS.index("cat"), 1]
    pixels = np.moveaxis(expected["pixel_values"], 1, -1)
    assert example.tiles == len(pixels)
    batch = pad_image_examples(
        [example], batch_size=2, length=64, tiles=8, processor=words.processor
    )
    np.testing.assert_allclose(batch["pixels"][0, : len(pixels)], pixels, atol=1e-5)
    assert batch["tiles"].sum(1).tolist() == [len(pixels), 0] and not batch["pixels"][1].any()


def test_what_does_not_fit_is_refused(folder, tokenizer, words):
    def refused(row, match, error=DataError):
        with pytest.raises(error, match=match):
            words.expand(words.place(row), [words.place(row).prompt])

    row = Row("b.jsonl:2", "<image> <image>", " cat", images=("a.png",))
    refused(row, "b.jsonl:2: the text has 2 places for images .* has 1 images")
    refused(Row("b.jsonl:2", "which", " cat", images=("a.png",)), "b.jsonl:2: the image a.png")
    with pytest.raises(DataError, match="rows.jsonl:1: an image must be the path of a file"):
        read_rows(write(folder, [{"prompt": "a", "completion": "b", "image": "http://a/b.png"}]))
    with pytest.raises(ConfigError, match="one token each"):
        ImageTokens.of(tokenizer, WORDS.index("<IMG_CONTEXT>"), 4, words.processor).of(
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<eos>"),
            0,
            4,
            words.processor,
        )
    example = image_examples(
        [Row("b.jsonl:2", images=(str(folder / "wide.png"),))],
        encode_rows([Row("b.jsonl:2", "which", " cat")], tokenizer, max_length=9),
        words,
    )
    with pytest.raises(DataError, match="b.jsonl:2: the row has 5 tiles, a batch holds 1"):
        pad_image_examples(example, batch_size=1, length=8, tiles=1, processor=words.processor)


def test_folders_of_classes_and_rows_with_labels(tmp_path):
    for name in ("cat/1.png", "cat/old/2.jpg", "dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 5)).save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    rows = read_image_folder(tmp_path)
    assert [(r.origin, r.label) for r in rows] == [
        ("cat/1.png", "cat"), ("cat/old/2.jpg", "cat"), ("dog/1.png", "dog"),
    ]  # fmt: skip
    file = tmp_path / "rows.csv"
    file.write_text("file,kind\ncat/1.png,cat\ndog/1.png,7\n")
    (one, two) = read_image_rows(file, columns={"image": "file", "label": "kind"})
    assert one.image == str(tmp_path / "cat/1.png") and two.label == "7"

    examples = encode_image_rows(rows, names=("dog", "cat"))
    processor = ImageProcessor(size=(4, 4))
    pad = functools.partial(pad_labelled_images, processor=processor)
    batches = list(padded_batches(examples, batch_size=2, shuffle=False, epochs=1, pad=pad))
    assert [b["labels"].tolist() for b in batches] == [[1, 1], [0, 0]]
    assert [b["weights"].tolist() for b in batches] == [[1, 1], [1, 0]]
    np.testing.assert_array_equal(batches[0]["pixels"], -np.ones((2, 4, 4, 3), np.float32))

    with pytest.raises(DataError, match="none of the 1 that are learnt"):
        encode_image_rows(rows, names=("dog",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the class has no image"):
        read_image_folder(tmp_path)
    for where, words in (("dog", "no subfolders"), ("nowhere", "no such folder")):
        with pytest.raises(DataError, match=words):
            read_image_folder(tmp_path / where)
