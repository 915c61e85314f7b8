"""Settings of the study."""

from dataclasses import dataclass

from hydra_lab.probing.settings import check_at_least


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the study is run with; the defaults stand in config.toml."""

    num_samples: int
    """Texts, spread evenly over the domains; in each, one token is replaced."""
    context: int
    """Tokens before the replaced one."""
    horizon: int
    """Tokens after it, over which the change is followed."""
    num_resamplings: int
    """Permutations of each null and redraws of each interval."""
    batch_size: int
    """Texts per forward pass; does not change the result."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "context", "num_resamplings", "batch_size")
        check_at_least(self, 2, "num_samples")
        check_at_least(self, 8, "horizon")
