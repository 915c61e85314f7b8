"""Settings of the study."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the study is run with; the defaults stand in config.toml."""

    distances: Sequence[int]
    """Filler tokens between the pairs and the question, rising."""
    num_problems: int
    """Problems, which are read once to the largest distance; the independent observations."""
    num_pairs: int
    """Pairs of a problem."""
    num_questions: int
    """Pairs of each problem that are asked for at each distance, each alone."""
    num_resamplings: int
    """Permutations of each null and redraws of each interval."""

    def __post_init__(self) -> None:
        least = {"num_problems": 2, "num_pairs": 2, "num_questions": 2, "num_resamplings": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        if self.num_questions > self.num_pairs:
            raise ValueError(f"num_questions={self.num_questions} must be at most num_pairs={self.num_pairs}")
        distances = list(self.distances)
        if not distances or distances[0] < 1 or distances != sorted(set(distances)):
            raise ValueError(f"distances={distances} must be rising whole numbers from 1 on")
