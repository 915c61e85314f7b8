"""Settings of the study."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the study is run with; the defaults stand in config.toml."""

    distances: Sequence[int]
    """Tokens from a random token to its repetition; even numbers."""
    block_distance: int
    """The one of them at which every block's paths are cut one by one."""
    num_sequences: int
    """Sequences at each distance, and recall problems."""
    repeat: int
    """Tokens that are repeated, an even number; at shorter distances as many as there are."""
    num_pairs: int
    """Pairs of a recall problem, each asked once."""
    num_resamplings: int
    """Permutations of each null and redraws of each interval."""
    batch_size: int
    """Sequences per forward pass; does not change the result."""

    def __post_init__(self) -> None:
        least = {"num_sequences": 2, "num_pairs": 2, "num_resamplings": 1, "batch_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        odd = [each for each in (*self.distances, self.repeat) if each < 2 or each % 2]
        if odd or not self.distances:
            raise ValueError(
                f"distances={list(self.distances)} and repeat={self.repeat} must be even numbers from 2 on"
            )
        if self.block_distance not in self.distances:
            raise ValueError(
                f"block_distance={self.block_distance} must be one of distances={list(self.distances)}"
            )
