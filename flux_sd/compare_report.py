"""A comparison as one HTML page, complete in itself: no script, no link, no font to fetch. Floor 4.

The page shows the verdict, the relative difference of every stage over the run, and a table whose last column
is a heat strip: where in the tensor the difference lies, from the first to the last position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby

from .compare import Comparison, Row, explain, summary

# Colours of the heat scale, from 1e-8 to 1 in half powers of ten, between these; for a light and a dark page.
LIGHT = ("#eef1f4", "#fbe7b5", "#f9b45c", "#e8603c", "#b01530", "#4c0a26")
DARK = ("#262a30", "#4a2b54", "#93305c", "#d9543f", "#f7a13f", "#fdf0a4")
LOWEST, LEVELS = -8, 17  # power of ten of the first level; how many
ROLES = ("A", "B (reference)")
UNSHOWN = (
    "files",
    "weights",
    "format",
    "order",
    "versions",
)  # metadata too long for the eye, or always there
HINT = (
    "A cell's colour is the root mean square of a - b there, relative to that of b in the whole tensor, from "
    "the first token to the last (text before image where both are joined), or from the top row of pixels "
    "down."
)
OPEN_ROWS = 150  # with more stages than these, only sections that hold a difference are unfolded
SECTIONS = {
    "clip": "inputs", "t5": "inputs", "noise": "inputs", "packed": "inputs", "timesteps": "inputs",
    "latents": "picture", "vae": "picture", "image": "picture", "pixels": "picture",
}  # fmt: skip

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2329; --soft: #5c6873; --line: #dde2e7;
  --panel: #f6f8fa; --good: #1a7f4b; --bad: #c01c28; --bar: #b9d3ee; --nan: #8b2fc9; @LIGHT@ }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e8ec; --soft: #97a3ae;
  --line: #2f353c; --panel: #1c2126; --good: #4ecb87; --bad: #ff6f6f; --bar: #2d4a68; --nan: #c58bff;
  @DARK@ } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1360px; padding: 28px 24px 60px; background: var(--page);
  color: var(--ink); font: 14px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
h1 { font-size: 20px; margin: 0 0 14px }
h2 { font-size: 15px; margin: 26px 0 8px }
a { color: inherit }
.mono, td.n, td.stage { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.mono { overflow-wrap: anywhere }
.verdict { border-left: 6px solid var(--good); background: var(--panel); padding: 12px 16px;
  border-radius: 4px }
.verdict.fails { border-color: var(--bad) }
.verdict b { font-size: 16px }
.verdict p { margin: 4px 0 0 }
.about { border-collapse: collapse; margin-top: 14px; font-size: 13px }
.about td, .about th { text-align: left; padding: 2px 22px 2px 0; vertical-align: top;
  overflow-wrap: anywhere; font-weight: 400 }
.about td:first-child { color: var(--soft); white-space: nowrap }
.about th { font-weight: 600 }
.about .differs { color: var(--bad) }
svg { display: block; width: 100% }
.plot { min-width: 820px }
.plot text { fill: var(--soft); font-size: 11px }
.plot .grid { stroke: var(--line) }
.plot .limit { stroke: var(--soft); stroke-dasharray: 2 3; fill: none }
.plot .good { fill: var(--good) }
.plot .bad { fill: var(--bad) }
.plot .first { stroke: var(--bad); stroke-dasharray: 4 3 }
.wide { overflow-x: auto }
.bar { display: flex; flex-wrap: wrap; gap: 10px 26px; align-items: center; margin: 20px 0 10px;
  font-size: 13px; color: var(--soft) }
.bar label { color: var(--ink); cursor: pointer; white-space: nowrap }
.bar .hint { flex: 1 1 320px; font-size: 12px; line-height: 1.35 }
.scale { min-width: 280px }
.scale svg { height: 12px; border: 1px solid var(--line) }
.scale div { display: flex; justify-content: space-between; font-size: 11px }
.nan { white-space: nowrap }
.nan svg { width: 12px; height: 12px; display: inline-block; vertical-align: -1px }
details { border-top: 1px solid var(--line) }
summary { cursor: pointer; padding: 7px 4px; display: flex; gap: 14px; align-items: center }
summary:hover { background: var(--panel) }
summary::before { content: "\\25b8"; color: var(--soft) }
details[open] > summary::before { content: "\\25be" }
summary b { min-width: 62px }
summary span { color: var(--soft); min-width: 118px }
summary span.size { min-width: 190px }
summary .count { color: var(--bad) }
summary .lane { flex: 1; min-width: 60px }
summary svg { height: 10px }
table.stages { border-collapse: collapse; table-layout: fixed; width: 100%; min-width: 960px;
  margin-bottom: 10px }
.stages td, .stages th { padding: 3px 8px; text-align: left; font-weight: 400; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap }
.stages th { color: var(--soft); font-size: 12px }
.stages tr { border-top: 1px solid var(--line) }
.stages thead tr { border: 0 }
.stages td.n, .stages th.n { text-align: right }
td.stage, td.n, td.say { font-size: 12.5px }
.stages td.stage, .stages td.shape { white-space: normal; overflow-wrap: anywhere; line-height: 1.3 }
td.shape, tr.equal td.say { color: var(--soft) }
td.rel { background: linear-gradient(to right, var(--bar) var(--w), transparent var(--w)) no-repeat
  0 50% / 100% 70% }
td.say { color: var(--good) }
tr.over td.say, tr.over td.stage { color: var(--bad); font-weight: 600 }
tr.first { outline: 2px solid var(--bad); outline-offset: -2px; background: var(--panel) }
td.strip svg { height: 14px; border: 1px solid var(--line) }
body:has(#only:checked) :is(tr.pass, details:not(:has(tr.over)) table) { display: none }
@CLASSES@
"""
COLUMNS = (("stage", "25%"), ("shape", "11%"), ("max |a-b|", "8%"), ("relative", "9%"), ("cosine", "10%"),
           ("tolerance", "8%"), ("", "8%"), ("where the difference lies", "21%"))  # fmt: skip


