"""The table and the picture of the records, for `speedrun/README.md`."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev

from neobert.benchmark.loss_axis import build_axis
from neobert.benchmark.speedrun_records import RankedRecord, SpeedRecord, load_records, rank_records
from neobert.benchmark.speedrun_tracks import TRACKS, SpeedrunError
from neobert.disk import write_text

BEGIN, END = "<!-- written by neobert speedrun table -->", "<!-- end of the table -->"

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 240, 70, 30, 44, 46

_STYLE = """<style>
text { fill: #1f2328; font: 11px sans-serif; } .title { font-size: 14px; font-weight: bold; }
.grid { stroke: #d8dee4; } .goal { stroke: #9a6700; stroke-dasharray: 5 4; } .goal-label { fill: #9a6700; }
.line { stroke: #0969da; fill: none; stroke-width: 2; } .bar { stroke: #0969da; }
.dot { fill: #0969da; stroke: #0969da; }
.seed { fill: #0969da; fill-opacity: 0.35; } .no { fill: none; stroke: #8c959f; } .page { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .grid { stroke: #30363d; } .goal { stroke: #d29922; } .goal-label { fill: #d29922; }
.line, .bar { stroke: #58a6ff; } .dot { fill: #58a6ff; stroke: #58a6ff; } .seed { fill: #58a6ff; }
.page { fill: #0d1117; }
}
</style>"""


def write_table(home: Path) -> str:
    """Writes the table into `speedrun/README.md` and the picture `records.svg`; returns the table.

    Raises:
        SpeedrunError: a record is damaged, or the page has no markers.
    """
    groups = rank_records(load_records(home))
    table = describe_records(groups)
    page = home / "README.md"
    write_text(page, replace_table(page, table))
    write_text(home / "records.svg", draw_records(groups))
    return table


def replace_table(page: Path, table: str) -> str:
    """The text of a page with another table between the markers."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SpeedrunError(f"{page}: needs the lines {BEGIN} and {END}; the table is written between them")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def describe_records(groups: Mapping[tuple[str, str, str], Sequence[RankedRecord]]) -> str:
    """One table in Markdown for each track and data."""
    parts = [line for group in groups.values() for line in _describe_group(group)]
    return "\n".join(parts).strip() or "No record was set yet."


def _describe_group(group: Sequence[RankedRecord]) -> list[str]:
    first = group[0].record
    return [
        f"**{first.track}** on {first.data}",
        "",
        "| # | record | what is new | held-out loss | n | against the one before | steps | tokens | seconds | GFLOP/s "
        "fp32, bf16 | CPU or GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *_number_rows(group),
        "",
    ]


def _number_rows(group: Sequence[RankedRecord]) -> list[str]:
    rows, number = [], 0
    for ranked in group:
        number += ranked.problem is None
        rows.append(_describe_row("-" if ranked.problem else str(number), ranked))
    return rows


def _describe_row(number: str, ranked: RankedRecord) -> str:
    record = ranked.record
    link = f"[{ranked.name}](records/{ranked.name}/record.json)"
    idea = " ".join(record.idea.split()).replace("|", "\\|")  # One cell.
    verdict = [] if ranked.problem is None else [f"no record: {ranked.problem}"]
    if not record.runs:
        return f"| {number} | {link} | {idea} | | 0 | {verdict[0]} | {record.num_steps:,} | | | | |"
    if ranked.comparison is not None:
        verdict.insert(0, _describe_comparison(ranked))
    rates = [mean(run.gemm_flops[name] for run in record.runs) / 1e9 for name in ("fp32", "bf16")]
    tokens = mean(run.num_tokens for run in record.runs)
    slowest = max(run.seconds for run in record.runs)
    machine = record.environment["cpu" if record.environment["device"] == "cpu" else "device"]
    return (
        f"| {number} | {link} | {idea} | {_describe_loss(record)} | {len(record.runs)} | {'; '.join(verdict)} | "
        f"{record.num_steps:,} | {tokens:,.0f} | {slowest:,.0f} | {rates[0]:,.0f}, {rates[1]:,.0f} | {machine} |"
    )


def _describe_loss(record: SpeedRecord) -> str:
    summary = record.summarize()
    spread = "" if summary["std"] is None else f" ± {summary['std']:.4f}"
    return f"{summary['mean']:.4f}{spread}"


def _describe_comparison(ranked: RankedRecord) -> str:
    comparison = ranked.comparison
    assert comparison is not None
    test = "paired" if comparison.paired else "Welch"
    p = "p unknown" if comparison.p is None else f"p = {comparison.p:.2g}"
    return f"{comparison.difference:+.4f}, {p} ({test})"


# ---- the picture ----


def draw_records(groups: Mapping[tuple[str, str, str], Sequence[RankedRecord]]) -> str:
    """A panel for each track and data, as SVG for light and dark pages: held-out loss by number of the attempt.

    A dot is the mean of a record, its bar one standard deviation, small dots are its seeds; a ring is no record.
    """
    panels = [group for group in groups.values() if any(x.record.runs for x in group)]
    height = max(1, len(panels)) * _PANEL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">',
        _STYLE,
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
    ]
    if not panels:
        parts.append(f'<text x="{_WIDTH / 2}" y="{_PANEL / 2}" text-anchor="middle">No record was set yet.</text>')
    for number, group in enumerate(panels):
        parts += [f'<g transform="translate(0 {number * _PANEL})">', *_draw_panel(group), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_panel(group: Sequence[RankedRecord]) -> list[str]:
    made = [x for x in group if x.record.runs]
    track = TRACKS[made[0].record.track]
    losses = [loss for x in made for loss in x.record.losses.values()] + (
        [track.goal] if track.goal is not None else []
    )
    bottom = _PANEL - _BOTTOM
    to_y = build_axis(losses, bottom, _TOP)

    def to_x(number: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (number + 0.5) / len(made)

    title = f"{track.name} on {made[0].record.data}: held-out loss, nats per masked token"
    parts = [f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>']
    for y, value in to_y.ticks(5):
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    if track.goal is not None:
        y = to_y(track.goal)
        parts.append(f'<line class="goal" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="goal-label" x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">goal</text>')
    best = [(to_x(n), to_y(mean(x.record.losses.values()))) for n, x in enumerate(made) if x.problem is None]
    if len(best) > 1:
        parts.append(f'<path class="line" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in best)}"/>')
    for number, ranked in enumerate(made):
        parts += _draw_record(ranked, to_x(number), [to_y(loss) for loss in ranked.record.losses.values()], bottom + 18)
    return parts


def _draw_record(ranked: RankedRecord, x: float, ys: Sequence[float], label_y: float) -> list[str]:
    y, summary = mean(ys), ranked.record.summarize()
    parts = [f'<circle class="seed" cx="{x:.1f}" cy="{one:.1f}" r="2"/>' for one in ys]
    if summary["std"]:
        half = stdev(ys)
        parts.append(f'<line class="bar" x1="{x:.1f}" y1="{y - half:.1f}" x2="{x:.1f}" y2="{y + half:.1f}"/>')
    kind = "dot" if ranked.problem is None else "no"
    hover = escape(f"{ranked.name}: {_describe_loss(ranked.record)}. {ranked.record.idea}")
    parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{hover}</title></circle>')
    return [*parts, f'<text x="{x:.1f}" y="{label_y:.1f}" text-anchor="middle">{escape(ranked.name)}</text>']
