"""Settings of the study."""

from dataclasses import dataclass


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
        least = {"num_samples": 2, "context": 1, "horizon": 8, "num_resamplings": 1, "batch_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
