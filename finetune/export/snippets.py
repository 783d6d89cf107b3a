"""The code of an export's model card: what a reader runs, from an image and a question to the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.adapters.contract import section_of
from finetune.adapters.manifest import VqaContract
from finetune.example import text_of
from finetune.families.image_text_to_text import ImageTextToTextFamily

if TYPE_CHECKING:
    from finetune.export.target import Source
    from finetune.recipe import TaskSection

IMAGE_NAME = "image.jpg"
QUESTION = "What does the image show?"
LABELS = ("shirt", "hat")
_OPEN = 'image = ImageOps.exif_transpose(Image.open("{image}")).convert("RGB")'
# Pixels are made in float32: they are cast to what the weights are in, which may be half precision.
_ASK = """\
{open}
question = {question}
{prompt}
inputs = processor(images=[[image]], text=[text], {options}return_tensors="pt").to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False, num_beams=1)
answer = tokens[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True).strip())"""
_CLASSIFY = """\
{open}
labels = {labels}
texts = [{text} for label in labels]
inputs = processor(images=image, text=texts, padding=True, return_tensors="pt").to(model.device, model.dtype)
with torch.inference_mode():
    scores = model(**inputs).logits_per_image[0].softmax(dim=-1)
print(labels[scores.argmax()], dict(zip(labels, scores.tolist())))"""


def transformers_code(source: Source, loading: str) -> str:
    """Returns code for plain transformers that asks as the adapter was trained, and prints the answer.

    Args:
        source: what is exported.
        loading: imports and lines that leave ``model`` and ``processor``.
    """
    imports, _, lines = loading.partition("\n\n")
    return f"{_imports(source, imports)}\n\n{lines}\n\n{_body(source)}"


def messages_code(contract: VqaContract, *, image: str) -> str:
    """Returns the lines that leave ``messages``, as the adapter was trained on them.

    Args:
        contract: of the manifest; ``question`` holds the user's words.
        image: the code of the part that shows the image.
    """
    lines = ["messages = ["]
    if contract.system_prompt:
        lines.append(f'    {{"role": "system", "content": [{{"type": "text", "text": {contract.system_prompt!r}}}]}},')
    text = _filled(contract.question_template, "question")
    parts = [image, f'{{"type": "text", "text": {text}}}']
    content = ", ".join(parts if contract.image_position == "first" else parts[::-1])
    lines.append(f'    {{"role": "user", "content": [{content}]}},')
    return "\n".join([*lines, "]"])


def _imports(source: Source, loading: str) -> str:
    """Returns the imports of all lines, sorted as a reader would."""
    torch = [] if isinstance(source.manifest.prompt, VqaContract) else ["import torch"]
    return "\n".join([*torch, "from PIL import Image, ImageOps", loading])


def _body(source: Source) -> str:
    contract, show = source.manifest.prompt, _OPEN.format(image=IMAGE_NAME)
    if not isinstance(contract, VqaContract):
        return _CLASSIFY.format(open=show, labels=list(LABELS), text=_filled(contract.text_template, "label"))
    family: Any = source.base.family
    assert isinstance(family, ImageTextToTextFamily), "the contract was checked against the base"
    return _ASK.format(
        open=show,
        question=repr(QUESTION),
        prompt=_bare_prompt(source, contract) if family.processor_adds_marks else _prompt(source, contract),
        options="" if family.processor_adds_marks else "add_special_tokens=False, ",
        max_new_tokens=contract.generation.max_new_tokens,
    )


def _prompt(source: Source, contract: VqaContract) -> str:
    """Returns the lines that leave ``text``, by the processor's chat template."""
    processor: Any = source.base.processor
    messages = section_of(contract).ask(QUESTION)
    rendered = str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    collator: Any = source.base.collator
    whole: str = collator.render(messages, for_answer=True)
    first = repr(whole.removesuffix(rendered)) + " + " if whole != rendered else ""
    return (
        messages_code(contract, image='{"type": "image"}')
        + f"\ntext = {first}processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
    )


def _bare_prompt(source: Source, contract: VqaContract) -> str:
    """Returns the line that leaves ``text`` where the processor itself puts marks around it."""
    section: TaskSection = section_of(contract)
    before = "".join(f"{text_of(message)}\n" for message in section.ask("")[:-1])
    token: str = source.base.processor.image_token  # type: ignore[attr-defined]
    return f"text = {token + before!r} + {_filled(contract.question_template, 'question')}"


def _filled(template: str, name: str) -> str:
    """Returns the code of a template with the variable ``name`` in its place."""
    place = f"{{{name}}}"
    return name if template == place else f"{template!r}.replace({place!r}, {name})"
