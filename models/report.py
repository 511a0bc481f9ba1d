"""`millirec report`: what `millirec evaluate --out` found, as one HTML page that needs nothing else.

The page is built as a tree, so that whatever a shop calls its things is text and never markup. It asks nobody for
anything, and its own policy forbids it to.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple
from xml.etree.ElementTree import Element, tostring

import typer

from models.commands import one_line_errors, written
from models.ranking.calibration import calibration_error
from models.result import Range, Result, Sheet, ViewResult, leaderboard, read, sheets

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1d2129, #e4e6eb); --page: light-dark(#fff, #16181d);
  --faint: light-dark(#d9dce3, #3a3f4a); --bar: light-dark(#b8c4d9, #4b5870); --best: light-dark(#2f6fde, #6ea0ff);
  --other: light-dark(#c2571a, #f0935a); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: 0.5rem 0 1rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; display: block; margin: 0.5rem 0; font: 12px system-ui, sans-serif; }
text { fill: var(--ink); } .bar { fill: var(--bar); } .best { fill: var(--best); }
.whisker, .tick { stroke: var(--ink); } .tick { stroke-width: 2.5; stroke: var(--other); }
.grid { stroke: var(--faint); } .line0 { stroke: var(--best); } .line1 { stroke: var(--other); }
polyline { fill: none; stroke-width: 2; }
figure { display: inline-block; margin: 0.5rem 1.5rem 0.5rem 0; } figcaption { font-size: 13px; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

WIDTH, LABEL, ROW = 760, 210, 22


def e(tag: str, *children: "Element | str", **attributes: object) -> Element:
    """An element; `class_` is the attribute class, `text_anchor` is text-anchor."""
    made = Element(tag, {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


class Bar(NamedTuple):
    label: str
    value: float | None
    interval: Range = (None, None)
    tick: float | None = None
    """A second figure, drawn as a line across the bar."""
    best: bool = False


def bars(title: str, rows: Sequence[Bar]) -> Element:
    """Horizontal bars from zero, with their 95 % intervals as whiskers."""
    ends = [0.0, *(x for row in rows for x in (row.value, *row.interval, row.tick) if x is not None)]
    low, high = min(ends), max(ends)

    def x(value: float) -> float:
        return round(LABEL + (value - low) / ((high - low) or 1.0) * (WIDTH - LABEL - 60), 1)

    height = ROW * len(rows) + 8
    drawn = [e("line", class_="grid", x1=x(0), x2=x(0), y1=0, y2=height)]
    for place, row in enumerate(rows):
        y = place * ROW + 6
        label = row.label if len(row.label) <= 34 else row.label[:33] + "…"
        drawn.append(e("text", label, x=LABEL - 8, y=y + 12, text_anchor="end"))
        if row.value is None:
            continue
        left, right = sorted((x(0), x(row.value)))
        box = e("rect", x=left, y=y, width=round(right - left, 1), height=ROW - 6, class_="best" if row.best else "bar")
        drawn.append(box)
        if row.interval[0] is not None and row.interval[1] is not None:
            drawn.append(e("line", class_="whisker", x1=x(row.interval[0]), x2=x(row.interval[1]), y1=y + 8, y2=y + 8))
        if row.tick is not None:
            drawn.append(e("line", class_="tick", x1=x(row.tick), x2=x(row.tick), y1=y - 2, y2=y + ROW - 4))
        drawn.append(e("text", f"{row.value:.3f}", x=WIDTH - 4, y=y + 12, text_anchor="end"))
    return e("svg", e("title", title), *drawn, viewBox=f"0 0 {WIDTH} {height}", width=WIDTH, role="img")


def curves(title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], width: int = 340) -> Element:
    """Lines through points (x, y), told apart by colour and named below."""
    xs, ys = zip(*(point for _, line in series for point in line), strict=True)
    left, height = 50, 200

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1.0)
        up = (y - min(ys)) / ((max(ys) - min(ys)) or 1.0)
        return round(left + across * (width - left - 15), 1), round(height - 40 - up * (height - 55), 1)

    drawn = []
    for end in (min, max):
        x, y = at(end(xs), end(ys))
        drawn.append(e("line", class_="grid", x1=left, x2=width - 15, y1=y, y2=y))
        drawn.append(e("text", f"{end(ys):.3g}", x=left - 6, y=y + 4, text_anchor="end"))
        drawn.append(e("text", f"{end(xs):g}", x=x, y=height - 24, text_anchor="middle"))
    for number, (name, line) in enumerate(series):
        path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in line))
        drawn.append(e("polyline", class_=f"line{number}", points=path))
        start = left + number * 100
        drawn.append(e("polyline", class_=f"line{number}", points=f"{start},{height - 5} {start + 14},{height - 5}"))
        drawn.append(e("text", name, x=start + 18, y=height - 1))
    figure = e("svg", e("title", title), *drawn, viewBox=f"0 0 {width} {height + 4}", width=width, role="img")
    return e("figure", e("figcaption", title), figure)


def page(result: Result) -> str:
    """The whole document."""
    title = f"Millirec {result.version}"
    cut = datetime.fromtimestamp(result.cut_ms / 1000, UTC)
    body = [
        e("h1", title),
        e("p", f"Trained on what came before {cut:%Y-%m-%d %H:%M} UTC, judged on the {result.days:g} days after."),
    ]
    for view in result.views:
        body += _view(view)
    body += [e("h2", "Training"), *_losses(result)]
    told = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in result.provenance.items()]
    body.append(_table(Sheet("", "", ("bundle", ""), [("created_at", result.created_at), *told])))
    head = e(
        "head",
        e("meta", charset="utf-8"),
        e("meta", http_equiv="Content-Security-Policy", content=POLICY),
        e("meta", name="viewport", content="width=device-width"),
        e("title", title),
        e("style", STYLE),
    )
    return "<!doctype html>\n" + tostring(e("html", head, e("body", *body), lang="en"), "unicode", method="html")


def _view(view: ViewResult) -> list[Element]:
    found = [e("h2", f"View: {view.name}")]
    board = leaderboard(view)
    for sheet in (board, *sheets(view)):
        found += [e("h3", sheet.title), e("p", sheet.note), *_charts(view, sheet.title), _table(sheet)]
    if view.reliability:
        served = sum(each.candidates for each in view.reliability)
        line = [(each.predicted, each.wanted) for each in view.reliability]
        end = max(max(point) for point in line)
        exact = [(0.0, 0.0), (end, end)]
        found += [
            e("h3", "Reliability"),
            e("p", f"Calibration error {calibration_error(view.reliability):.4f} over {served:,} served items."),
            curves("share that was wanted, by predicted probability", [("served", line), ("exact", exact)]),
        ]
    return found


def _charts(view: ViewResult, sheet: str) -> list[Element]:
    full = view.leaderboard[-1]
    match sheet:
        case "Leaderboard":
            drawn = []
            for name in ("ndcg@20", "coverage@20"):
                interval = name == "ndcg@20"
                rows = [
                    Bar(line.name, line.metrics[name], line.interval if interval else (None, None), best=line is full)
                    for line in view.leaderboard
                ]
                drawn.append(e("figure", e("figcaption", name), bars(name, rows)))
            return drawn
        case "Candidates":
            rows = [Bar(source.name, source.recall) for source in view.sources]
            rows.append(Bar("all sources", view.candidate_recall))
            rows.append(Bar("slates of 20", full.metrics["recall@20"], best=True))
            return [bars("candidate recall, and recall of the slates", rows)]
        case "Users":
            rows = [Bar(f"{s.attribute}: {s.value}", s.ndcg, s.interval, s.rival_ndcg, True) for s in view.segments]
            return [e("figure", e("figcaption", "ndcg@20; line across: the best other row"), bars("ndcg@20", rows))]
        case "Items":
            rows = [
                Bar(f"{i.attribute}: {i.value}", i.recall, i.interval, i.candidate_recall, True) for i in view.items
            ]
            return [e("figure", e("figcaption", "recall@20; line across: candidates"), bars("recall@20", rows))]
        case "Ablation":
            best = full.metrics["ndcg@20"]
            rows = [
                Bar(f"{a.part}: {a.name}", None if a.ndcg is None or best is None else best - a.ndcg, a.loss)
                for a in view.ablation
            ]
            return [e("figure", e("figcaption", "loss of ndcg@20"), bars("loss of ndcg@20", rows))]
    return []


def _losses(result: Result) -> list[Element]:
    drawn = []
    for model, epochs in result.losses.items():
        lines = []
        for part, name in enumerate(("training", "validation")):
            known = [(epoch, value) for epoch, loss in enumerate(epochs, 1) if (value := loss[part]) is not None]
            lines += [(name, known)] if known else []
        drawn += [curves(f"{model}: loss by epoch", lines)] if lines else []
    return drawn


def _table(sheet: Sheet) -> Element:
    head = e("tr", *(e("th", name) for name in sheet.columns))
    rows = (e("tr", *(e("td", cell) for cell in row)) for row in sheet.rows)
    return e("div", e("table", e("thead", head), e("tbody", *rows)), class_="wide")


def report(
    result: Annotated[Path, typer.Argument(help="What `millirec evaluate --out` wrote.")],
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Make one HTML page with the tables and plots of an evaluation; it needs no network."""
    with one_line_errors():
        written(out, page(read(result)))
