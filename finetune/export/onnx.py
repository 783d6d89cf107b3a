"""The target ``onnx``: both towers of a dual encoder, the adapter merged, for onnxruntime."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.functional import normalize, pad

from finetune.adapters.card import CARD_NAME, Card, model_card
from finetune.adapters.probe import probe_conversation
from finetune.core.extras import require_extra
from finetune.data.lengths import max_positions
from finetune.errors import ExportError
from finetune.export.output import require_space
from finetune.export.parity import compare, compare_tensors
from finetune.export.target import Comparison
from finetune.methods.adapter import merge
from finetune.model_types import architecture_of
from finetune.recipe import LabelSection

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from finetune.adapters.manifest import AdapterManifest
    from finetune.export.onnx_example import Classifier
    from finetune.export.target import Source

EXAMPLE_NAME = "classify.py"
_EXAMPLE = Path(__file__).with_name("onnx_example.py")
_LEVELS = 3  # of 256: the tolerance between pillow and torchvision when they shrink an image
_LOADING = """\
from classify import Classifier  # classify.py, of this folder

classifier = Classifier(".")
print(classifier.classify("image.jpg", ["shirt", "hat"]))
vector = classifier.embed_images(["image.jpg"])[0]  # of length 1, for search"""


@dataclass(frozen=True, kw_only=True)
class Onnx:
    """A target that writes ``image.onnx`` and ``text.onnx``, which give embeddings of length 1 for any batch size."""

    def refuse(self, manifest: AdapterManifest) -> None:
        """Check that ONNX can hold the adapter, and that its packages are installed.

        Raises:
            ExportError: the base is not a dual encoder, or the task does not choose among labels.
            MissingExtraError: a package is not installed.
        """
        model_type = manifest.base.model_type
        if (architecture := architecture_of(model_type)) != "dual_encoder":
            raise ExportError(
                f"{manifest.full_name} cannot be written as ONNX: the architecture of its base must be dual_encoder, "
                f"got {architecture or 'an unknown one'} ({model_type}). Export it with --to merged."
            )
        if not isinstance(manifest.task, LabelSection):
            raise ExportError(
                f"--to onnx needs a task that chooses among labels, got task {manifest.task.name} "
                f"({manifest.full_name}). Use --to peft."
            )
        require_extra("onnx", what="--to onnx")

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Write both towers and the files that prepare images and texts, and compare onnxruntime's outputs."""
        merge(source.updates)
        model: Any = source.base.model
        model.to("cpu")
        require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()))
        rows = {name: row.to("cpu", model.dtype).inputs for name, row in source.rows.items()}
        write_towers(folder, model, rows["probe"])
        source.base.processor.save_pretrained(folder)
        task = cast("LabelSection", source.manifest.task)
        settings = {
            "text_template": task.text_template,
            "logit_scale": model.logit_scale.exp().item(),
            "max_tokens": max_positions(model),
            "pad_token_id": source.base.processor.tokenizer.pad_token_id,
        }
        from finetune.export.onnx_example import SETTINGS_NAME, Classifier

        (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(_EXAMPLE, folder / EXAMPLE_NAME)
        (folder / CARD_NAME).write_text(model_card(source.manifest, _card(source)), encoding="utf-8")
        return compare_with_onnxruntime(source, Classifier(folder), rows, settings["pad_token_id"])


class _ImageTower(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return normalize(self.model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)


class _TextTower(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return normalize(out.pooler_output, dim=-1)


def write_towers(folder: Path, model: Any, row: Mapping[str, Tensor]) -> None:
    """Write ``image.onnx`` and ``text.onnx``.

    Args:
        folder: the folder to write into.
        model: a dual encoder on the CPU.
        row: inputs of one image and text; the files take any number of either, and texts of any length.
    """
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=max_positions(model))
    towers: dict[str, tuple[torch.nn.Module, dict[str, dict[int, Any]]]] = {
        "image": (_ImageTower(model), {"pixel_values": {0: batch}}),
        "text": (_TextTower(model), {name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")}),
    }
    for name, (tower, shapes) in towers.items():
        # Two of each, because the exporter treats a size of 1 as constant.
        example = tuple(row[key].repeat(2, *[1] * (row[key].ndim - 1)) for key in shapes)
        with torch.no_grad(), warnings.catch_warnings():
            # Both inputs of the text tower have the same axes, and torch uses the names of the first.
            warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
            program = torch.onnx.export(
                tower.eval(),
                example,
                input_names=list(shapes),
                output_names=[f"{name}_embeds"],
                dynamic_shapes=shapes,
                verbose=False,
            )
        assert program is not None
        _forget_sources(program.model)
        program.save(folder / f"{name}.onnx")  # weights over 2 GB go into a separate file


def _forget_sources(model: Any) -> None:
    """Remove the source lines and local paths of the traced code, which the exporter stores beside nodes and values."""
    for graph in (model.graph, *model.functions.values()):
        values = [value for node in graph.all_nodes() for value in (node, *node.outputs)]
        for place in (graph, *graph.inputs, *values):
            place.metadata_props.clear()
    for place in (model, *model.graph.initializers.values()):
        place.metadata_props.clear()


def compare_with_onnxruntime(
    source: Source, classifier: Classifier, rows: Mapping[str, Mapping[str, Tensor]], pad_token_id: int
) -> list[Comparison]:
    """Compare the outputs of onnxruntime and the inputs of the example script with those of the adapter.

    Args:
        source: the adapter and base that were exported.
        classifier: the classifier of the example script, with the files loaded.
        rows: name -> the processor's inputs of one image and text.
        pad_token_id: the token id that pads shorter texts.
    """
    singly = {name: _embed(classifier, row)[0] for name, row in rows.items()}
    longest = max(row["input_ids"].shape[1] for row in rows.values())
    filled = {"input_ids": pad_token_id, "attention_mask": 0}
    batch = {
        key: torch.cat([
            pad(row[key], (0, longest - row[key].shape[1]), value=filled[key]) if key in filled else row[key]
            for row in rows.values()
        ])
        for key in ("pixel_values", *filled)
    }  # fmt: skip
    jointly = dict(zip(rows, _embed(classifier, batch), strict=True))
    what = "onnxruntime with the adapter on its base"
    return [
        compare(f"{what}, one row at a time", singly, wanted=source.adapted, plain=source.plain),
        compare(f"{what}, {len(rows)} rows at once", jointly, wanted=source.adapted, plain=source.plain),
        *_compare_inputs(source, classifier),
    ]


def _embed(classifier: Classifier, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings [B, 2, D] of images and texts."""
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    (images,) = classifier.image.run(None, {"pixel_values": arrays["pixel_values"]})
    (texts,) = classifier.text.run(None, {name: arrays[name] for name in ("input_ids", "attention_mask")})
    return torch.from_numpy(np.stack([images, texts], axis=1))


def _compare_inputs(source: Source, classifier: Classifier) -> list[Comparison]:
    """Compare the example's inputs for images and texts, made without torch, with those of the processor."""
    processor: Any = source.base.processor
    _, image = probe_conversation(source.manifest.probe.seed)
    images = [image, image.crop((0, 0, 150, 96)), image.crop((0, 0, 96, 150))]
    wanted = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    off = max(
        (torch.from_numpy(classifier.pixels(p)) - w).abs().max().item() for p, w in zip(images, wanted, strict=True)
    )
    texts = ["a photo of a cat", "Two RED shirts, 3 hats.", "é", ""]
    encoded = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids = [torch.from_numpy(array) for array in classifier.tokens(texts)]
    tolerance = _LEVELS / 255 / min(getattr(processor.image_processor, "image_std", None) or [1.0])
    return [
        Comparison(
            what=f"{EXAMPLE_NAME}'s pixels with the processor's, which shrinks images by another library",
            verdict="passed" if off <= tolerance else "failed",
            largest_difference=off,
            tolerance=tolerance,
        ),
        compare_tensors(
            f"{EXAMPLE_NAME}'s tokens with the tokenizer's",
            zip(ids, (encoded["input_ids"], encoded["attention_mask"]), strict=True),
        ),
    ]


def _card(source: Source) -> Card:
    return Card(
        version=source.version,
        digest=source.adapter.digest,
        relation="finetune",
        library_name="onnx",
        loading=_LOADING,
        checks=(
            f"`{EXAMPLE_NAME}` needs numpy, onnxruntime, pillow and tokenizers, and runs by itself too: `python "
            f"{EXAMPLE_NAME} image.jpg shirt hat`. `image.onnx` takes `pixel_values` [images, 3, H, W] and "
            "`text.onnx` `input_ids` and `attention_mask` [texts, tokens]; both give embeddings of length 1. "
            "`classify.json` holds the words around a label and what cosines are multiplied by. `export.json` lists "
            "what was compared before the folder was declared good, and with which versions."
        ),
    )