def html_report(found: Comparison, about: tuple[Mapping[str, str], Mapping[str, str]], passes: bool) -> str:
    """The page. about: the metadata of either file."""
    title = "All compared stages agree" if passes else "The records differ"
    link = '<p><a href="#first">to the first stage that differs</a></p>' if found.first_over else ""
    body = [
        "<h1>flux-sd compare</h1>",
        f'<div class="verdict{"" if passes else " fails"}"><b>{title}</b>',
        f'<p class="mono">{escape(summary(found))}</p>{link}</div>',
        _about(found, about),
    ]
    if found.rows:
        body.append("<h2>Relative difference of each stage, in the order of the run</h2>")
        body.append(f'<div class="wide">{_plot(found.rows, found.first_over)}</div>')
        body += [_controls(), *_sections(found)]
    body += _only(found)
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'  # for telephones
    head = f'<meta charset="utf-8">{view}<title>flux-sd compare</title><style>{_style()}</style>'
    lines = ["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""]
    return "\n".join(lines)


def _style() -> str:
    colours = [" ".join(f"--h{i}: {c};" for i, c in enumerate(_scale(ends))) for ends in (LIGHT, DARK)]
    classes = (
        "\n".join(f".h{i} {{ fill: var(--h{i}) }}" for i in range(LEVELS)) + "\n.hn { fill: var(--nan) }"
    )
    style = STYLE
    for mark, text in (("@LIGHT@", colours[0]), ("@DARK@", colours[1]), ("@CLASSES@", classes)):
        style = style.replace(mark, text)
    return style


def _scale(ends: Sequence[str]) -> list[str]:
    """LEVELS colours, evenly between the given ones."""
    rgb = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in ends]
    colours = []
    for level in range(LEVELS):
        at = level * (len(rgb) - 1) / (LEVELS - 1)
        low = min(int(at), len(rgb) - 2)
        mixed = [round(a + (b - a) * (at - low)) for a, b in zip(rgb[low], rgb[low + 1], strict=True)]
        colours.append("#" + "".join(f"{value:02x}" for value in mixed))
    return colours


# ------------------------------------------------------------------------------------------- the head


