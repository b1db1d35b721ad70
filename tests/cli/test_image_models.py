"""Models of images on the command line: fine-tuned, evaluated, merged, judged by torch."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emloc_jax.checkpoints import load_pretrained
from emloc_jax.cli import main
from tests.models.torch_vision import INTERN, TEXT, VISION, torch_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}
WORDS = ["<pad>", "<eos>", "<img>", "</img>", "<IMG_CONTEXT>", "Which", "colour", "user", "bot"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def settings(kind, size):
    half = [0.5] * 3
    said = {"image_processor_type": kind, "size": {"height": size, "width": size}}
    return json.dumps(said | {"image_mean": half, "image_std": half, "max_patches": 3})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny ViT without a head, and a tiny InternVL with a tokenizer, as transformers saves."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VISION, initializer_range=0.2)
    transformers.ViTModel(config).save_pretrained(folder / "vit")
    (folder / "vit" / "preprocessor_config.json").write_text(settings("ViTImageProcessor", 12))

    torch_model("siglip-both").save_pretrained(folder / "siglip")
    text = settings("SiglipImageProcessor", 12)
    (folder / "siglip" / "preprocessor_config.json").write_text(text)

    words = [*WORDS, *COLOURS, "assistant"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": WORDS[2:5]})
    tokenizer.chat_template = TEMPLATE
    config = transformers.InternVLConfig(
        vision_config=INTERN | dict(initializer_range=0.3),
        text_config=TEXT | dict(model_type="qwen2", initializer_range=0.2),
        image_token_id=WORDS.index("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    transformers.InternVLForConditionalGeneration(config).save_pretrained(folder / "internvl")
    tokenizer.save_pretrained(folder / "internvl")
    text = settings("GotOcr2ImageProcessor", 16)
    (folder / "internvl" / "preprocessor_config.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of two colours in folders of their names, and rows that ask for the colour."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, rows = np.random.default_rng(0), []
    for name, colour in COLOURS.items():
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(4):
            noise = rng.integers(0, 60, (16, 16 if i % 2 else 32, 3))
            image = Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8))
            image.save(folder / "classes" / name / f"{i}.png")
            path = f"classes/{name}/{i}.png"
            rows.append({"image": path, "prompt": " Which colour", "completion": f" {name}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def stages(run):
    return json.loads((run / "report.json").read_text())["stages"]


def options(model, rows, run, *extra):
    return [
        f"model.source={model}", f"data.train={rows}", f"data.test={rows}", f"output={run}",
        "train.steps=12", "train.batch_size=4", "train.learning_rate=0.03", "train.warmup=1",
        "eval.batch_size=8", "lora.rank=4", "emulator.calibration_batch=4", *extra,
    ]  # fmt: skip


def test_an_image_classifier_from_a_folder_of_classes(tmp_path, folders, pictures):
    """A bare ViT gets a head; emulator, adapters on it and on the layers, correction, merge."""
    run, classes = tmp_path / "run", pictures / "classes"
    extra = ["method=emloc", "emulator.ratio=0.6", "correct.limit=1", "correct.weighted=true"]
    given = options(folders / "vit", classes, run, *extra)
    assert main(["finetune", *given]) == 0
    zero, *_, tuned = stages(run)
    assert tuned["loss"] < zero["loss"] and tuned["scores"]["accuracy"] == 1.0

    paths = sorted(classes.rglob("*.png"))
    processor = transformers.AutoImageProcessor.from_pretrained(run / "merged", backend="pil")
    pixels = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    kind = transformers.ViTForImageClassification
    merged, report = kind.from_pretrained(run / "merged", output_loading_info=True)
    assert not any(report.values()) and merged.config.id2label == {0: "blue", 1: "red"}
    base = load_pretrained(run / "merged")
    ours = jax.jit(base.model.apply)({"params": base.params}, np.moveaxis(pixels.numpy(), 1, -1))
    served = peft.PeftModel.from_pretrained(
        kind.from_pretrained(folders / "vit", num_labels=2), run / "adapter_corrected"
    )
    with torch.no_grad():
        for model in (merged, served):
            theirs = model.eval()(pixel_values=pixels).logits.numpy()
            np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert (theirs.argmax(-1) == np.repeat([0, 1], 4)).all()

    # The base without a head is evaluated with the adapter, and merged once more.
    adapter, out = f"adapter={run / 'adapter_corrected'}", tmp_path / "eval"
    given = [f"model.source={folders / 'vit'}", f"data.test={classes}", f"output={out}", adapter]
    assert main(["eval", *given]) == 0
    assert stages(out)[0]["loss"] == pytest.approx(tuned["loss"], rel=1e-4)
    again = [f"model.source={folders / 'vit'}", adapter, f"output={tmp_path / 'again'}"]
    assert main(["merge", *again]) == 0
    state = kind.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)


def test_lora_on_a_siglip_trains_its_new_head_whole(tmp_path, folders, pictures):
    """The adapter on the base without a head is the merged model, in torch."""
    run, classes = tmp_path / "run", pictures / "classes"
    given = options(folders / "siglip", classes, run, "method=lora", "train.steps=4")
    assert main(["finetune", *given]) == 0
    zero, tuned = stages(run)
    assert tuned["loss"] < zero["loss"]
    kind = transformers.SiglipForImageClassification
    merged = kind.from_pretrained(run / "merged")
    served = kind.from_pretrained(folders / "siglip", num_labels=2)
    served = peft.PeftModel.from_pretrained(served, run / "adapter")
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model.eval()(pixel_values=pixels).logits for model in (merged, served))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_internvl_learns_from_images_with_text(tmp_path, folders, pictures):
    run, rows = tmp_path / "run", pictures / "rows.jsonl"
    where = "['vision/layers/.*','projector/.*','layers/.*']"
    extra = ["method=emloc", "emulator.ratio=0.6", f"emulator.where={where}", f"lora.where={where}"]
    extra += ["eval.scores=[]", "correct.limit=1"]
    assert main(["finetune", *options(folders / "internvl", rows, run, *extra)]) == 0
    zero, trained, _, tuned = stages(run)
    assert tuned["loss"] < zero["loss"]

    out = tmp_path / "eval"
    given = [f"model.source={folders}/internvl", f"data.test={rows}", f"output={out}"]
    given += [f"emulator={run}/emulator", f"adapter={run}/adapter", "eval.max_new_tokens=3"]
    assert main(["eval", *given, "eval.batch_size=8"]) == 0
    (again,) = stages(out)
    assert again["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    # The rows are learnt on the emulator; that a random original keeps them is not claimed.
    assert again["scores"]["exact_match"] == 1.0
    image = pictures / "classes" / "red" / "0.png"
    given = [f"model.source={run}/merged", f"image=[{image}]", "prompt=['Which colour']"]
    assert main(["generate", *given, "chat=false", "sampling.max_new_tokens=2"]) == 0

    # In torch: the merged model, on a row whose wide image has two tiles and itself made small.
    kind = transformers.InternVLForConditionalGeneration
    merged, report = kind.from_pretrained(run / "merged", output_loading_info=True)
    assert not any(report.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    processor = transformers.AutoImageProcessor.from_pretrained(run / "merged", backend="pil")
    base = load_pretrained(run / "merged")
    for name in COLOURS:
        image = Image.open(pictures / "classes" / name / "0.png")
        found = processor(image, crop_to_patches=True, return_tensors="pt")
        tiles = int(found["num_patches"][0])
        assert tiles == 3
        text = f"<img>{'<IMG_CONTEXT>' * 4 * tiles}</img>\n Which colour"
        tokens = torch.asarray([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            given = dict(input_ids=tokens, pixel_values=found["pixel_values"])
            logits = merged.eval()(**given).logits[0, -1]
        pixels = np.moveaxis(found["pixel_values"].numpy(), 1, -1)[None]
        ours = base.model.apply({"params": base.params}, tokens.numpy(), pixels=pixels)
        np.testing.assert_allclose(ours[0, -1], logits.numpy(), atol=2e-4)


@pytest.mark.parametrize(
    "model, rows, extra, words",
    [
        ("vit", "rows.jsonl", ["method=lora"], "take it as a classifier"),
        ("internvl", "classes", ["method=lora"], "rows have labels"),
        ("internvl", "rows.jsonl", ["method=lsp"], "method=emloc or lora"),
        ("internvl", "rows.jsonl", ["method=lora", "stream=true"], "only language models of text"),
        ("vit", "classes", ["method=lora", "stream=true"], "only language models of text"),
        ("internvl", "rows.jsonl", ["method=lora", "data.packing=true"], "neither packed nor cut"),
        (
            "internvl",
            "rows.jsonl",
            ["method=lora", "memory_budget=4KiB", "eval.scores=[]", "train.chunk=32"],
            "and tiles=3, chunk=32, remat=block, stream=false needs",
        ),
        ("vit", "classes", ["method=lora", "memory_budget=1GiB"], "for language models, with"),
        ("internvl", "rows.jsonl", ["method=lora", "data.max_length=8"], "rows.jsonl:1: the"),
        ("vit", "broken", ["method=full"], "b/1.png cannot be read"),
        ("vit", "classes", ["method=full", "data.chat=true"], "data.chat"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path, folders, pictures, capsys, model, rows, extra, words
):
    if rows == "broken":
        for name in "ab":
            (tmp_path / "broken" / name).mkdir(parents=True)
            (tmp_path / "broken" / name / "1.png").write_text("no image")
        Image.new("RGB", (4, 4)).save(tmp_path / "broken" / "a" / "1.png")
        rows = tmp_path / "broken"
    else:
        rows = pictures / rows
    given = options(folders / model, rows, tmp_path / "run", *extra)
    assert main(["finetune", *given]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
