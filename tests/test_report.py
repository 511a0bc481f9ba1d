"""The page of an evaluation: whole, self-contained, and text stays text."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from models.ranking.calibration import Bin
from models.report import LABEL, WIDTH, Bar, bars, curves, page, report
from models.result import (
    Ablated,
    ItemGroup,
    Line,
    Result,
    Segment,
    Sheet,
    SourceRecall,
    Spread,
    ViewResult,
)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ODD = "<script>document.title='stolen'</script>&amp;\"'"


def view(name: str, tag: str) -> ViewResult:
    metrics = {f"{one}@20": 0.25 for one in "ndcg recall coverage gini".split()}
    lines = [
        Line(name=f"source {tag}", metrics=metrics | {"auc@20": None}, interval=(0.2, 0.3), lead=(-0.01, 0.02)),
        Line(name="pipeline", metrics=metrics, interval=(0.21, 0.31), lead=None),
    ]
    return ViewResult(
        name=name,
        users=1234,
        candidate_recall=0.5,
        leaderboard=tuple(lines),
        segments=(
            Segment(
                attribute="region",
                value=tag,
                users=20,
                ndcg=0.1,
                interval=(None, None),
                recall=None,
                rival="source b",
                rival_ndcg=0.2,
            ),
        ),
        spreads=(Spread(attribute="region", best=tag, worst="b", gap=0.1, interval=(0.0, 0.2), by_chance=0.05),),
        items=(
            ItemGroup(
                attribute="department",
                value=tag,
                users=3,
                pairs=4,
                recall=0.1,
                interval=(0.0, 0.2),
                candidate_recall=0.4,
            ),
        ),
        sources=(SourceRecall(name=tag, k=10, recall=0.4, alone=0.1),),
        ablation=(Ablated(part="source", name=tag, ndcg=0.26, loss=(-0.02, 0.01)),),
        reliability=(Bin(30, 0.1, 0.2), Bin(10, 0.8, 0.7)),
    )


def result(tag: str = "plain") -> Result:
    return Result(
        version="20261122T101500-3fa94c1b",
        created_at="2026-11-22T10:15:00Z",
        cut_ms=1_700_000_000_000,
        days=30,
        provenance={"data_sha256": "ab" * 32, "events": 5, "code": tag, "plan": {"cuts_ms": [1, 2]}},
        losses={tag: ((3.0, 3.5), (2.0, float("nan"))), "ranker": ((1.0, 1.5), (0.5, 1.0))},
        views=(view("new", tag), view("all", tag)),
    )


class Tags(HTMLParser):
    """Every tag with its attributes, and that each is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_every_part_of_every_view() -> None:
    text = page(result())
    tags = Tags(text)
    assert not tags.open
    for title in ("Leaderboard", "Candidates", "Users", "Items", "Fairness", "Ablation", "Reliability"):
        assert text.count(f"<h3>{title}</h3>") == 2
    names = [tag for tag, _ in tags.found]
    # By view: two of the leaderboard, candidates, users, items, ablation, reliability; then the losses of two models.
    assert names.count("svg") == 2 * 7 + 2
    assert names.count("table") == 2 * 6 + 1
    assert "20261122T101500-3fa94c1b" in text
    assert "-0.0200 .. 0.0100" in text
    assert "Calibration error 0.1000 over 40 served items." in text
    assert "nan" not in text.lower().replace("maintenance", "")


def test_the_page_asks_nobody_for_anything() -> None:
    text = page(result())
    for tag, attributes in Tags(text).found:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
        assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    assert "light-dark(" in text


def test_what_a_shop_calls_its_things_is_text() -> None:
    text = page(result(ODD))
    assert "<script" not in text
    assert "&lt;script&gt;document.title='stolen'&lt;/script&gt;&amp;amp;" in text
    assert [tag for tag, _ in Tags(text).found].count("script") == 0


def test_a_page_without_the_parts_that_may_be_missing() -> None:
    bare = view("new", "x").model_copy(
        update={"segments": (), "spreads": (), "items": (), "ablation": (), "reliability": ()}
    )
    text = page(result().model_copy(update={"views": (bare,), "losses": {}}))
    assert [title for title in ("Users", "Ablation", "Reliability") if f"<h3>{title}" in text] == []
    assert "<h3>Leaderboard</h3>" in text


