"""The report on disk: report.json, report.md, report.html in one file, and SVG figures."""

import html
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import tabular
from experiments.config import write_atomically
from experiments.report import shares, tables
from experiments.report.build import Report, Row
from experiments.report.figures import (
    GRID,
    INK,
    MUTED,
    ON_DARK,
    PAPER,
    STYLES,
    Picture,
    pictures,
    to_svg,
)
from experiments.report.load import Arm
from experiments.report.tables import Table

FIGURES = "figures"
TITLE = "How much of learned attention can a rule of distance replace?"
WEIGHTS = "Weights of every arm for one example, head by head, with profiles by distance"
HOW_TO_READ = (
    "All arms of a task share data, order of batches, initial values, optimiser, steps and the "
    "grid of learning rates; the rule of attention is the only difference, but for arms that a "
    "task defines by more than a rule, as translation does. Where arms also tried "
    "settings of their own, or one is matched in size, the table of how they were made says so.",
    "Scores are means over seeds on the test split. A 95 % interval counts what varies between "
    "seeds and between clusters of items (sentences, curves, rows); it covers at least 95 %, and "
    "near 95 % where seeds carry most of the variance. With one seed there is no interval and no "
    "claim.",
    "Declared pairs are each rule against learned, table against gaussian, a recurrent model "
    "without attention against one with it, and fixed patterns against as many learned heads; an "
    "interval is of its pair alone, while Holm's p counts all pairs of a task and decides. "
    "Equivalent means that two one-sided tests put the difference inside a margin fixed "
    "beforehand; no difference at this n means neither.",
    "Retention is (rule - self) / (best content arm - self), the best chosen on validation, with "
    "Fieller's interval.",
    "FLOPs are of one forward pass by formula; speed and peak memory are of the training step of "
    "one seed, each worker on its own core; a learning rate at the edge of its grid is marked.",
)


