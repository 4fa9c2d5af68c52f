"""The page: one HTML file that needs nothing else, dark or light, for any width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources

from .reading import Figure, Source
from .sections import Block, Card, Section, conditions, headlines, label, sections
from .text import count, cut

TITLE = "MobileViT kernels, measured"
DARK = ':root[data-theme="dark"]'
KINDS = {"network": "networks", "op": "single ops", "gpu": "on a GPU"}
NOTES = (  # on columns, where they are there
    ("low", "low and high are the 20th and 80th percentile, of pytest-benchmark the quartiles"),
    ("error", "errors are shares of the norm"),
)
Column = tuple[str, Callable[[Figure], str | float | None], str]
# Columns of the table of all figures: heading, what it shows, the form of a number or "" of text.
COLUMNS: tuple[Column, ...] = (
    ("what", lambda f: f.name, ""),
    ("candidate", lambda f: label(f.candidate, f.kind), ""),
    ("ms", lambda f: f.ms, ".3f"),
    ("work", lambda f: f.work, ""),
    ("case", lambda f: f.case, ""),
    ("dtype", lambda f: f.dtype, ""),
    ("low", lambda f: f.low, ".3f"),
    ("high", lambda f: f.high, ".3f"),
    ("MiB", lambda f: f.memory_mib, ".1f"),
    ("GFLOP/s", lambda f: f.gflop_s, ".1f"),
    ("GB/s", lambda f: f.gb_s, ".1f"),
    ("of floor", lambda f: f.of_floor, ".3f"),
    ("error", lambda f: f.error, ".1e"),
    ("result", lambda f: f.result, ""),
    ("file", lambda f: f.file, ""),
)
WRAPPED = ("what", "candidate", "case", "result")  # where names may be long


def asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def style() -> str:
    """style.css, whose dark colours are those of a dark system too until a script or a reader chooses."""
    text = asset("style.css")
    begin = text.index(DARK)
    end = text.index("}", begin) + 1
    by_system = text[begin:end].replace(DARK, ":root:not([data-theme])")
    return f"{text[:end]}\n@media (prefers-color-scheme: dark) {{ {by_system} }}{text[end:]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "scroll") -> str:
    """A table that scrolls by itself where the page is narrower."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    said = escape(caption, quote=True)
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{said}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def card(one: Card) -> str:
    keys = "".join(f'<span class="key {kind}">{escape(text)}</span>' for kind, text in one.keys)
    says = f"<p class=says>{escape(one.says)}</p>" if one.says else ""
    return (
        f'<figure class="card"><figcaption><h4>{escape(cut(one.title))}</h4><p>{escape(cut(one.note))}</p>{says}'
        f"</figcaption>{one.chart}{f'<p class=legend>{keys}</p>' if keys else ''}"
        f"<details><summary>Figures</summary>{table(one.head, one.rows, one.title)}</details></figure>"
    )


def block(one: Block) -> str:
    head = f"<h3>{escape(one.title)}</h3><p class=where>{escape(one.note)}</p>" if one.title else ""
    return f"{head}<div class=cards>{''.join(map(card, one.cards))}</div>"


def section(one: Section) -> str:
    parts = [f'<section id="{one.name}"><h2>{escape(one.title)}</h2><p class=lead>{escape(one.note)}</p>']
    parts += [f"<p>{escape(note)}</p>" for note in one.notes]
    parts += map(block, one.blocks)
    if one.table:
        parts.append(table(*one.table, one.title, "scroll tall"))
    return "".join([*parts, "</section>"])


def figure_row(f: Figure, columns: Sequence[Column]) -> str:
    """A row of the table of all figures; `data-v` of a cell is the number in the file."""
    cells = []
    for name, of, form in columns:
        value = of(f)
        if form:
            there = value is not None
            cells.append(f'<td class=n data-v="{value!r}">{value:{form}}</td>' if there else "<td class=n></td>")
        else:
            bad = name == "result" and (f.ms is None or f.result == "WRONG")
            kinds = " ".join(["wrong"] * bad + [name] * (name in WRAPPED))
            cells.append(f'<td class="{kinds}">{escape(value)}</td>' if kinds else f"<td>{escape(value)}</td>")
    work = escape(f.work, quote=True)
    return f'<tr data-kind="{f.kind}" data-work="{work}" data-whose="{f.whose}">{"".join(cells)}</tr>'


