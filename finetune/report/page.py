"""One self-contained HTML page: the table, and pictures with what each adapter said of them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.outside_text import html_text

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
    """One picture, a question about it, and the answers given."""

    picture: Image.Image
    question: str
    wanted: str
    answers: dict[str, tuple[str, bool]]  # who answered -> what, and whether it was right


def write_page(
    path: Path,
    *,
    title: str,
    intro: str,
    rows: Sequence[dict[str, Any]],
    own: dict[str, str],
    samples: dict[str, list[Sample]],
    footer: str = "",
) -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        title: heading.
        intro: a paragraph below it.
        rows: as ``runs.evaluate`` returns them.
        own: adapter -> the config it was trained on, whose rows are marked.
        samples: heading of a section -> its cards.
        footer: a last line.
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
        f"<h1>{html_text(title)}</h1><p>{html_text(intro)}</p>{_table(rows, own)}{sections}"
        f"<footer>{html_text(footer)}</footer></body></html>\n",
        encoding="utf-8",
    )


def _table(rows: Sequence[dict[str, Any]], own: dict[str, str]) -> str:
    head = ("adapter", "tested on", "exact match", "95 % interval", "majority answer", "blank image", "rows")
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = (
            html_text(row["adapter"]),
            html_text(row["config"]),
            f"{row['exact_match']:.3f}",
            f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
            f"{row['majority']:.3f}",
            f"{row['blank_image']:.3f}",
            str(row["n"]),
        )
        mark = " class='own'" if own.get(row["adapter"]) == row["config"] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _card(sample: Sample) -> str:
    answers = "".join(
        f"<dt>{html_text(who)}</dt><dd class='{'right' if right else 'wrong'}'>"
        f"{html_text(said) or '(nothing)'} {'✓' if right else '✗'}</dd>"
        for who, (said, right) in sample.answers.items()
    )
    small = " class='small'" if max(sample.picture.size) <= 96 else ""
    return (
        f"<div class='card'><img{small} alt='' src='{_data_url(sample.picture)}'>"
        f"<p>{html_text(sample.question)}</p><dl><dt>right answer</dt><dd>{html_text(sample.wanted)}</dd>"
        f"{answers}</dl></div>"
    )


def _data_url(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((320, 320))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