def _about(found: Comparison, about: tuple[Mapping[str, str], Mapping[str, str]]) -> str:
    """What either record says of itself: a row where they disagree, one line each for all the rest."""
    files = "".join(f"<th>{role}: {escape(file)}</th>" for role, file in zip(ROLES, found.files, strict=True))
    rows = [f"<tr><td></td>{files}</tr>"]
    keys = sorted((about[0].keys() | about[1].keys()) - set(UNSHOWN))
    rest: dict[str, list[str]] = {"in both": [], "A alone says": [], "B alone says": []}
    for key in keys:
        a, b = (metadata.get(key) for metadata in about)
        if a is not None and b is not None and a != b:
            cells = "".join(f'<td class="differs">{escape(value[:200])}</td>' for value in (a, b))
            rows.append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
        else:
            side = "in both" if a == b else "A alone says" if b is None else "B alone says"
            rest[side].append(f"{key} {(a if a is not None else b or '')[:200]}")
    for side, said in rest.items():
        if said:
            rows.append(f'<tr><td>{side}</td><td colspan="2">{escape(" · ".join(said))}</td></tr>')
    return f'<table class="about">{"".join(rows)}</table>'


WIDTH, HEIGHT, LEFT, TOP, FOOT = 1300, 190, 44, 8, 20  # of the plot, in its own units
POWERS = (-9, 1)  # of ten, at its foot and top


def _plot(rows: Sequence[Row], first: Row | None) -> str:
    """One dot per stage over its place in the run; logarithmic. The dotted line is the tolerance."""
    parts = []
    for power in range(*POWERS, 2):
        label = "0" if power == POWERS[0] else f"1e{power}"
        at = _y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    parts += _ticks(rows)
    xs = [LEFT + (i + 0.5) * (WIDTH - LEFT) / len(rows) for i in range(len(rows))]
    limits = " ".join(f"{x:.1f},{_y(row.tolerance):.1f}" for x, row in zip(xs, rows, strict=True))
    parts.append(f'<polyline class="limit" points="{limits}"/>')
    for x, row in zip(xs, rows, strict=True):
        if row is first:
            foot = HEIGHT - FOOT
            parts.append(f'<line class="first" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{foot}"/>')
        title = f"<title>{escape(row.name)}: {row.relative:.3g}, tolerance {row.tolerance:g}</title>"
        kind, y = "good" if row.passes else "bad", _y(row.relative)
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>')
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def _y(value: float) -> float:
    """Height of a relative difference in the plot; NaN and infinity are at the top."""
    low, high = POWERS
    power = math.log10(value) if 0 < value < math.inf else low if value == 0 else high
    return TOP + (high - min(max(power, low), high)) * (HEIGHT - TOP - FOOT) / (high - low)


def _ticks(rows: Sequence[Row]) -> Iterator[str]:
    """Where each section of the run begins."""
    begin, room = 0, 0.0
    for name, section in groupby(rows, key=_section):
        x = LEFT + begin * (WIDTH - LEFT) / len(rows)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - 14}"/>'
        length = 7 * len(name)
        at = min(x + 3, WIDTH - length)
        if at >= room:  # a label is left out where it would cover the one before
            yield f'<text x="{at:.1f}" y="{HEIGHT - 6}">{escape(name)}</text>'
            room = at + length + 5
        begin += len(list(section))


# ------------------------------------------------------------------------------------------ the table


def _controls() -> str:
    """The filter, and what the colours mean."""
    cells = "".join(f'<rect class="h{i}" x="{i}" width="1.02" height="1"/>' for i in range(LEVELS))
    scale = f'<svg viewBox="0 0 {LEVELS} 1" preserveAspectRatio="none">{cells}</svg>'
    ends = "".join(f"<span>{text}</span>" for text in ("1e-8", "1e-6", "1e-4", "1e-2", "1 or more"))
    nan = '<svg viewBox="0 0 1 1"><rect class="hn" width="1" height="1"/></svg>'
    return (
        '<div class="bar"><label><input type="checkbox" id="only"> only stages that differ</label>'
        f'<div class="scale">{scale}<div>{ends}</div></div><span class="nan">{nan} NaN or infinite</span>'
        f'<span class="hint">{HINT}</span></div>'
    )


