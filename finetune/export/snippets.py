"""The code of an export's model card: it reads an image and a question, and prints the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.core.example import text_of
from finetune.families.image_text_to_text import ImageTextToTextFamily
from finetune.recipe import LabelSection, PromptSection

if TYPE_CHECKING:
    from finetune.export.target import Source

IMAGE_NAME = "image.jpg"
QUESTION = "What does the image show?"
LABELS = ("shirt", "hat")
_OPEN = 'image = ImageOps.exif_transpose(Image.open("{image}")).convert("RGB")'
# The processor makes pixels in float32; the code casts them to the dtype of the weights.
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
    """Return code for plain transformers that makes the prompt of the adapter's training, and prints the answer.

    Args:
        source: the adapter and base to export.
        loading: the imports and lines that define ``model`` and ``processor``.
    """
    imports, _, lines = loading.partition("\n\n")
    return f"{_imports(source, imports)}\n\n{lines}\n\n{_body(source)}"


def example_question(task: PromptSection) -> str:
    """Return the question of the code: the one that asks for a caption, if the adapter was trained on captions."""
    return task.caption_question or QUESTION


def messages_code(task: PromptSection, *, image: str) -> str:
    """Return the lines that define ``messages``, in the form of the adapter's training.

    Args:
        task: the task section of the manifest; in the code, ``question`` is the text of the user.
        image: the code of the part that shows the image.
    """
    lines = ["messages = ["]
    if task.system_prompt:
        lines.append(f'    {{"role": "system", "content": [{{"type": "text", "text": {task.system_prompt!r}}}]}},')
    text = _filled(task.question_template, "question")
    parts = [image, f'{{"type": "text", "text": {text}}}']
    content = ", ".join(parts if task.image_position == "first" else parts[::-1])
    lines.append(f'    {{"role": "user", "content": [{content}]}},')
    return "\n".join([*lines, "]"])


def _imports(source: Source, loading: str) -> str:
    """Return the imports of all lines, sorted as a reader would."""
    torch = ["import torch"] if isinstance(source.manifest.task, LabelSection) else []
    return "\n".join([*torch, "from PIL import Image, ImageOps", loading])


def _body(source: Source) -> str:
    task, show = source.manifest.task, _OPEN.format(image=IMAGE_NAME)
    if isinstance(task, LabelSection):
        return _CLASSIFY.format(open=show, labels=list(LABELS), text=_filled(task.text_template, "label"))
    if not isinstance(task, PromptSection):
        return f"# The adapter was trained for task {task.name}, whose package documents its calls."
    family: Any = source.base.family
    assert isinstance(family, ImageTextToTextFamily), "the task was checked against the base"
    return _ASK.format(
        open=show,
        question=repr(example_question(task)),
        prompt=_bare_prompt(source, task) if family.processor_adds_marks else _prompt(source, task),
        options="" if family.processor_adds_marks else "add_special_tokens=False, ",
        max_new_tokens=task.longest_answer,
    )


def _prompt(source: Source, task: PromptSection) -> str:
    """Return the lines that define ``text``, by the processor's chat template."""
    processor: Any = source.base.processor
    messages = task.ask(QUESTION)
    rendered = str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    collator: Any = source.base.collator_of(task)
    whole: str = collator.render(messages, for_answer=True)
    first = repr(whole.removesuffix(rendered)) + " + " if whole != rendered else ""
    return (
        messages_code(task, image='{"type": "image"}')
        + f"\ntext = {first}processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
    )


def _bare_prompt(source: Source, task: PromptSection) -> str:
    """Return the line that defines ``text`` for a processor that adds its own special tokens."""
    before = "".join(f"{text_of(message)}\n" for message in task.ask("")[:-1])
    token: str = source.base.processor.image_token  # type: ignore[attr-defined]
    return f"text = {token + before!r} + {_filled(task.question_template, 'question')}"


def _filled(template: str, name: str) -> str:
    """Return the code of a template with the variable ``name`` in its place."""
    place = f"{{{name}}}"
    return name if template == place else f"{template!r}.replace({place!r}, {name})"
