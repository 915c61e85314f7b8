"""Settings of the study; their defaults stand in config.toml."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the study is run with."""

    num_problems: int
    """Problems of each kind; of those that the model solves, every second one chooses a slot, the others test it."""
    most_tokens: int
    """Longest problem, tokens."""
    least_share: float
    """What counts as holding a premise: patched, the slot moves the answer further than this share of the way."""
    num_resamplings: int
    """Permutations of each null and redraws of each interval."""
    batch_size: int
    """Problems per forward pass; does not change the result."""

    def __post_init__(self) -> None:
        for name in ("num_resamplings", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_problems < 4:
            raise ValueError(f"num_problems={self.num_problems} must be at least 4")
        if self.most_tokens < 64:
            raise ValueError(f"most_tokens={self.most_tokens} must be at least 64, or few problems fit")
        if not 0 <= self.least_share < 1:
            raise ValueError(f"least_share={self.least_share} must lie between 0 and 1")
