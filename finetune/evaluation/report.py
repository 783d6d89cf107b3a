"""One self-contained HTML page: the table of scores, and images with the predictions of each adapter."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.core.outside_text import html_text
from finetune.data.images import open_image
from finetune.evaluation.cells import cells
from finetune.evaluation.rows import question_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from finetune.evaluation.evaluate import Evaluation
    from finetune.evaluation.rows import Row

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #1a7f37; --bad: #c2410c; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
.own { background: var(--soft); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--soft); border-radius: .3rem; }
.card img.small { image-rendering: pixelated; }
.card p { margin: .5rem 0 .3rem; font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(0, 1.2fr) minmax(0, 1fr); gap: .15rem .8rem; margin: 0;
  font-size: .9rem; overflow-wrap: anywhere; }
dt { opacity: .7; } dd { margin: 0; } .right { color: var(--good); } .wrong { color: var(--bad); }
footer { margin-top: 3rem; opacity: .7; font-size: .9rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image, a question about it, and the predictions.

    Attributes:
        image: the first one of the row.
        question: the text of the question.
        reference: the first answer that counts as right.
        predictions: each model -> its prediction, and whether it is right; None for the latter if that is unknown.
    """

    image: Image
    question: str
    reference: str
    predictions: Mapping[str, tuple[str, bool | None]]

    @classmethod
    def of(cls, rows: Mapping[str, Row]) -> Sample:
        """Return the card of one row that several models predicted, by the models' names."""
        example = next(iter(rows.values())).example
        return cls(
            image=open_image(example.images[0], options=example.image_options),
            question=question_of(example),
            reference=example.answers[0],
            predictions={who: (str(row.prediction), row.right) for who, row in rows.items()},
        )


def samples_of(evaluations: Sequence[Evaluation], *, most: int, wrong_first: Sequence[str] = ()) -> list[Sample]:
    """Return cards of rows that have an image, from several evaluations of the same rows.

    Args:
        evaluations: the evaluations, each of another model on the same rows.
        most: the largest number of cards.
        wrong_first: the names of models. Rows that the first model got wrong come first, then those of the next one,
            then all others. Within each group, rows keep their order.
    """
    rows = [
        {one.adapter: row for one, row in zip(evaluations, of_row, strict=True)}
        for of_row in zip(*(one.rows for one in evaluations), strict=True)
        if of_row[0].example.images
    ]
    rows.sort(key=lambda row: next((i for i, who in enumerate(wrong_first) if row[who].right is False), len(row)))
    return [Sample.of(row) for row in rows[:most]]


def write_page(
    path: Path,
    *,
    title: str,
    intro: str,
    evaluations: Sequence[Evaluation],
    own: Mapping[str, str],
    samples: Mapping[str, Sequence[Sample]],
    footer: str = "",
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        title: the heading of the page.
        intro: the paragraph below the heading.
        evaluations: the evaluations, one for each line of the table.
        own: each adapter -> the recipe that it was trained on, whose line is marked.
        samples: each heading of a section -> its cards.
        footer: the last line of the page.
    """
    sections = "".join(
        f"<h2>{html_text(heading)}</h2><div class='cards'>{''.join(_card(s) for s in cards)}</div>"
        for heading, cards in samples.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html_text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html_text(title)}</h1><p>{html_text(intro)}</p>{_table(evaluations, own)}{sections}"
        f"<footer>{html_text(footer)}</footer></body></html>\n",
        encoding="utf-8",
    )


def _table(evaluations: Sequence[Evaluation], own: Mapping[str, str]) -> str:
    head, rows = cells(evaluations)
    lines = ["<tr>" + "".join(f"<th>{html_text(cell)}</th>" for cell in head) + "</tr>"]
    for one, row in zip(evaluations, rows, strict=True):
        mark = " class='own'" if own.get(one.adapter) == one.config else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html_text(cell)}</td>" for cell in row) + "</tr>")
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


_MARKS = {True: (" class='right'", " ✓"), False: (" class='wrong'", " ✗"), None: ("", "")}


def _card(sample: Sample) -> str:
    predictions = "".join(
        f"<dt>{html_text(who)}</dt><dd{_MARKS[right][0]}>{html_text(text) or '(nothing)'}{_MARKS[right][1]}</dd>"
        for who, (text, right) in sample.predictions.items()
    )
    small = " class='small'" if max(sample.image.size) <= 96 else ""
    return (
        f"<div class='card'><img{small} alt='' src='{_data_url(sample.image)}'>"
        f"<p>{html_text(sample.question)}</p><dl><dt>right answer</dt><dd>{html_text(sample.reference)}</dd>"
        f"{predictions}</dl></div>"
    )


def _data_url(image: Image) -> str:
    image = image.copy()
    image.thumbnail((320, 320))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
