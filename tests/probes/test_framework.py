"""What all studies share: seeds are combined, settings read, results written and reported, calibrations kept."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from hydra_lab.cli import app
from hydra_lab.probing import (
    Effect,
    Finding,
    Outcome,
    Probe,
    Study,
    StudyResult,
    claims_anything,
    planted,
)
from hydra_lab.probing.calibrate import (
    CalibrationRecord,
    calibrate,
    clopper_pearson,
    read_calibrations,
    source_digest,
    write_calibrations,
)
from hydra_lab.probing.combine import combine, combined_p_value
from hydra_lab.probing.report import leading_finding, verdict_in_a_sentence, write_report
from hydra_lab.probing.runner import (
    StudyRun,
    corrected_together,
    find_calibration,
    find_study,
    run_studies,
    run_study,
    study_names,
    write_run,
)
from hydra_lab.probing.settings import parse_overrides, read_settings

ROOT = Path(__file__).resolve().parents[2]


def finding(name: str, p: float | None, estimate: float = 1.0, causal_p: float | None = None) -> Finding:
    effect = Effect(description="cut <it>", estimate=0.5, unit="nats", interval=(0.4, 0.6), p_value=causal_p)
    return Finding(
        name=name,
        estimate=estimate,
        unit="nats",
        interval=(estimate - 0.1, estimate + 0.1),
        null="nothing",
        null_value=0.0,
        n=12,
        n_unit="samples",
        verdict=f"{name} is {estimate}.",
        p_value=p,
        causal=None if causal_p is None else effect,
    )


# --- seeds --------------------------------------------------------------------------------------------------------


def test_findings_of_seeds_are_combined_by_their_stated_rule() -> None:
    runs = [[finding("a", p, estimate, p)] for p, estimate in ((0.01, 1.0), (0.02, 3.0), (0.4, 2.0))]
    (told,) = combine(runs)
    assert told.estimate == 2.0 and told.interval == (0.9, 3.1)
    assert told.p_value == pytest.approx(0.04)
    assert told.causal is not None and told.causal.p_value == pytest.approx(0.04)
    assert told.verdict == "a is 2.0."


def test_a_seed_that_reports_nothing_counts_against_the_finding() -> None:
    told = {each.name: each for each in combine([[finding("a", 0.01)], [finding("b", None)], []])}
    assert told["a"].p_value == 1.0
    assert told["b"].p_value is None


def test_the_combined_p_value_holds_its_level_whatever_the_dependence() -> None:
    """Twice the median is valid for equal, independent and opposite p-values alike."""
    rng = np.random.default_rng(0)
    uniform = rng.random((4000, 1))
    for seeds in (
        uniform.repeat(5, axis=1),
        rng.random((4000, 5)),
        np.concatenate([uniform.repeat(2, axis=1), 1 - uniform.repeat(3, axis=1)], axis=1),
        np.concatenate([uniform, 1 - uniform], axis=1),
    ):
        claimed = sum(combined_p_value(row.tolist()) <= 0.05 for row in seeds)
        assert binomtest(claimed, len(seeds), 0.05, alternative="greater").pvalue > 1e-3
    assert combined_p_value([0.03]) == 0.03


def test_a_claim_needs_a_test_that_survives_all_the_others() -> None:
    assert claims_anything([finding("a", 0.01)])
    assert claims_anything([finding("a", 0.9, causal_p=0.01)])
    assert not claims_anything([finding("a", 0.01), *(finding(str(n), 0.5) for n in range(5))])
    assert not claims_anything([finding("a", None)])


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my_study" / "config.toml"
    path.parent.mkdir()
    path.write_text('count = 3\nshare = 0.5\nname = "x"\ntasks = ["a", "b"]\nflag = true\n')
    return path


def test_settings_take_overrides_of_the_default_s_type(config: Path) -> None:
    words = parse_overrides(["count=7", "share=1", "name=y = z", 'tasks=["c"]', "flag=false"])
    assert read_settings(config, words) == {
        "count": 7,
        "share": 1.0,
        "name": "y = z",
        "tasks": ["c"],
        "flag": False,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["typo=1"], "my_study has no setting 'typo'; it has count, share"),
        (["count=1.5"], r"count=1.5 must be of the type of its default, 3"),
        (["count=true"], "count=true must be"),
        (["count=many"], "count=many must be"),
        (["count"], "written name=value, got 'count'"),
    ],
)
def test_wrong_settings_are_named(config: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(config, parse_overrides(words))


# --- a whole study, made up ----------------------------------------------------------------------------------------


def made_up(config: Path, needs: tuple[str, ...] = ()) -> Study:
    def run(probe: Probe, settings: dict[str, Any]) -> Outcome:
        return Outcome(
            findings=(
                finding("a", 0.001 * (1 + probe.seed), estimate=1.0 + probe.seed, causal_p=0.002),
                finding("b <i>", 0.03 + 0.001 * settings["count"]),
            ),
            figures={"a_figure": go.Figure(go.Scatter(y=[1, 2]), layout={"height": 321})},
            notes=("One & only.",),
            tables={"rows": [probe.seed]},
        )

    return Study(
        name="my-study",
        question="Is it <so>?",
        claim="It is.",
        null="It is not.",
        causal_check="Cut it.",
        run=run,
        config=config,
        needs=needs,
    )


@pytest.fixture(scope="module")
def probe() -> Probe:
    rng = np.random.default_rng(0)
    return Probe(
        model=planted.one_block_model(0, feature=planted.LETTERS, other=planted.DIGITS),
        tokenizer=planted.byte_tokenizer(),
        name="nano",
        samples=planted.letters_and_digits(rng, num_samples=8, num_chunks=2, purity=1.0),
        seed=3,
    )


def test_a_study_is_run_corrected_and_written(
    config: Path, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    run = run_study(made_up(config), probe, {"count": 3}, environment={"device": "cpu"})
    assert run.result.seeds == (3,) and run.result.tables == {"rows": [3]}
    assert [each.p_corrected for each in run.result.findings] == pytest.approx([0.008, 0.033])
    lines: list[str] = []
    write_run(run, tmp_path / "out", progress=lines.append)
    assert StudyResult.read(tmp_path / "out" / "result.json") == run.result
    assert (tmp_path / "out" / "figures" / "a_figure.html").is_file()
    assert any("NO PNG FILES WRITTEN" in line for line in lines)


def test_several_seeds_are_listed_and_combined(config: Path, probe: Probe) -> None:
    result = run_study(made_up(config), probe, {"count": 3}, num_seeds=3).result
    assert result.seeds == (3, 4, 5)
    assert result.findings[0].estimate == 5.0 and result.findings[0].interval == (3.9, 6.1)
    assert result.findings[0].p_value == pytest.approx(0.01)  # twice 0.001 * (1 + 4)
    assert list(result.tables["by_seed"]) == ["3", "4", "5"]
    assert result.notes == ("One & only.",)


def test_a_study_says_what_the_model_lacks(config: Path, probe: Probe) -> None:
    with pytest.raises(ValueError, match="my-study needs a model with memory and workspace"):
        run_study(made_up(config, ("moe", "memory", "workspace")), probe, {"count": 3})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run_study(made_up(config), probe, {"count": 3}, num_seeds=0)


def test_several_studies_are_corrected_together(config: Path, probe: Probe) -> None:
    runs = [run_study(made_up(config), probe, {"count": 3}) for _ in range(2)]
    together = [each.p_corrected for run in corrected_together(runs) for each in run.result.findings]
    assert together == pytest.approx([0.016, 0.066, 0.016, 0.066])  # 4, then 2 of 6 tests are left


# --- the report -----------------------------------------------------------------------------------------------------


def visible_text(page: str) -> str:
    body = re.sub(r"(?s)<(script|style).*?</\1>", "", page)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_the_report_needs_nothing_else_and_says_it_in_words(
    config: Path, probe: Probe, tmp_path: Path
) -> None:
    run = run_study(made_up(config), probe, {"count": 3}, environment={"device": "cpu"})
    record = CalibrationRecord(
        study="my-study", planted="a plant", absent="none", sample_size="12 samples", source="",
        missed=(4,), false_claims=(1, 2), num_planted=40, num_absent=40, environment={},
    )  # fmt: skip
    path = tmp_path / "report.html"
    write_report(path, [run], calibrations={"my-study": record}, outdated=["my-study"])
    page = path.read_text(encoding="utf-8")
    outside = page.replace(page[page.index("<script>") : page.rindex("</script>")], "")
    assert not re.search(r"""(src|href)=["'](?!#)""", outside)  # links to itself alone
    assert page.count("plotly.js v") == 1
    assert '"height":321' in page and "my-study-a_figure" in page
    text = visible_text(page)
    for words in (
        "Is it &lt;so&gt;?",
        "b &lt;i&gt;",
        "2 of 2 findings shown. a is 4.0.",
        "One &amp; only.",
        "39 of 40 (97.5%, interval 86.8 to 99.9%)",
        "2 of 40 (5.0%",
        "It has changed since.",
        "cut &lt;it&gt;",
        "What the words mean",
    ):
        assert words in text, words
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_the_report_of_several_studies_shows_what_is_missing(
    config: Path, probe: Probe, tmp_path: Path
) -> None:
    runs = [run_study(made_up(config), probe, {"count": 3}) for _ in range(2)]
    path = tmp_path / "report.html"
    write_report(path, runs, calibrations={}, skipped={"other": "no memory"}, failed={"third": "too few"})
    text = visible_text(path.read_text(encoding="utf-8"))
    assert "other was skipped : no memory" in text
    assert "third FAILED : too few" in text
    assert "not shown once all tests are counted" in text  # 0.033 x 2 of b
    assert "over this study alone: 0.033" in text
    assert "Not calibrated yet" in text