def select(name: str, text: str, options: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f'<option value="{escape(value, quote=True)}">{escape(said)}</option>' for value, said in options)
    return f'<label>{text} <select id="{name}">{inside}</select></label>'


def all_figures(sources: Sequence[Source]) -> str:
    figures = sorted((f for source in sources for f in source.figures), key=lambda f: list(KINDS).index(f.kind))
    there = [(kind, text) for kind, text in KINDS.items() if any(f.kind == kind for f in figures)]
    works = [(work, work) for work in dict.fromkeys(f.work for f in figures)]
    found = {f.whose for f in figures}
    whose = [("", "all"), ("ours", "ours"), ("peer", "peers"), ("own", "our own network")]
    whose = [(one, text) for one, text in whose if not one or one in found]
    columns = [column for column in COLUMNS if any(column[1](f) not in (None, "") for f in figures)]
    names = [column[0] for column in columns]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{" class=n" * bool(form)}><button type="button">{escape(text)}</button></th>'
        for text, _, form in columns
    )
    notes = "; ".join(["A heading sorts", *(text for name, text in NOTES if name in names)])
    return (
        f'<section id="figures"><h2>All figures</h2><p class=lead>{notes}. '
        "Where it is wider than the page, the table scrolls sideways.</p>"
        '<form class="filters" role="search"><label>Containing <input id="words" type="search" '
        'placeholder="mobilevitv3_s fuse" autocomplete="off"></label>'
        f"{select('kind', 'Of', [('', 'everything'), *there])}{select('work', 'Work', [('', 'all'), *works])}"
        f"{select('whose', 'Whose', whose)}"
        f'<output id="count">{len(figures)} of {count(len(figures), "row")}</output></form>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="All figures"><table id="all">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(figure_row(f, columns) for f in figures)}</tbody>"
        "</table></div></section>"
    )


def files(sources: Sequence[Source]) -> str:
    rows = [
        (
            s.file,
            s.what,
            count(len(s.figures), "figure"),
            "; ".join(said for said in (conditions(s.machine), s.remark) if said),
        )
        for s in sources
    ]
    inside = table(("file", "written by", "holds", "machine"), rows, "Files")
    return f'<section id="files"><h2>Files</h2><p class=lead>What this page was made from.</p>{inside}</section>'


def page(sources: Sequence[Source]) -> str:
    """The whole page."""
    made = sections(sources)
    links = [(s.name, s.title) for s in made] + [("figures", "All figures"), ("files", "Files")]
    nav = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links)
    tiles = "".join(
        f"<div class=tile><strong>{escape(value)}</strong><span>{escape(text)}</span></div>"
        for value, text in headlines(sources)
    )
    facts = [{name: s.machine.get(name) for name in ("cpu", "threads")} for s in sources if s.machine.get("cpu")]
    machines = dict.fromkeys(map(conditions, facts))
    said = f"{count(sum(len(s.figures) for s in sources), 'figure')} from {count(len(sources), 'file')}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{TITLE}</title>'
        f'<meta name="color-scheme" content="light dark"><style>{style()}</style></head><body>'
        f'<a class="skip" href="#content">To the figures</a><nav aria-label="Sections"><div>{nav}</div>'
        '<button id="theme" type="button" aria-pressed="false">Dark</button></nav>'
        f"<header><h1>{TITLE}</h1><p class=lead>{escape('; '.join([said, *machines]))}</p>"
        f'<div class=tiles>{tiles}</div></header><main id="content">{"".join(map(section, made))}'
        f"{all_figures(sources)}{files(sources)}</main>"
        f"<script>{asset('script.js')}</script></body></html>\n"
    )
