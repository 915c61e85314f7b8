"""The files that say what to install agree with each other, and importing the library stays light."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import hydra_lab

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PUBLIC = ("HydraConfig", "HydraForCausalLM", "HydraLens", "HydraModel", "load", "open_capture", "record")
ON_A_CPU = set(EXTRAS) - {"gpu"}


def constraints() -> dict[str, str]:
    """Pinned versions by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def environment() -> tuple[str, list[str]]:
    """The Python requirement and the pip lines of environment.yml."""
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = next(
        line for line in content["dependencies"] if isinstance(line, str) and line.startswith("python")
    )
    (pip,) = [line["pip"] for line in content["dependencies"] if isinstance(line, dict)]
    return python.removeprefix("python"), pip


def make_variable(name: str) -> str:
    found = re.search(rf"^{name} :?\??= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"Makefile sets no {name}"
    return found[1]


def test_make_installs_every_extra_that_a_cpu_can_use() -> None:
    assert set(make_variable("EXTRAS").split(",")) == ON_A_CPU


def test_conda_environment_installs_the_same_extras_under_the_same_pins() -> None:
    python, pip = environment()
    assert "-c constraints.txt" in pip
    (line,) = [line for line in pip if line.startswith("-e ")]
    found = re.fullmatch(r"-e \.\[(.*)\]", line)
    assert found, line
    assert set(found[1].split(",")) == ON_A_CPU
    assert len(pip) == 2, "what pip installs belongs into an extra of pyproject.toml"
    supported = SpecifierSet(PROJECT["requires-python"])
    for version in ("3.11", "3.12", "3.13"):
        assert version in SpecifierSet(python) and version in supported
    assert "3.10" not in SpecifierSet(python) and "3.10" not in supported


@pytest.mark.parametrize("part", ["dependencies", *sorted(ON_A_CPU)])
def test_every_requirement_is_pinned_to_a_version_it_allows(part: str) -> None:
    pins = constraints()
    for line in PROJECT["dependencies"] if part == "dependencies" else EXTRAS[part]:
        requirement = Requirement(line)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}; run make constraints"
        assert pin in requirement.specifier, f"{requirement} excludes the pinned {pin}"


def test_pins_name_versions_only() -> None:
    for name, version in constraints().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"


def test_versions_agree() -> None:
    assert hydra_lab.__version__ == PROJECT["version"]


def test_every_public_name_is_there() -> None:
    for name in (
        "load",
        "record",
        "open_capture",
        "HydraLens",
        "HydraConfig",
        "HydraModel",
        "HydraForCausalLM",
    ):
        assert name in dir(hydra_lab)
        assert getattr(hydra_lab, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hydra_lab.no_such_name


LOADED = """
import sys
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
before = set(sys.modules)
{code}
heavy = {{"triton", "nnsight", "plotly", "streamlit", "xarray", "zarr", "accelerate", "mamba_ssm", "pandas", "sklearn"}}
print(",".join(sorted(heavy & (set(sys.modules) - before))))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import hydra_lab; from transformers import AutoConfig; AutoConfig.for_model('hydra')",
        "import hydra_lab.cli",
    ],
)
def test_import_is_light_and_registers_the_model(code: str) -> None:
    """Beyond what transformers' own base classes load (torch's compiler among it, which loads triton where that is
    installed), `import hydra_lab` loads none of the lab's libraries."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(code=code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def imported(path: Path) -> set[str]:
    """Top-level names that a source file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ["dashboards", "notebooks", "probes"])
def test_dashboards_notebooks_and_probes_never_import_each_other(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    others = {"dashboards", "notebooks", "probes"} - {folder}
    if folder != "dashboards":
        others.add("streamlit")
    for source in sources:
        assert not imported(source) & others, source