def write(
    report: Report,
    arms: Mapping[str, Sequence[Arm]],
    workdir: pathlib.Path,
    weights: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Writes the report and returns what it wrote; the same report gives the same bytes.

    Args:
      report: from `build`.
      arms: of every task.
      workdir: where the report is kept.
      weights: by task, the file beside the report with the weights of its arms.

    """
    weights = weights or {}
    workdir = pathlib.Path(workdir)
    drawn = {task: list(pictures(report, members, task)) for task, members in arms.items()}
    for name, family in shares.families(report).items():
        drawn[_by_share(name)] = [shares.picture(report, name, family)]
    svgs = {one.file: to_svg(one.figure) for found in drawn.values() for one in found}
    files = {
        "report.json": to_json(report),
        "report.md": to_markdown(report, drawn, weights),
        "report.html": to_html(report, drawn, svgs, weights),
        **{f"{FIGURES}/{name}": svg for name, svg in svgs.items()},
    }
    for name, text in files.items():
        write_atomically(workdir / name, text)
    return [workdir / name for name in files]


def to_json(report: Report) -> str:
    """The report as JSON.

    Raises:
      ValueError: a number is not finite, which JSON cannot say.

    """
    parts = {
        "rows": report.rows,
        "verdicts": report.verdicts,
        "tasks": report.tasks,
        "environment": report.environment,
    }
    return json.dumps(parts, indent=2, allow_nan=False) + "\n"


def _by_share(name: str) -> str:
    """Title of the section of a family of tasks."""
    return f"{name}: {shares.TITLE.lower()}"


def _sentences(report: Report, task: str) -> list[str]:
    rows, verdicts = report.of(task)
    return [tables.sentence(one, rows[0]) for one in verdicts]


def _about(facts: Row) -> list[str]:
    """What was scored, what was left out, and whose bytes these are."""
    margin = tables.amount(facts["margin"], facts["unit"])
    if facts["margin_is_relative"]:
        margin = f"{100 * facts['margin']:g} % of the reference's score"
    dropped = ", ".join(f"{why}: {n}" for why, n in (facts["dropped"] or {}).items())
    return [
        f"{facts['items']:,} items in {facts['clusters']:,} clusters of the {facts['split']} "
        f"split; equivalence margin {margin}.",
        f"Padding is {100 * (facts['padding'] or 0):.1f} % of the training positions computed; "
        f"dropped or truncated: {dropped or 'nothing'}.",
        f"SHA-256 of the data: {facts['data_sha256']}",
    ]


def _details(report: Report, task: str) -> list[tuple[str, Table]]:
    found = [
        ("Scores by distance", tables.by_distance(report, task)),
        ("Scores by group", tables.by_group(report, task)),
        ("How every arm was made", tables.details(report, task)),
    ]
    return [(title, table) for title, table in found if table is not None]


def _environment(report: Report) -> Table:
    rows = [[name, _plain(value)] for name, value in report.environment.items()]
    return Table(["name", "value"], rows)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- Markdown


def to_markdown(
    report: Report, drawn: Mapping[str, Sequence[Picture]], weights: Mapping[str, str]
) -> str:
    """The report as Markdown; figures are files beside it."""
    lines = [f"# {TITLE}", "", _bullets(HOW_TO_READ), ""]
    lines += ["## Overview", "", markdown_table(tables.overview(report)), ""]
    for facts in report.tasks:
        lines += _markdown_task(report, facts, drawn[facts["task"]])
        if facts["task"] in weights:
            lines += [f"[{WEIGHTS}]({weights[facts['task']]})", ""]
    for name, family in shares.families(report).items():
        title = _by_share(name)
        lines += [f"## {title}", "", markdown_table(shares.table(report, family)), ""]
        lines += [_bullets(map(tabular.escape, shares.sentences(report, family))), ""]
        lines += _markdown_figures(drawn[title])
    lines += ["## Environment", "", markdown_table(_environment(report)), ""]
    return "\n".join(lines)


def _markdown_task(report: Report, facts: Row, found: Sequence[Picture]) -> list[str]:
    task = facts["task"]
    lines = [f"## {task}", "", markdown_table(tables.headline(report, task)), ""]
    for title, sentences in (("Verdicts", _sentences(report, task)), ("Notes", facts["notes"])):
        if sentences:
            lines += [f"### {title}", "", _bullets(map(tabular.escape, sentences)), ""]
    lines += _markdown_figures(found)
    for title, table in _details(report, task):
        lines += [f"### {title}", "", markdown_table(table), ""]
    return [*lines, "### Data", "", _bullets(_about(facts)), ""]


def _markdown_figures(found: Sequence[Picture]) -> list[str]:
    lines = []
    for one in found:
        lines += [f"### {one.title}", "", f"![{one.title}: {one.task}]({FIGURES}/{one.file})", ""]
        lines += [one.caption, ""]
    return lines


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def markdown_table(table: Table) -> str:
    """A table with names on the left and values on the right."""
    return tabular.markdown([table.header, *table.rows], table.header[:1])


# ---- HTML


def to_html(
    report: Report,
    drawn: Mapping[str, Sequence[Picture]],
    svgs: Mapping[str, str],
    weights: Mapping[str, str],
) -> str:
    """The report as one page that asks nobody for anything."""
    sections = [_section("overview", "Overview", html_table(tables.overview(report)))]
    for facts in report.tasks:
        body = _html_task(report, facts, drawn[facts["task"]], svgs)
        if facts["task"] in weights:
            link = html.escape(weights[facts["task"]], quote=True)
            body += f'<p><a href="{link}">{WEIGHTS}</a></p>'
        sections.append(_section(_anchor(facts["task"]), facts["task"], body))
    for name, family in shares.families(report).items():
        title = _by_share(name)
        parts = [
            html_table(shares.table(report, family)),
            _list(shares.sentences(report, family)),
            _html_figures(drawn[title], svgs),
        ]
        sections.append(_section(_anchor(title), title, "\n".join(parts)))
    body = html_table(_environment(report))
    sections.append(_section("environment", "Environment", body))
    return PAGE.format(
        title=html.escape(TITLE),
        style=STYLE.replace("/*light*/", _variables({})).replace("/*dark*/", _variables(ON_DARK)),
        contents=_contents(report, drawn),
        reading=_list(HOW_TO_READ),
        sections="\n".join(sections),
    )


def _html_task(
    report: Report, facts: Row, found: Sequence[Picture], svgs: Mapping[str, str]
) -> str:
    task = facts["task"]
    parts = [html_table(tables.headline(report, task))]
    for title, sentences in (("Verdicts", _sentences(report, task)), ("Notes", facts["notes"])):
        if sentences:
            parts.append(f"<h3>{title}</h3>{_list(sentences)}")
    parts.append(_html_figures(found, svgs))
    for title, table in _details(report, task):
        body = html_table(table)
        parts.append(f"<details><summary>{html.escape(title)}</summary>{body}</details>")
    return "\n".join([*parts, f"<h3>Data</h3>{_list(_about(facts))}"])


def _html_figures(found: Sequence[Picture], svgs: Mapping[str, str]) -> str:
    return f'<div class="figures">{"".join(_html_figure(one, svgs) for one in found)}</div>'


def _html_figure(picture: Picture, svgs: Mapping[str, str]) -> str:
    anchor, title = _anchor(f"{picture.task} {picture.kind}"), html.escape(picture.title)
    label = html.escape(f"{picture.title}: {picture.task}. {picture.caption}", quote=True)
    svg = inline_svg(svgs[picture.file], anchor, label)
    return (
        f'<figure id="{anchor}"><h3>{title}</h3><div class="scroll">{svg}</div>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """An SVG as part of a page: colours follow the page, ids are its own, and it has a name."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-")
    for color in _colors():
        body = body.replace(color, f"var(--c{color[1:]})")
    return body.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _colors() -> list[str]:
    return sorted({INK, MUTED, GRID, PAPER, *(color for color, _, _ in STYLES.values())})


