"""Both towers of a dual encoder for onnxruntime, and the script beside them, which needs no torch."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from finetune.core import extras
from finetune.errors import ExportError, MissingExtraError
from finetune.export import onnx as target
from finetune.export.exporting import export_adapter
from finetune.serving.loading import load

LABELS = ["a red square", "two BLUE circles", "é"]


def image(seed, size=(40, 56)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """The folder of an export, and the adapter for text tower and projections that it is of, loaded on its base."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:  # this is made before a test has its own places
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        base, adapter = saved("clip", "patterns")
        done = export_adapter(adapter, to="onnx", output=folder / "out", base=base)
        assert done.verdict == "passed" and len(done.record["comparisons"]) == 4
        return folder / "out", load(adapter, base=base, device="cpu")


@pytest.fixture
def folder(made):
    return made[0]


@pytest.fixture
def vlm(made):
    return made[1]


ROUNDING = 1e-5  # of embeddings of length 1: two libraries, and batches of other sizes


def run(folder, name, **inputs):
    session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    return session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_images_in_any_number(folder, vlm, count):
    images = [image(seed) for seed in range(count)]
    got = run(folder, "image.onnx", **vlm.processor.image_processor(images, return_tensors="pt"))
    wanted = torch.stack([vlm.embed(p) for p in images]).numpy()
    with vlm.using(None):
        plain = torch.stack([vlm.embed(p) for p in images]).numpy()
    assert got.shape == (count, 32) and np.abs(got - wanted).max() < ROUNDING < 1e-2 < np.abs(plain - wanted).max()


