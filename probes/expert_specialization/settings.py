"""Settings of the study."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = Path(__file__).with_name("config.toml")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the study is run with; the defaults stand in config.toml."""

    num_tokens: int
    """Tokens per sample."""
    samples_per_domain: int
    """Most samples per domain; every second one measures preference, the others causal effects."""
    num_resamplings: int
    """Permutations of each null and redraws of each interval."""
    num_controls: int
    """Random routers to compare with."""
    alpha: float
    """Level of the tests, after correction for their number."""
    batch_size: int
    """Samples per forward pass; does not change the result."""
    seed: int
    """Of permutations, redraws and random routers."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "samples_per_domain", "num_resamplings", "num_controls", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1")


def load_settings(path: Path = CONFIG_FILE, **overrides: object) -> Settings:
    """Settings from a TOML file; `overrides` that are not None win.

    Raises:
        ValueError: the file or an override has a wrong value or an unknown name.
    """
    with path.open("rb") as file:
        values = tomllib.load(file)
    values |= {name: value for name, value in overrides.items() if value is not None}
    unknown = set(values) - set(Settings.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
    return Settings(**values)
