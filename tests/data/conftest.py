"""A small corpus of real and generated text, built once."""

from pathlib import Path
from typing import Any

import pytest

from hydra_lab.data import build, natural, world


def build_small(out: Path, seed: int = 0) -> dict[str, Any]:
    """Seconds instead of minutes: no docstrings of packages, no plays, little text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(natural, "DOCUMENTED_PACKAGES", ())
        patch.setattr(natural, "_LARGEST_FILE", 10_000)
        patch.setattr(build, "_TOKENIZER_BYTES", {"natural": 400_000, "synthetic": 100_000})
        return build.build_corpus(
            out,
            seed,
            plays=False,
            synthetic_tokens=30_000,
            natural_bytes=300_000,
            held_out_bytes=30_000,
            progress=lambda line: None,
        )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    build_small(out)
    return out


@pytest.fixture(scope="session")
def places() -> world.World:
    return world.load_world()