def test_a_large_figure_is_linked(config: Path, probe: Probe, tmp_path: Path) -> None:
    run = run_study(made_up(config), probe, {"count": 3})
    large = {"a_figure": go.Figure(go.Heatmap(z=np.random.default_rng(0).random((400, 400))))}
    path = tmp_path / "report.html"
    write_report(path, [StudyRun(result=run.result, figures=large)], calibrations={})
    page = path.read_text(encoding="utf-8")
    assert 'href="figures/a_figure.html"' in page and "my-study-a_figure" not in page


def test_what_a_summary_says(config: Path, probe: Probe) -> None:
    def result(*findings: Finding) -> StudyResult:
        return StudyResult(
            study="s", question="?", claim="", null="", causal_check="", model="m", settings={}, seeds=(0,),
            findings=findings,
        )  # fmt: skip

    assert "Nothing is shown: of 2 findings, none" in verdict_in_a_sentence(
        result(finding("a", 0.2), finding("b", 0.3))
    )
    assert verdict_in_a_sentence(result(finding("a", None))) == "a is 1.0."
    assert verdict_in_a_sentence(result()) == "Nothing could be measured."
    assert leading_finding(result(finding("a", 0.01), finding("b", 0.02, causal_p=0.01))).name == "b"
    assert leading_finding(result(finding("a", 0.3), finding("b", 0.02))).name == "b"


