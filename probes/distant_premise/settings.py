"""Settings of the study."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra_lab.probing.settings import check_at_least


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
        check_at_least(self, 1, "num_resamplings")
        check_at_least(self, 2, "num_problems", "num_pairs", "num_questions")
        if self.num_questions > self.num_pairs:
            raise ValueError(f"num_questions={self.num_questions} must be at most num_pairs={self.num_pairs}")
        distances = list(self.distances)
        if not distances or distances[0] < 1 or distances != sorted(set(distances)):
            raise ValueError(f"distances={distances} must be rising whole numbers from 1 on")
