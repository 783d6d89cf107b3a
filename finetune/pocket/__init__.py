"""The embedded default: a pocket vision-language model, the procedural world it was trained on, and two domains."""

from pathlib import Path

from finetune.errors import ModelError


def model_folder() -> Path:
    """Return the folder that holds the pocket model's weights, tokenizer and processor."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").exists():
        raise ModelError(
            f"the pocket model is missing from {folder}. Rebuild it with `python recipes/pretrain.py`, or "
            "install the package again."
        )
    return folder