# --- calibrations ---------------------------------------------------------------------------------------------------


def test_clopper_pearson_is_scipy_s() -> None:
    for count, n in ((0, 20), (3, 20), (20, 20)):
        expected = binomtest(count, n).proportion_ci(0.95, "exact")
        assert clopper_pearson(count, n) == pytest.approx((expected.low, expected.high))


def record_of(**changes: Any) -> CalibrationRecord:
    values = {
        "study": "s", "planted": "p", "absent": "a", "sample_size": "n", "source": "x", "num_planted": 200,
        "num_absent": 200, "environment": {},
    }  # fmt: skip
    return CalibrationRecord(**{**values, **changes})


def test_the_pass_rule() -> None:
    assert record_of(missed=tuple(range(20)), false_claims=tuple(range(16))).passed
    assert not record_of(missed=tuple(range(21))).passed
    assert not record_of(false_claims=tuple(range(18))).passed  # its interval begins above 5%
    assert not record_of(num_absent=0).passed


def test_records_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    assert read_calibrations(path) == {}
    records = {"s": record_of(missed=(3,), false_claims=(1, 2))}
    write_calibrations(records, path)
    assert read_calibrations(path) == records
    assert json.loads(path.read_text())["studies"]["s"]["power"]["estimate"] == 0.995
    path.write_text('{"studies": {"s": {}}}')
    with pytest.raises(ValueError, match="is not a calibration: a calibration record lacks"):
        read_calibrations(path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one study whose claims follow from the seed alone."""
    folder = tmp_path / "checkout" / "probes" / "coin_toss"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("count = 1\n")
    (folder / "run.py").write_text("STUDY = None\n")
    (folder / "calibration.py").write_text(
        "from hydra_lab.probing import Calibration\n"
        "CALIBRATION = Calibration(planted='p', absent='a', sample_size='n',\n"
        "    finds_planted=lambda seed: seed != 2, claims_nothing_there=lambda seed: seed == 1)\n"
    )
    return tmp_path / "checkout"


def test_a_calibration_counts_goes_on_and_starts_anew(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setattr("hydra_lab.probing.runner.import_module", _import_from(checkout))
    monkeypatch.setattr("hydra_lab.probing.calibrate.ProcessPoolExecutor", _InThisProcess)
    path = tmp_path / "calibration.json"
    first = calibrate(checkout, ["coin-toss"], num_planted=4, num_absent=2, path=path)["coin-toss"]
    assert (first.missed, first.false_claims) == ((2,), (1,))
    lines: list[str] = []
    more = calibrate(checkout, ["coin-toss"], num_planted=6, num_absent=2, path=path, progress=lines.append)[
        "coin-toss"
    ]
    assert (more.num_planted, more.num_absent, more.missed) == (6, 2, (2,))
    assert not any("anew" in line for line in lines)
    (checkout / "probes" / "coin_toss" / "config.toml").write_text("count = 2\n")
    assert more.source != source_digest(checkout, "coin-toss")
    again = calibrate(checkout, ["coin-toss"], num_planted=1, num_absent=1, path=path, progress=lines.append)[
        "coin-toss"
    ]
    assert (again.num_planted, again.num_absent) == (1, 1)
    assert any("starts anew" in line for line in lines)
    with pytest.raises(ValueError, match="at least one case"):
        calibrate(checkout, ["coin-toss"], num_planted=0, path=path)


class _InThisProcess:
    """Stands in for a process pool: made-up studies live in no importable package."""

    def __init__(self, *_arguments: object, **_options: object) -> None: ...

    def __enter__(self) -> "_InThisProcess":
        return self

    def __exit__(self, *_error: object) -> None: ...

    def map(self, function: Any, cases: Any) -> Any:
        return map(function, cases)


def _import_from(checkout: Path) -> Any:
    import importlib.util

    def load(name: str) -> Any:
        path = checkout / Path(*name.split(".")).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(name.replace(".", "_"), path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# --- the studies that are there, and the command -------------------------------------------------------------------


@pytest.mark.parametrize("name", study_names(ROOT))
def test_every_study_is_complete(name: str) -> None:
    study = find_study(ROOT, name)
    assert read_settings(study.config)
    for text in (study.question, study.claim, study.null, study.causal_check):
        assert len(text) > 20
    assert find_calibration(ROOT, name).planted
    readme = (study.config.parent / "README.md").read_text(encoding="utf-8")
    for heading in ("Question", "Claim", "Limits", "Result on the shipped model"):
        assert f"**{heading}" in readme, f"{name}: its README has no {heading}"
    assert f"hydra-lab probe {name} demo" in readme


def test_unknown_studies_are_named() -> None:
    with pytest.raises(ValueError, match="no study 'nosuch': there are distant-premise, expert-ablation"):
        find_study(ROOT, "nosuch")


def test_a_setting_that_no_study_has_is_named() -> None:
    with pytest.raises(ValueError, match="no study has a setting 'typo'"):
        run_studies(ROOT, ["linear-probe"], "demo", overrides={"typo": "1"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch", "demo", "--out", "OUT"], "no study 'nosuch'"),
        (["linear-probe"], "a model and --out are needed"),
        (["linear-probe", "nosuch", "--out", "OUT"], "no model 'nosuch'"),
        (["linear-probe", "demo", "--out", "FILE"], "is not a directory"),
        (["linear-probe", "demo", "--out", "OUT", "--set", "typo=1"], "no study has a setting 'typo'"),
        (["linear-probe", "demo", "--out", "OUT", "--set", "ridge=much"], "ridge=much must be"),
        (["linear-probe", "demo", "--out", "OUT", "--seeds", "0"], "--seeds"),
        (["linear-probe", "demo", "--out", "OUT", "--set", 'tasks=["x"]'], "must name some of domain"),
        (["calibrate", "nosuch"], "no study 'nosuch'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {"OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    result = CliRunner().invoke(app, ["probe", *(places.get(word, word) for word in arguments)])
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("hydra-lab: ") and words in line


def test_the_studies_are_listed() -> None:
    result = CliRunner().invoke(app, ["probe", "list"])
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == study_names(ROOT)


@pytest.fixture(scope="module")
def without_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a model without experts, with its tokenizer and texts."""
    directory = tmp_path_factory.mktemp("model")
    model = planted.one_block_model(0, feature=planted.LETTERS, other=planted.DIGITS, moe_layers=[])
    model.save_pretrained(directory)
    tokenizer = planted.byte_tokenizer()
    tokenizer.save_pretrained(directory)
    samples = planted.letters_and_digits(np.random.default_rng(0), num_samples=24, num_chunks=4, purity=1.0)
    lines = (
        json.dumps({"text": tokenizer.decode(ids), "domain": domain})
        for ids, domain in zip(samples.tokens, samples.domains, strict=True)
    )
    (directory / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_all_runs_what_fits_and_says_what_does_not(
    without_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    monkeypatch.setattr(
        "hydra_lab.probing.runner.study_names", lambda _root: ["expert-ablation", "linear-probe"]
    )
    out = tmp_path / "out"
    settings = ['tasks=["domain"]', "every=8", "num_tokens=32", "num_permutations=199", "num_controls=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["probe", "all", str(without_experts), "--out", str(out), *words])
    assert result.exit_code == 0, result.output
    assert "linear-probe: 2 of 2 findings shown" in result.stdout
    assert "expert-ablation: skipped, the model has no block with moe" in result.stderr
    assert StudyResult.read(out / "linear-probe" / "result.json").environment["commit"]
    assert (out / "linear-probe" / "report.html").is_file()
    text = visible_text((out / "report.html").read_text(encoding="utf-8"))
    assert "expert-ablation was skipped : the model has no block with moe" in text


def test_a_study_that_fails_is_told_and_the_others_run(
    without_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_lab.probing.runner.study_names", lambda _root: ["linear-probe"])
    arguments = ["probe", "all", str(without_experts), "--out", str(tmp_path / "out"), "--set", "every=64"]
    result = CliRunner().invoke(app, [*arguments, "--set", "num_tokens=32"])
    assert result.exit_code == 2
    assert (
        "linear-probe: domain: needs different labels and samples of at least every=64 tokens"
        in result.stderr
    )
