"""The study's results as files: result.json and a one-page report.html."""

import base64
import html
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hydra_lab import metrics
from probes.expert_specialization.analysis import Association, Causation, Control, clearest
from probes.expert_specialization.settings import Settings

_MOST_PREFERENCES = 4
_SHOWN = ("information", "by_domain", "causal", "agreement")


def result(
    model_name: str,
    settings: Settings,
    association: Association,
    controls: Control,
    causation: Causation,
    use: metrics.PathUse,
    verdicts: tuple[str, ...],
) -> dict[str, Any]:
    """Everything that was found, as plain lists and numbers; axes are named beside the arrays."""
    blocks = [
        {
            "block": layer,
            "verdict": verdicts[y],
            "share_of_update": use.share_of("moe", layer),
            "domain_information": _test(association.domain_tests[y], association.domain_holm[y]),
            "token_class_information_given_domain": _test(
                association.class_tests[y], association.class_holm[y]
            ),
            "random_routers": controls.corrected[:, y].tolist(),
            "causal_rank_correlation": _number(causation.agreement[y]),
            "causal_p_holm": float(causation.agreement_holm[y]),
            "experts_costliest_where_preferred": int(causation.matches[y]),
            "experts_in_use": int(causation.num_used[y]),
        }
        for y, layer in enumerate(association.layers)
    ]
    return {
        "study": "expert_specialization",
        "model": model_name,
        "settings": asdict(settings),
        "units": {"information": "nats", "loss_increase": "nats per token", "share": "0..1"},
        "corrections": {
            "information": f"Holm over {2 * len(blocks)} tests",
            "cells": "Benjamini-Hochberg over all cells of a table",
            "causal": f"Holm over {len(blocks)} blocks",
        },
        "domains": list(association.domains),
        "token_classes": list(association.classes),
        "samples_per_domain": association.num_samples.tolist(),
        "blocks": blocks,
        "domain_preferences": _preferences(
            association, settings, association.domain_share, association.domain_adjusted, association.domains
        ),
        "token_class_preferences": _preferences(
            association, settings, association.class_share, association.class_adjusted, association.classes
        ),
        "expert_by_domain": {
            "axes": ["block", "domain", "expert"],
            "share": association.domain_share.tolist(),
            "p_adjusted": association.domain_adjusted.tolist(),
        },
        "expert_by_token_class": {
            "axes": ["block", "token_class", "expert"],
            "share": association.class_share.tolist(),
            "p_adjusted": association.class_adjusted.tolist(),
        },
        "ablation": {
            "axes": ["block", "expert", "domain"],
            "preference": causation.preference.tolist(),
            "loss_increase": causation.increase.tolist(),
            "interval_95": causation.interval.tolist(),
            "samples_per_domain": causation.num_samples.tolist(),
        },
        "path_use": use.to_dict(),
    }


def _preferences(
    association: Association, settings: Settings, share: Any, adjusted: Any, names: tuple[str, ...]
) -> list[dict[str, Any]]:
    return [
        asdict(each) for each in clearest(share, adjusted, names, association.layers, alpha=settings.alpha)
    ]


