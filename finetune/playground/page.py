"""The page itself: its layout, and the functions that its buttons call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from finetune.core.outside_text import html_text
from finetune.playground.markup import nothing_yet
from finetune.playground.style import ANNOUNCE_ANSWERS, SHOW_ANSWERS

if TYPE_CHECKING:
    from finetune.playground.examples import ExampleImage
    from finetune.playground.playground import Playground

AT_FIRST = 2  # adapters that are chosen at the start
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of every event
_WAITING = 32  # questions that may wait for their turn


def build_page(p: Playground) -> gr.Blocks:
    """Return the page; it loads nothing from other hosts, and sends no reports."""
    with gr.Blocks(title="finetune: base and adapters", fill_width=True, analytics_enabled=False) as page:
        gr.HTML(_head(p))
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                image = _image()
                strip = gr.Column(elem_id="examples") if p.examples else None
                words = _words(p)
                if strip is not None:
                    with strip:
                        _examples(p, image, words)
                chosen = gr.CheckboxGroup(
                    p.choices,
                    value=p.choices[:AT_FIRST],
                    label="Adapters beside the base",
                    info=None if p.choices else "No adapter fits this base: see the table below.",
                    elem_id="adapters",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=7, min_width=300):
                answers = gr.HTML(nothing_yet("Choose an image, ask, and compare."), elem_id="answers")
        entries = gr.HTML(p.table(), elem_id="registry")
        again = gr.Button("Look at the registry again", size="sm", elem_id="again")
        gr.HTML(_foot(p))
        page.load(None, js=ANNOUNCE_ANSWERS)
        for asked in (ask.click, words.submit):
            asked(None, js=SHOW_ANSWERS)
            asked(p.ask, [image, words, chosen], answers, concurrency_id="ask", **QUIET)
        for looked in (again.click, page.load):
            looked(partial(_look_again, p), chosen, [chosen, entries], **QUIET)
    page.queue(max_size=_WAITING)
    return page


def _look_again(p: Playground, chosen: list[str]) -> tuple[Any, str]:
    shown = p.look_again()
    return gr.update(choices=p.choices, value=[name for name in chosen if name in p.choices]), shown


def _image() -> gr.Image:
    image = gr.Image(
        label="Image",
        elem_id="image",
        height=270,
        sources=["upload", "clipboard"],
        buttons=[],
        alt_text="The image of the question",
    )
    # Gradio must not open the file, so that `read_image` alone opens images and checks them. Gradio must not fetch a
    # URL that a browser sends in its place either. Both are set on the object, because Gradio writes a stub file beside
    # the source of every class that is derived from one of its own.
    image.preprocess = _given_file  # type: ignore[method-assign]
    keep = image.async_move_resource_to_block_cache

    async def keep_file(url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Choose a file. This page fetches no images from URLs.")
        return await keep(url_or_file_path)

    image.async_move_resource_to_block_cache = keep_file  # type: ignore[method-assign]
    return image


def _given_file(payload: Any) -> Any:
    return Path(payload.path) if payload is not None and payload.path else None


def _words(p: Playground) -> gr.Textbox:
    if p.takes_labels:
        hint = "one per line, or separated by commas"
        return gr.Textbox(label="Labels to choose from", placeholder=hint, lines=3, elem_id="question")
    return gr.Textbox(
        label="Question", placeholder="What do you want to know about the image?", lines=1, elem_id="question"
    )


def _examples(p: Playground, image: gr.Image, words: gr.Textbox) -> None:
    """Add a button for each example, which sets its image and its question."""
    gr.HTML("<p>Or one of these: synthetic, drawn by a program</p>")
    with gr.Row():
        for example in p.examples:
            button = gr.Button(f"{example.domain}: {example.question}", icon=str(example.path), min_width=0)
            button.click(partial(_take, example), None, [image, words], queue=False, **QUIET)


def _take(example: ExampleImage) -> tuple[str, str]:
    return str(example.path), example.question


def _head(p: Playground) -> str:
    base, model = p.vlm.base, p.vlm.model
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        "<div class='pg-head'><h1>One base, its adapters, side by side</h1><p>"
        f"Base <b>{html_text(p.base)}</b> ({html_text(base.family.model_type)}, {millions:,.1f} M parameters, "
        f"{html_text(str(model.dtype).removeprefix('torch.'))} on {html_text(model.device.type)}, identity "
        f"<code>{base.identity.digest[:12]}</code>) is loaded once; adapters are switched by name.</p></div>"
    )


def _foot(p: Playground) -> str:
    synthetic = ""
    if p.examples or any(entry.synthetic for entry in p.entries):
        synthetic = (
            "<p>A program drew the synthetic images. They show no patient and no product, and a score on them is "
            "no evidence about real images.</p>"
        )
    return (
        "<div class='pg-foot'><p><b>Not for diagnosis.</b> Outside its domain, an adapter still answers as in its "
        f"own.</p>{synthetic}<p>Images stay on the machine that runs this page, and are deleted when it stops."
        "</p></div>"
    )
