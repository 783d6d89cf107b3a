"""The embedded default: a pocket vision-language model, the procedural world it was trained on, and two domains."""

from pathlib import Path

from finetune.errors import ModelError


def model_folder() -> Path:
    """Return the folder that holds the pocket model's weights, tokenizer and processor.

    Raises:
        ModelError: the installed package lacks the weights.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").exists():
        raise ModelError(
            f"{folder} must hold the pocket model, and does not. Install the package again, or rebuild the model with "
            "`python recipes/pretrain.py`."
        )
    return folder