def test_a_table_in_markdown_keeps_its_columns() -> None:
    text = Sheet("Items", "a note", ("items", "count"), [("a|b\nc", "1")]).markdown()
    assert text == "Items: a note\n\n| items | count |\n| --- | ---: |\n| a\\|b c | 1 |\n"


def test_bars_lie_where_their_values_say() -> None:
    drawn = bars("t", [Bar("a", 0.5, (0.4, 0.6)), Bar("b", -0.25), Bar("c", None), Bar("d", 1.0, tick=0.5)])
    zero = float(drawn.find("line").get("x1"))  # type: ignore[union-attr, arg-type]
    (half, below, whole) = ((float(box.get("x", 0)), float(box.get("width", 0))) for box in drawn.iter("rect"))
    assert half[0] == whole[0] == zero
    assert below[0] + below[1] == pytest.approx(zero, abs=0.2)
    assert [half[1] / whole[1], below[1] / whole[1]] == pytest.approx([0.5, 0.25], abs=0.01)
    (whisker,) = (line for line in drawn.iter("line") if line.get("class") == "whisker")
    (tick,) = (line for line in drawn.iter("line") if line.get("class") == "tick")
    middle = (float(whisker.get("x1", 0)) + float(whisker.get("x2", 0))) / 2
    assert [middle, float(tick.get("x1", 0))] == pytest.approx([zero + whole[1] / 2] * 2, abs=0.3)
    # Names end left of the plot, values at the page's edge, also where bars go left of zero.
    assert {text.get("x") for text in drawn.iter("text")} == {str(LABEL - 8), str(WIDTH - 4)}
    assert bars("nothing", []).tag == "svg"


def test_curves_rise_where_their_values_do() -> None:
    drawn = curves("t", [("up", [(1.0, 0.0), (2.0, 5.0), (3.0, 10.0)]), ("flat", [(1.0, 5.0), (3.0, 5.0)])])
    up, _, flat, _ = (line.get("points", "") for line in drawn.iter("polyline"))
    (x1, y1), (x2, y2), (x3, y3) = ([float(n) for n in point.split(",")] for point in up.split())
    assert x1 < x2 < x3
    assert y1 > y2 > y3
    assert [x2 - x1, y1 - y2] == pytest.approx([x3 - x2, y2 - y3], abs=0.2)
    assert f",{y2}" in flat
    assert curves("a single epoch", [("one", [(1.0, 2.0)])]).tag == "figure"


def command() -> typer.Typer:
    made = typer.Typer()
    made.command()(report)
    return made


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    source, out = tmp_path / "result.json", tmp_path / "page.html"
    source.write_text(result("größer").model_dump_json())
    assert CliRunner().invoke(command(), [str(source), "--out", str(out)]).exit_code == 0
    assert out.read_text(encoding="utf-8") == page(result("größer"))


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "not a result"), ("{}", "version"), ('{"format": 2}', "format"), (None, "No such file")],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path, content: str | None, says: str) -> None:
    source = tmp_path / "result.json"
    if content is not None:
        source.write_text(content)
    ended = CliRunner().invoke(command(), [str(source), "--out", str(tmp_path / "page.html")])
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert str(source) in line
    assert says in line
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    source = tmp_path / "result.json"
    source.write_text(result().model_dump_json())
    ended = CliRunner().invoke(command(), [str(source), "--out", str(tmp_path / "nowhere" / "page.html")])
    assert ended.exit_code == 2
    assert "nowhere" in ended.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    assert BROWSER
    (tmp_path / "page.html").write_text(page(result(ODD)), encoding="utf-8")
    shot = tmp_path / "page.png"
    switches = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    run = subprocess.run(
        [BROWSER, *switches, "--dump-dom", f"--screenshot={shot}", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "<title>Millirec 20261122T101500-3fa94c1b</title>" in run.stdout
    assert run.stdout.count("<svg") == 2 * 7 + 2
    assert "<script" not in run.stdout
    # A page without its style, or without its bars, is nearly empty: 3 kB.
    assert shot.stat().st_size > 10_000