@pytest.mark.parametrize("texts", [["x"], [*LABELS, "hat"], ["", "a" * 60]], ids=["one", "four", "none and longest"])
def test_texts_in_any_number_and_length(folder, vlm, texts):
    encoded = vlm.processor.tokenizer(texts, padding=True, return_tensors="pt")
    got = run(folder, "text.onnx", input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
    wanted = torch.stack([vlm.embed_text(text) for text in texts]).numpy()
    with vlm.using(None):
        plain = torch.stack([vlm.embed_text(text) for text in texts]).numpy()
    assert np.abs(got - wanted).max() < ROUNDING < 1e-2 < np.abs(plain - wanted).max()


def test_what_lies_in_the_folder(folder, vlm):
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "classify.json", "classify.py", "export.json", "image.onnx", "processor_config.json", "text.onnx",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    settings = json.loads((folder / "classify.json").read_text())
    assert settings == {
        "text_template": "{label}",
        "logit_scale": pytest.approx(vlm.model.logit_scale.exp().item()),
        "max_tokens": 64,
        "pad_token_id": vlm.processor.tokenizer.pad_token_id,
    }
    for name, inputs in (("image", ["pixel_values"]), ("text", ["input_ids", "attention_mask"])):
        model = onnx.load(folder / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [i.name for i in model.graph.input] == inputs and model.graph.output[0].name == f"{name}_embeds"
        assert {i.type.tensor_type.shape.dim[0].dim_param for i in model.graph.input} == {"batch"}


def test_no_file_holds_the_path_where_it_was_made(folder, vlm):
    for path in folder.iterdir():
        data = path.read_bytes()
        for place in (Path(vlm.base.path).parent, Path(target.__file__).parent, Path(torch.__file__).parent):
            assert str(place).encode() not in data, f"{path.name} holds {place}"


def without_torch(folder, code, *arguments):
    """Run code in the folder, in a process that cannot import torch, transformers or this package."""
    barred = "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'transformers', 'finetune')))\n"
    command = [sys.executable, "-W", "error", "-c", barred + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cards_code_runs_without_torch_and_answers_as_the_adapter_does(folder, vlm, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    shown = image(3)
    shown.save(tmp_path / "image.png")
    block = block.replace('"image.jpg"', repr(str(tmp_path / "image.png"))).replace('["shirt", "hat"]', repr(LABELS))
    output = without_torch(folder, f"{block}\nimport json; print(json.dumps(vector.tolist()))")
    probabilities, vector = output.strip().splitlines()
    probabilities = ast.literal_eval(probabilities)
    assert max(probabilities, key=probabilities.get) == vlm.classify(shown, LABELS)
    np.testing.assert_allclose(json.loads(vector), vlm.embed(shown).numpy(), atol=2e-3)  # pixels are rounded otherwise
    cosines = torch.stack([vlm.embed_text(label) for label in LABELS]) @ vlm.embed(shown)
    wanted = (vlm.model.logit_scale.exp() * cosines).softmax(0)
    np.testing.assert_allclose(list(probabilities.values()), wanted.detach().numpy(), atol=2e-2)


def test_the_script_runs_by_itself(folder, vlm, tmp_path):
    image(5).save(tmp_path / "p.png")
    arguments = ["classify.py", str(tmp_path / "p.png"), *LABELS]
    run_script = f"import runpy; sys.argv = {arguments!r}; runpy.run_path('classify.py', run_name='__main__')"
    rows = [line.split("  ", 1) for line in without_torch(folder, run_script).splitlines()]
    assert [label for _, label in rows] == LABELS
    assert max(rows)[1] == vlm.classify(image(5), LABELS)


def test_images_as_the_app_sees_them(folder, vlm, tmp_path):
    """Turned by EXIF, with transparency, grey, in 16 bit: as `vlm.embed` reads the same file."""
    from finetune.export.onnx_example import Classifier

    classifier = Classifier(folder)
    turned = image(1).getexif()
    turned[274] = 6
    image(1).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    clear = image(2).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    image(3).convert("L").save(tmp_path / "grey.png")
    deep = np.asarray(image(4).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name in ("turned.jpg", "clear.png", "grey.png", "deep.png"):
        got = classifier.embed_images([tmp_path / name])[0]
        np.testing.assert_allclose(got, vlm.embed(tmp_path / name).numpy(), atol=5e-3)
    with pytest.raises(ValueError, match="a text may have at most 64 tokens, got 67"):
        classifier.embed_texts(["a" * 65])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_what_writes_text_is_refused_before_the_base_is_loaded(saved, tmp_path, family):
    _, adapter = saved(family)
    with pytest.raises(
        ExportError, match=rf"must be dual_encoder, got generative \({family}\). Export it with --to merged"
    ):
        export_adapter(adapter, to="onnx", output=tmp_path / "out", base="/nowhere")
    assert not list(tmp_path.glob("*out*"))


def test_without_the_packages_the_error_names_the_extra(saved, tmp_path, monkeypatch):
    _, adapter = saved("clip", "patterns")
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MissingExtraError, match=r"needs onnxscript, .* pip install 'finetune-vlm\[onnx\]'"):
        export_adapter(adapter, to="onnx", output=tmp_path / "out", base="/nowhere")


@pytest.fixture
def without_export(monkeypatch, folder):
    """Have the target take the towers that are there already: what is compared is tried, not torch's exporter."""

    def write_towers(to: Path, model, row):
        for name in ("image.onnx", "text.onnx"):
            (to / name).write_bytes((folder / name).read_bytes())

    monkeypatch.setattr(target, "write_towers", write_towers)


@pytest.mark.usefixtures("without_export")
def test_towers_of_another_adapter_are_found(saved, tmp_path):
    base, adapter = saved("clip", "lora")
    with pytest.raises(
        ExportError, match="no files were kept. failed: onnxruntime with the adapter on its base, one row"
    ):
        export_adapter(adapter, to="onnx", output=tmp_path / "out", base=base)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.usefixtures("without_export")
@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (
            "pixels",
            lambda self, image: np.zeros((3, 32, 32), np.float32),
            "failed: classify.py's pixels with the pro",
        ),
        (
            "tokens",
            lambda self, texts: (np.zeros((4, 9), np.int64),) * 2,
            "failed: classify.py's tokens with the token",
        ),
    ],
    ids=["pixels", "tokens"],
)
def test_a_script_that_puts_things_otherwise_is_found(saved, tmp_path, monkeypatch, name, broken, message):
    from finetune.export.onnx_example import Classifier

    base, adapter = saved("clip", "patterns")
    monkeypatch.setattr(Classifier, name, broken)
    with pytest.raises(ExportError, match=message):
        export_adapter(adapter, to="onnx", output=tmp_path / "out", base=base)