def _test(test: metrics.InformationTest, holm: float) -> dict[str, Any]:
    return {
        "plug_in": test.value,
        "corrected": test.corrected,
        "interval_95": list(test.interval),
        "null_mean": float(test.null.mean()),
        "null_95": float(np.quantile(test.null, 0.95)),
        "p": test.p_value,
        "p_holm": float(holm),
        "samples": test.num_samples,
        "observations": test.num_observations,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def write_json(found: dict[str, Any], path: Path) -> None:
    """Writes `found` to `path`."""
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_report(
    found: dict[str, Any], html_paths: Mapping[str, Path], png_paths: Mapping[str, Path], path: Path
) -> None:
    """Writes the one-page report.

    Args:
        found: of `result`.
        html_paths: interactive figure by name, beside the report.
        png_paths: images by name; empty where none could be drawn, and then the report shows the interactive
            ones.
    """
    rows = "".join(
        _row(block, found["domain_preferences"], found["token_class_preferences"])
        for block in found["blocks"]
    )
    shown = "".join(_figure(name, html_paths, png_paths) for name in _SHOWN)
    others = ", ".join(
        f'<a href="figures/{name}.html">{name.replace("_", " ")}</a>'
        for name in html_paths
        if name not in _SHOWN
    )
    settings = found["settings"]
    counts = sorted(set(found["samples_per_domain"]))
    count = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Expert specialization: {html.escape(found["model"])}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color:
#1b1f24; background: #fff; }} table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
th, td {{ text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #d0d7de; vertical-align: top; }}
td:nth-child(2) {{ min-width: 17rem; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem; margin: 1rem
0; }} .grid img, .grid iframe {{ width: 100%; border: 1px solid #d0d7de; }}
.grid iframe {{ height: 30rem; }}
small {{ color: #57606a; }}
</style>
<h1>Which expert prefers which domain, and does it matter?</h1>
<p>Model <b>{html.escape(found["model"])}</b>; {sum(found["samples_per_domain"])} held-out samples of up to
{settings["num_tokens"]} tokens ({count} per domain), {len(found["domains"])} domains.</p>
<table>
<tr><th>block</th><th>verdict</th><th>share of update</th><th>information about the domain (nats), 95%
interval</th> <th>p (Holm)</th><th>best of {settings["num_controls"]} random routers</th><th>token class given
domain (nats), p</th> <th>rank correlation of preference and cost, p</th><th>costliest where
preferred</th></tr> {rows}
</table>
<div class="grid">{shown}</div>
<p>More figures: {others}. All numbers: <a href="result.json">result.json</a>.</p>
<small>
<p><b>Correlational.</b> Mutual information of a chunk's first expert and its sample's domain, less the mean
of its null ({settings["num_resamplings"]} permutations of whole samples, since the chunks of a sample
resemble each other); bootstrap interval over samples. Token class: conditional on the domain, whole
samples permuted within it. p-values: {found["corrections"]["information"]}; stars in the tables:
{found["corrections"]["cells"]}; level {settings["alpha"]}.</p>
<p><b>Control.</b> The same model with its routers' weights redrawn at random: what routing by any linear map
of the hidden states would show. A trained router must separate the domains better than each of them.</p>
<p><b>Causal.</b> Each expert is removed (its weight written to 0 at the routing tap) and the loss measured by
domain, on samples that the preferences were not measured on. Rank correlation over experts and domains,
domains permuted over samples, {found["corrections"]["causal"]}.</p>
<p><b>Limits.</b> Domains differ in their tokens, so an expert that follows tokens follows domains. Removing
an expert does not let the router choose another. A path that the model hardly uses is called idle whatever
its routing shows.</p> </small>
""",
        encoding="utf-8",
    )


def _row(block: dict[str, Any], domains: list[dict[str, Any]], classes: list[dict[str, Any]]) -> str:
    domain, token = block["domain_information"], block["token_class_information_given_domain"]
    low, high = domain["interval_95"]
    correlation = block["causal_rank_correlation"]
    cells = [
        f"{100 * block['share_of_update']:.0f}%",
        f"{domain['corrected']:.3f} ({low:.3f} to {high:.3f})",
        f"{domain['p_holm']:.4f}",
        f"{max(block['random_routers']):.3f}",
        f"{token['corrected']:.3f}, {token['p_holm']:.4f}",
        "none" if correlation is None else f"{correlation:.2f}, {block['causal_p_holm']:.4f}",
        f"{block['experts_costliest_where_preferred']} of {block['experts_in_use']}",
    ]
    said = html.escape(block["verdict"])
    for heading, found in (("domains", domains), ("token classes", classes)):
        of_block = [each for each in found if each["layer"] == block["block"]][:_MOST_PREFERENCES]
        if of_block:
            listed = "; ".join(
                f"{each['name']}: expert {each['expert']} ({100 * each['share']:.0f}%, {each['ratio']:.1f}x)"
                for each in of_block
            )
            said += f"<br><small>clearest {heading}: {html.escape(listed)}</small>"
    return (
        f"<tr><td>{block['block']}</td><td>{said}</td>"
        + "".join(f'<td class="n">{cell}</td>' for cell in cells)
        + "</tr>\n"
    )


def _figure(name: str, html_paths: Mapping[str, Path], png_paths: Mapping[str, Path]) -> str:
    link = f"figures/{html_paths[name].name}"
    if name not in png_paths:
        return f'<iframe src="{link}" title="{name}"></iframe>'
    image = base64.b64encode(png_paths[name].read_bytes()).decode()
    alt = name.replace("_", " ")
    return f'<a href="{link}"><img alt="{alt}" src="data:image/png;base64,{image}"></a>'
