"""The page's own HTML: answers as cards, entries as a table, errors as one message. All text is escaped here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.core.outside_text import html_text
from finetune.metrics.names import BASE, TEST
from finetune.metrics.normalization import normalize_vqa

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.playground.answers import Answer
    from finetune.playground.catalog import CatalogEntry

_LONG = 48  # characters; a longer answer is shown as text and not as a headline
MAX_ROWS = 200  # of the table; a registry may hold thousands


def alert(message: str) -> str:
    """Return the HTML of one error message."""
    return f"<div class='pg-alert' role='alert'><b>That did not work.</b> {html_text(message)}</div>"


def nothing_yet(hint: str) -> str:
    """Return the HTML to show before the first answers."""
    return f"<div class='pg-empty'>{html_text(hint)}</div>"


def cards(
    asked: str, answers: Sequence[Answer], *, waiting: Sequence[CatalogEntry | None] = (), right: str | None
) -> str:
    """Return the answers side by side, the base's first.

    Args:
        asked: the question, or the labels.
        answers: the answers so far.
        waiting: the entries without an answer yet; None for the base.
        right: the right answer; None if unknown.
    """
    known = ""
    if right is not None:
        known = f"<p class='pg-right'>Right answer, by the program that drew the image: <b>{html_text(right)}</b></p>"
    shown = [_card(answer, answers[0], right) for answer in answers]
    shown += [
        f"<article class='pg-card'>{_who(entry)}<div class='pg-answer waiting'>answering …</div></article>"
        for entry in waiting
    ]
    return f"<h2 class='pg-h2'>{html_text(asked)}</h2>{known}<div class='pg-cards'>{''.join(shown)}</div>"


def _card(answer: Answer, base: Answer, right: str | None) -> str:
    if answer.error is not None:
        return (
            f"<article class='pg-card failed'>{_who(answer.entry)}<div class='pg-error' role='alert'>"
            f"<b>No answer.</b> {html_text(answer.error)}</div></article>"
        )
    differs = answer is not base and base.error is None and answer.text.strip() != base.text.strip()
    compared = ""
    if answer is not base and base.error is None:
        compared = _chip("differs from the base", "differs") if differs else _chip("same as the base")
    size = " long" if len(answer.text) > _LONG else ""
    return (
        f"<article class='pg-card{' differs' if differs else ''}'>{_who(answer.entry)}"
        f"<div class='pg-answer{size}'>{html_text(answer.text) or '(nothing)'}{_mark(answer.text, right)}</div>"
        f"<div class='pg-marks'>{compared}</div><div class='pg-time'>{_times(answer)}</div></article>"
    )


def _who(entry: CatalogEntry | None) -> str:
    if entry is None:
        return "<div class='pg-who'>base<small>no adapter</small></div>"
    version = f"<small>version {entry.version}</small>" if entry.version is not None else ""
    return f"<div class='pg-who'>{html_text(entry.name)}{version}</div>"


def _mark(text: str, right: str | None) -> str:
    if right is None:
        return ""
    kind, sign = ("right", "✓") if normalize_vqa(text) == normalize_vqa(right) else ("wrong", "✗")
    return f"<span class='pg-mark {kind}' aria-hidden='true'>{sign}</span><span class='pg-sr'>, {kind}</span>"


def _times(answer: Answer) -> str:
    answered = f"answered in {milliseconds(answer.answer_ms)}"
    if answer.entry is None:
        return answered
    how = "loaded and checked" if answer.was_loaded else "switched"
    return f"{how} in {milliseconds(answer.ready_ms)}<br>{answered}"


def milliseconds(value: float) -> str:
    """Return a duration with its unit: ``0.08 ms``, ``43 ms``, ``2.1 s``."""
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2f} ms"


def table(entries: Sequence[CatalogEntry], *, where: str) -> str:
    """Return the adapters with their scores; refused ones are struck out, with the reason."""
    title = "<h2 class='pg-h2'>Adapters in the registry</h2>"
    if not entries:
        return title + nothing_yet(f"There are no adapters in {where}. `finetune demo` trains and publishes two.")
    head = ("Adapter", "Trained for", "Exact match, base → adapter", "Evaluated on", "Signature", "On this base")
    rows = "".join(_row(entry, head) for entry in entries[:MAX_ROWS])
    more = len(entries) - MAX_ROWS
    rest = f"<p>{more} more are not shown. Name some: finetune app NAMESPACE/NAME ...</p>" if more > 0 else ""
    headings = "".join(f"<th scope='col'>{html_text(cell)}</th>" for cell in head)
    return f"{title}<table class='pg-table'><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>{rest}"


def _row(entry: CatalogEntry, head: Sequence[str]) -> str:
    version = f"version {entry.version}" if entry.version is not None else "folder" if entry.summary else ""
    aliases = "".join(_chip(f"@{alias}") for alias in entry.aliases)
    domain = f"{entry.summary.get('domain', '')} · {entry.summary.get('task', '')} · {entry.summary.get('method', '')}"
    fits = "<span class='pg-yes'>fits</span>"
    if entry.refusal is not None:
        fits = f"<span class='pg-no'>cannot be chosen</span><small>{html_text(entry.refusal)}</small>"
    cells = (
        f"<div class='pg-name'>{html_text(entry.name)}</div><small>{version}</small>{aliases}",
        f"{html_text(domain)}{'<br>' + _chip('synthetic images') if entry.synthetic else ''}",
        _scores(entry),
        _evaluated_on(entry),
        html_text(entry.signature),
        fits,
    )
    # One box for each cell, because a phone shows label and value side by side.
    shown = "".join(f"<td data-label='{html_text(h)}'><div>{c}</div></td>" for h, c in zip(head, cells, strict=True))
    return f"<tr class='{'offered' if entry.refusal is None else 'refused'}'>{shown}</tr>"


def _scores(entry: CatalogEntry) -> str:
    values, metrics = entry.values, entry.metrics
    if not metrics:
        return "not evaluated"
    return "<br>".join(
        _score(values.get(f"{BASE}.{name}"), values[f"{TEST}.{name}"], name.replace("_", " ") * (len(metrics) > 1))
        for name in metrics
    )


def _score(base: float | None, test: float, name: str) -> str:
    first = "" if base is None else f"{base:.3f} → "
    # Only shares have a bar.
    shares = [share for share in (test, base) if share is not None and 0 <= share <= 1]
    marks = "".join(f"<i style='width: {share:.0%}'></i>" for share in shares)
    label = f"<small>{html_text(name)}</small> " if name else ""
    bar = f"<span class='pg-bar' aria-hidden='true'>{marks}</span>"
    return f"{label}{first}<span class='pg-after'>{test:.3f}</span>{bar}"


def _evaluated_on(entry: CatalogEntry) -> str:
    values = entry.values
    if (rows := values.get(f"{TEST}.n")) is None:
        return "-"
    majority = [value for name in entry.metrics if (value := values.get(f"{TEST}.majority.{name}")) is not None]
    usual = f"; the commonest answer alone reaches {majority[0]:.3f}" if len(majority) == 1 else ""
    return f"{rows:,.0f} test rows<small>of its own data{usual}</small>"


def _chip(text: str, kind: str = "") -> str:
    return f"<span class='pg-chip {kind}'>{html_text(text)}</span>"
