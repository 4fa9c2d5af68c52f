"""The page: one HTML file that needs nothing else, dark or light, for any width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from .reading import Figure, Source
from .sections import Block, Card, Section, conditions, headlines, label, sections

TITLE = "MobileViT kernels, measured"
DARK = ':root[data-theme="dark"]'
KINDS = {"network": "networks", "op": "single ops", "gpu": "on a GPU"}
# Columns of the table of all figures: heading, whether its cells are numbers.
COLUMNS = (
    ("what", False),
    ("work", False),
    ("case", False),
    ("dtype", False),
    ("candidate", False),
    ("ms", True),
    ("low", True),
    ("high", True),
    ("MiB", True),
    ("GFLOP/s", True),
    ("GB/s", True),
    ("of floor", True),
    ("error", True),
    ("result", False),
    ("file", False),
)


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
        f'<figure class="card"><figcaption><h4>{escape(one.title)}</h4><p>{escape(one.note)}</p>{says}</figcaption>'
        f"{one.chart}{f'<p class=legend>{keys}</p>' if keys else ''}"
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


def figure_row(f: Figure) -> str:
    """A row of the table of all figures; `data-v` of a cell is the number in the file."""
    texts = (f.name, f.work, f.case, f.dtype, label(f.candidate, f.kind))
    numbers = (
        (f.ms, ".3f"),
        (f.low, ".3f"),
        (f.high, ".3f"),
        (f.memory_mib, ".1f"),
        (f.gflop_s, ".1f"),
        (f.gb_s, ".1f"),
        (f.of_floor, ".3f"),
        (f.error, ".1e"),
    )
    cells = [f"<td>{escape(text)}</td>" for text in texts]
    cells += [
        "<td class=n></td>" if value is None else f'<td class=n data-v="{value!r}">{value:{form}}</td>'
        for value, form in numbers
    ]
    bad = ' class="wrong"' if f.ms is None or f.result == "WRONG" else ""
    cells += [f"<td{bad}>{escape(f.result)}</td>", f"<td>{escape(f.file)}</td>"]
    return f'<tr data-kind="{f.kind}" data-ours="{"yes" if f.ours else "no"}">{"".join(cells)}</tr>'


def select(name: str, text: str, options: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f'<option value="{escape(value, quote=True)}">{escape(said)}</option>' for value, said in options)
    return f'<label>{text} <select id="{name}">{inside}</select></label>'


def all_figures(sources: Sequence[Source]) -> str:
    figures = sorted((f for source in sources for f in source.figures), key=lambda f: list(KINDS).index(f.kind))
    there = [(kind, text) for kind, text in KINDS.items() if any(f.kind == kind for f in figures)]
    works = [(work, work) for work in dict.fromkeys(f.work for f in figures)]
    whose = [("", "all"), ("yes", "ours"), ("no", "peers")]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{" class=n" if n else ""}><button type="button">{escape(text)}</button></th>'
        for text, n in COLUMNS
    )
    return (
        '<section id="figures"><h2>All figures</h2><p class=lead>A heading sorts; low and high are the 20th and 80th '
        "percentile, of pytest-benchmark the quartiles. Errors are shares of the norm.</p>"
        '<form class="filters" role="search"><label>Containing <input id="words" type="search" '
        'placeholder="mobilevitv3_s fuse" autocomplete="off"></label>'
        f"{select('kind', 'Of', [('', 'everything'), *there])}{select('work', 'Work', [('', 'all'), *works])}"
        f"{select('ours', 'Whose', whose)}"
        f'<output id="count">{len(figures)} of {len(figures)} rows</output></form>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="All figures"><table id="all">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(map(figure_row, figures))}</tbody></table></div></section>"
    )


def files(sources: Sequence[Source]) -> str:
    rows = [
        (s.file, s.what, str(len(s.figures)), "; ".join(said for said in (conditions(s.machine), s.remark) if said))
        for s in sources
    ]
    inside = table(("file", "written by", "figures", "machine"), rows, "Files")
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
    machines = dict.fromkeys(
        f"{s.machine['cpu']}, {s.machine['threads']} threads" for s in sources if s.machine.get("cpu")
    )
    said = f"{sum(len(s.figures) for s in sources)} figures from {len(sources)} files"
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
