"""One HTML page that a reader understands without the code: verdicts, findings, figures, limits, calibration."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from hydra_lab.figures.theme import counted, dark_equivalents
from hydra_lab.probing.calibrate import CalibrationRecord, Rate
from hydra_lab.probing.findings import Effect, Finding, StudyResult
from hydra_lab.probing.runner import StudyRun, corrected_together

LEVEL = 0.05
"""Corrected p-value up to which a finding is called shown."""

MOST_FIGURE_BYTES = 600_000
"""A larger figure is linked, not shown in the page."""

GLOSSARY = {
    "Shown": "the corrected p-value is at most 0.05: were there nothing, a report like this one would show even one "
    "such finding in at most 5 of 100 cases.",
    "Not shown": "the data do not rule out chance. That is no proof that there is nothing.",
    "Estimate and interval": "the size of what was measured, and the range of sizes that fit the data (95%).",
    "Null": "what would be true were there nothing to find; the estimate is compared with its value.",
    "p-value": "how often chance alone, under the null, gives an estimate at least as large.",
    "Corrected": "who tests many things finds something by luck. Holm's method raises every p-value so that the "
    "chance of even one false finding among all those tested together stays below 5%.",
    "Causal effect": "what changed when the part in question was removed, replaced or overwritten in the running "
    "model. Without one, a finding says what goes together, not what the model uses.",
    "Calibration": "the study was put to many small models whose truth is known. Power: how often it found what had "
    "been planted. False-positive rate: how often it claimed something where nothing was.",
    "n": "independent observations: texts or questions, not tokens, because the tokens of a text resemble each other.",
    "nat": "unit of loss and information; 0.69 nats are one bit. Loss is measured in nats per token: higher is worse.",
    "Block": "one layer of the model. Its paths run side by side: ssm (a running state), attention (looks back at "
    "earlier tokens), moe (experts), workspace (slots) and memory (a table of values).",
    "Expert": "one of several sub-networks of a block, chosen for a chunk of tokens by a router.",
}


def write_report(
    path: Path,
    runs: Sequence[StudyRun],
    *,
    calibrations: Mapping[str, CalibrationRecord],
    skipped: Mapping[str, str] | None = None,
    failed: Mapping[str, str] | None = None,
    outdated: Iterable[str] = (),
    figures_at: Mapping[str, str] | None = None,
) -> None:
    """Write the page of one study, or of several of one model with p-values corrected over all of them together.

    Args:
        path: of the page; it needs no other file and no network.
        runs: at least one.
        calibrations: by study.
        skipped, failed: study -> reason, for those that are missing.
        outdated: studies that have changed since they were calibrated.
        figures_at: study -> folder of its figures as seen from `path`, for those too large to be shown in the page.

    Raises:
        OSError: it cannot be written.
    """
    shown = corrected_together(runs) if len(runs) > 1 else tuple(runs)
    results = [run.result for run in shown]
    num_tests = sum(_num_tests(result) for result in results)
    first = results[0]
    title = first.question if len(results) == 1 else f"What {len(results)} studies found about {first.model}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>Model <b>{_text(first.model)}</b>; {counted(num_tests, 'test')}, corrected together; seeds "
        f"{', '.join(map(str, first.seeds))}; {sum(result.seconds for result in results) / 60:.1f} minutes. "
        '<a href="#glossary">What the words mean</a>.</p>',
    ]
    if len(results) > 1:
        parts.append(_summary(results))
    parts.append(_missing(skipped or {}, "was skipped"))
    parts.append(_missing(failed or {}, "FAILED", warn=True))
    for run, alone in zip(shown, runs, strict=True):
        record = calibrations.get(run.result.study)
        folder = (figures_at or {}).get(run.result.study, "figures")
        heading = "" if len(results) == 1 else f"<h2>{_text(run.result.question)}</h2>"
        is_outdated = run.result.study in set(outdated)
        parts.append(_study(run, alone.result, heading, record, is_outdated=is_outdated, folder=folder))
    parts.append(_glossary())
    parts.append(_environment(first.environment))
    path.write_text(_page(title, first.model, "\n".join(parts)), encoding="utf-8")


def verdict_in_a_sentence(result: StudyResult) -> str:
    """What to take away from a study: how much was shown, and the verdict of its leading finding."""
    tested = [finding for finding in result.findings if finding.p_value is not None]
    if not tested:
        return result.findings[0].verdict if result.findings else "Nothing could be measured."
    shown = [finding for finding in tested if finding.is_claimed(LEVEL)]
    if not shown:
        return f"Nothing is shown: of {counted(len(tested), 'finding')}, none stands out once all tests are counted."
    return f"{len(shown)} of {counted(len(tested), 'finding')} shown. {leading_finding(result).verdict}"


def leading_finding(result: StudyResult) -> Finding:
    """The finding that the summary quotes: shown and causal before shown before the rest, then the smallest p."""

    def order(finding: Finding) -> tuple[bool, bool, float]:
        causal = finding.causal
        p = finding.p_value if finding.p_corrected is None else finding.p_corrected
        return (
            not finding.is_claimed(LEVEL),
            causal is None or not causal.is_claimed(LEVEL),
            2.0 if p is None else p,
        )

    return min(result.findings, key=order)


def _num_tests(result: StudyResult) -> int:
    effects = [finding.causal for finding in result.findings if finding.causal is not None]
    return sum(each.p_value is not None for each in (*result.findings, *effects))


def _summary(results: Sequence[StudyResult]) -> str:
    rows: list[str] = []
    for result in results:
        link = f'<a href="#{_text(result.study)}">{_text(result.question)}</a>'
        if not result.findings:
            rows.append(_row(("Question", link, ""), ("Verdict", "Nothing could be measured.", "")))
            continue
        lead = leading_finding(result)
        rows.append(
            _row(
                ("Question", link, ""),
                ("Verdict", _badge(lead) + _text(verdict_in_a_sentence(result)), ""),
                ("Effect", _estimate(lead), "n"),
                ("p, corrected", _p_value(lead.p_value, lead.p_corrected), "n"),
                ("Causal effect", _effect(lead.causal), "n"),
            )
        )
    return "<h2>Summary</h2>" + _table(
        ("Question", "Verdict", "Effect", "p, corrected", "Causal effect"), rows
    )


def _missing(reasons: Mapping[str, str], said: str, *, warn: bool = False) -> str:
    if not reasons:
        return ""
    style = ' class="warning"' if warn else ""
    rows = (
        f"<li><span{style}>{_text(name)} {said}</span>: {_text(reason)}</li>"
        for name, reason in reasons.items()
    )
    return f"<ul>{''.join(rows)}</ul>"


def _study(
    run: StudyRun,
    alone: StudyResult,
    heading: str,
    record: CalibrationRecord | None,
    *,
    is_outdated: bool,
    folder: str,
) -> str:
    result = run.result
    any_shown = any(finding.is_claimed(LEVEL) for finding in result.findings)
    columns = ("Finding", "Verdict", "Estimate", "p, corrected", "n", "Causal effect")
    own = {finding.name: finding for finding in alone.findings}
    rows = [_finding(finding, own[finding.name]) for finding in result.findings]
    notes = "".join(f"<li>{_text(note)}</li>" for note in result.notes)
    settings = ", ".join(f"{name} = {value}" for name, value in result.settings.items())
    return f"""<section class="study" id="{_text(result.study)}">
{heading}
<p class="answer{"" if any_shown else " no"}">{_text(verdict_in_a_sentence(result))}</p>
<dl>
<dt>Claim to test</dt><dd>{_text(result.claim)}</dd>
<dt>Were there nothing</dt><dd>{_text(result.null)}</dd>
<dt>Causal check</dt><dd>{_text(result.causal_check)}</dd>
<dt>Is the study right?</dt><dd>{_calibration(record, is_outdated)}</dd>
<dt>Run</dt><dd>seeds {", ".join(map(str, result.seeds))}; {result.seconds:.0f} s; {_text(settings)}</dd>
</dl>
<h3>Findings</h3>
{_table(columns, rows)}
{_figures(run, folder)}
{f"<h3>Limits and remarks</h3><ul>{notes}</ul>" if notes else ""}
</section>"""


def _finding(finding: Finding, alone: Finding) -> str:
    p = _p_value(finding.p_value, finding.p_corrected)
    if finding.p_corrected != alone.p_corrected and alone.p_corrected is not None:
        p += f"<small>over this study alone: {_p(alone.p_corrected)}</small>"
    null = f"<small>null: {_text(finding.null)} ({_size(finding.null_value)})</small>"
    return _row(
        ("", f"<b>{_text(finding.name)}</b>", ""),
        ("", _badge(finding) + _text(finding.verdict), ""),
        ("Estimate", _estimate(finding) + null, "n"),
        ("p, corrected", p, "n"),
        ("n", f"{finding.n:,} <small>{_text(finding.n_unit)}</small>", "n"),
        ("Causal effect", _effect(finding.causal), "n"),
    )


def _badge(finding: Finding) -> str:
    if finding.p_value is None:
        return '<span class="badge">measured</span> '
    if finding.is_claimed(LEVEL):
        return '<span class="badge yes">shown</span> '
    if finding.p_value <= LEVEL:
        return '<span class="badge">not shown once all tests are counted</span> '
    return '<span class="badge">not shown</span> '


def _estimate(finding: Finding) -> str:
    return (
        f"<b>{_size(finding.estimate)} {_text(finding.unit)}</b><small>{_interval(finding.interval)}</small>"
    )


def _effect(effect: Effect | None) -> str:
    if effect is None:
        return '<span class="muted">none measured</span>'
    p = "" if effect.p_value is None else f", p {_p_value(effect.p_value, effect.p_corrected)}"
    return (
        f"<b>{_size(effect.estimate)} {_text(effect.unit)}</b>"
        f"<small>{_interval(effect.interval)}{p}<br>{_text(effect.description)}</small>"
    )


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return "" if math.isnan(low) or math.isnan(high) else f"{_size(low)} to {_size(high)}"


def _p_value(p: float | None, p_corrected: float | None) -> str:
    if p is None:
        return '<span class="muted">not tested</span>'
    return _p(p if p_corrected is None else p_corrected)


def _p(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"{p:.3f}"


def _size(value: float) -> str:
    """A number in three digits."""
    if math.isnan(value):
        return "unknown"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _calibration(record: CalibrationRecord | None, is_outdated: bool) -> str:
    power, rate = (None, None) if record is None else (record.power, record.false_positive_rate)
    if record is None or power is None or rate is None:
        return "Not calibrated yet (<code>hydra-lab probe calibrate</code>)."
    failed = "" if record.passed else ' <span class="warning">It failed its calibration.</span>'
    old = ' <span class="warning">It has changed since.</span>' if is_outdated else ""
    return (
        f"Found what was planted in {_rate(power)} models ({_text(record.planted)}), and claimed something in "
        f"{_rate(rate)} without structure ({_text(record.absent)}; stated level: 5%). "
        f"One case: {_text(record.sample_size)}.{failed}{old}"
    )


def _rate(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.count} of {rate.n} ({100 * rate.estimate:.1f}%, interval {100 * low:.1f} to {100 * high:.1f}%)"


def _figures(run: StudyRun, folder: str) -> str:
    if not run.figures:
        return ""
    parts = ["<h3>Figures</h3>"]
    if len(run.result.seeds) > 1:
        parts.append(f"<p><small>Of seed {run.result.seeds[0]}.</small></p>")
    for name, figure in run.figures.items():
        parts.append(
            _figure(f"{run.result.study}-{name}", name.replace("_", " "), figure, f"{folder}/{name}.html")
        )
    return "\n".join(parts)


def _figure(identifier: str, name: str, figure: go.Figure, link: str) -> str:
    text = str(figure.to_json()).replace("</", "<\\/")
    if len(text) > MOST_FIGURE_BYTES:
        return f'<p>Too large for this page ({len(text) / 1e6:.1f} MB): <a href="{_text(link)}">{_text(name)}</a></p>'
    height = figure["layout"]["height"] or 450
    identifier = _text(identifier)
    return (
        f'<div class="figure"><div data-figure="{identifier}" role="img" aria-label="{_text(name)}" '
        f'style="height:{height}px"></div></div>'
        f'<script type="application/json" id="{identifier}">{text}</script>'
    )


def _glossary() -> str:
    entries = "".join(f"<dt>{_text(word)}</dt><dd>{_text(said)}</dd>" for word, said in GLOSSARY.items())
    return f'<section class="study" id="glossary"><h2>What the words mean</h2><dl>{entries}</dl></section>'


def _environment(environment: dict[str, Any]) -> str:
    if not environment:
        return ""
    return f"<details><summary>Made with</summary><pre>{_text(json.dumps(environment, indent=1))}</pre></details>"


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(*cells: tuple[str, str, str]) -> str:
    """A row of (label on a narrow screen, HTML, class)."""
    parts: list[str] = []
    for label, content, style in cells:
        attributes = (f' class="{style}"' if style else "") + (
            f' data-label="{_text(label)}"' if label else ""
        )
        parts.append(f"<td{attributes}>{content}</td>")
    return f"<tr>{''.join(parts)}</tr>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _page(title: str, model: str, body: str) -> str:
    beside = Path(__file__).parent
    has_figures = "data-figure" in body
    scripts = ""
    if has_figures:
        script = (beside / "page.js").read_text(encoding="utf-8")
        equivalents = json.dumps(dark_equivalents())
        scripts = (
            f'<script type="application/json" id="dark-equivalents">{equivalents}</script>\n'
            f"<script>{get_plotlyjs()}</script>\n<script>\n{script}</script>"
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)} ({_text(model)})</title>
<style>
{(beside / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
{body}
{scripts}
</body>
</html>
"""