def _variables(changed: Mapping[str, str]) -> str:
    return " ".join(f"--c{color[1:]}: {changed.get(color, color)};" for color in _colors())


def _contents(report: Report, drawn: Mapping[str, Sequence[Picture]]) -> str:
    items = ['<li><a href="#overview">Overview</a></li>']
    for facts in report.tasks:
        task = facts["task"]
        inner = ", ".join(
            f'<a href="#{_anchor(f"{task} {one.kind}")}">{html.escape(one.title.lower())}</a>'
            for one in drawn[task]
        )
        items.append(f'<li><a href="#{_anchor(task)}">{html.escape(task)}</a>: {inner}</li>')
    for title in map(_by_share, shares.families(report)):
        items.append(f'<li><a href="#{_anchor(title)}">{html.escape(title)}</a></li>')
    items.append('<li><a href="#environment">Environment</a></li>')
    return "".join(items)


def _anchor(text: str) -> str:
    return "t-" + re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{html.escape(title)}</h2>\n{body}</section>'


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>"


def html_table(table: Table) -> str:
    """A table that scrolls on its own where the page is narrow."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    first = len(table.rows) - table.references
    body = "".join(_html_row(row, index >= first) for index, row in enumerate(table.rows))
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html_row(row: Sequence[str], reference: bool) -> str:
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
    kind = ' class="reference"' if reference else ""
    return f'<tr{kind}><th scope="row">{html.escape(row[0])}</th>{cells}</tr>\n'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<details open><summary>How to read this report</summary>{reading}</details>
{sections}
</main>
</body>
</html>
"""

STYLE = """
:root { /*light*/ --ground: #ffffff; --text: #1a1a1a; --soft: #595959; --line: #d8d8d8;
  --band: #f4f5f7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { /*dark*/ --ground: #16181c; --text: #ececec; --soft: #a9adb3; --line: #3c4046;
    --band: #1f2227; --link: #7db7f0; } }
* { box-sizing: border-box; }
html { background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body { margin: 0; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; padding-top: 1rem; border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
a { color: var(--link); }
li { margin: .2rem 0; max-width: 70rem; overflow-wrap: anywhere; }
nav ul { padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td { max-width: 46rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
tbody th { white-space: normal; min-width: 8rem; max-width: 15rem; }
tr.reference th, tr.reference td { color: var(--soft); font-weight: 400; font-style: italic; }
#environment td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr));
  gap: 1rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; min-width: 30rem; max-width: 42rem; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important; }
figcaption, summary { color: var(--soft); font-size: .9rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  th:first-child { min-width: 6rem; max-width: 9rem; } }
"""