def _sections(found: Comparison) -> Iterator[str]:
    """One foldable table for each part of the run."""
    columns = "".join(f'<col style="width:{width}">' for _, width in COLUMNS)
    heads = "".join(f"<th{_right(i)}>{label}</th>" for i, (label, _) in enumerate(COLUMNS))
    for name, group in groupby(found.rows, key=_section):
        rows = list(group)
        failing = sum(not row.passes for row in rows)
        worst = max(
            (row.relative for row in rows), key=lambda value: math.inf if math.isnan(value) else value
        )
        lane = _strip([row.relative for row in rows], [row.name for row in rows])
        count = f'<span class="count">{failing} differ</span>' if failing else "<span>no difference</span>"
        if not failing and worst:
            count = "<span>within tolerance</span>"
        opened = " open" if failing or len(found.rows) <= OPEN_ROWS else ""
        body = "".join(_line(row, row is found.first_over) for row in rows)
        size = f"{len(rows)} stage{'s' * (len(rows) > 1)}, at most {worst:.2g}"
        yield (
            f'<details{opened}><summary><b>{escape(name)}</b><span class="size">{size}</span>{count}'
            f'<div class="lane">{lane}</div></summary>'
            f'<div class="wide"><table class="stages"><colgroup>{columns}</colgroup>'
            f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
        )


def _right(column: int) -> str:
    return ' class="n"' if 1 <= column <= 5 else ""


def _section(row: Row) -> str:
    parts = row.name.split(".")
    if parts[0] == "step" and len(parts) > 1:
        return f"step {parts[1]}"
    return SECTIONS.get(parts[0], parts[0])


def _line(row: Row, first: bool) -> str:
    kinds = [f"{row.verdict} pass" if row.passes else "over", "first" if first else ""]
    anchor = ' id="first"' if first else ""
    name = escape(row.name).replace(".", ".<wbr>")  # a long one may go on in the next line
    title = escape(" = ".join(dict.fromkeys([row.name, *row.names])))
    where, numbers = f"A: {_shape(row.shapes[0])}", ["", "", ""]
    if row.verdict != "shape":
        where = _strip(row.strip)
        numbers = [f"{row.max_abs:.3g}", f"{row.relative:.3g}", f"{row.cosine:.8f}"]
    cells = [
        f'<td class="stage" title="{title}">{name}</td>',
        f'<td class="shape n">{_shape(row.shapes[1])}</td><td class="n">{numbers[0]}</td>',
        f'<td class="n rel" style="--w:{_share(row.relative):.0%}">{numbers[1]}</td>',
        f'<td class="n">{numbers[2]}</td><td class="n">{row.tolerance:g}</td>',
        f'<td class="say" title="{escape(explain(row))}">{row.verdict}</td>',
        f'<td class="strip">{where}</td>',
    ]
    return f'<tr class="{" ".join(kinds).strip()}"{anchor}>{"".join(cells)}</tr>'


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _share(relative: float) -> float:
    """How much of its cell the bar of a relative difference fills: nothing to all from 1e-9 to 1."""
    if not relative > 0:  # NaN too
        return 0.0
    return min(1.0, max(0.02, 1 + math.log10(relative) / 9)) if math.isfinite(relative) else 1.0


def _strip(values: Sequence[float], labels: Sequence[str] = ()) -> str:
    """Coloured cells from left to right; neighbours of one colour are drawn as one."""

    def kind(i: int) -> tuple[str | None, str]:
        return _level(values[i]), labels[i] if labels else ""

    cells, begin = [], 0
    for (level, label), run in groupby(range(len(values)), key=kind):
        end = begin + len(list(run))
        if level is not None:
            where = label or f"{begin / len(values):.0%} to {end / len(values):.0%}"
            title = f"<title>{escape(where)}: {max(values[begin:end]):.2g}</title>"
            size = f'x="{begin}" width="{end - begin + 0.02:g}" height="1"'
            cells.append(f'<rect class="{level}" {size}>{title}</rect>')
        begin = end
    box = f"0 0 {max(1, len(values))} 1"
    return f'<svg viewBox="{box}" preserveAspectRatio="none">{"".join(cells)}</svg>'


def _level(value: float) -> str | None:
    """The class of a cell's colour; None for no difference at all."""
    if value == 0.0:
        return None
    if math.isnan(value):
        return "hn"
    power = math.log10(value) if math.isfinite(value) else 0.0
    return f"h{min(max(round(2 * (power - LOWEST)), 0), LEVELS - 1)}"


def _only(found: Comparison) -> Iterator[str]:
    """Stages that one file holds alone."""
    for file, names in zip("AB", found.only, strict=True):
        if names:
            size = f'<span class="size">{len(names)} stage{"s" * (len(names) > 1)}, not compared</span>'
            listed = f'<p class="mono">{escape(", ".join(names))}</p>'
            yield f"<details><summary><b>only in {file}</b>{size}</summary>{listed}</details>"
