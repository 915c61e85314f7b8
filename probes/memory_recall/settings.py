"""Settings of the study; their defaults stand in config.toml."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the study is run with."""

    num_questions: int
    """Facts that are asked, each without notes, with notes that hold the answer and with notes that do not."""
    num_notes: int
    """Facts that the notes state."""
    num_deleted: int
    """Of those facts, how many are deleted one by one."""
    num_addresses: int
    """Addresses of each block that are masked to delete one fact."""
    num_edited: int
    """Facts that are given another answer, in the first block with a memory; 0 leaves editing out."""
    num_resamplings: int
    """Permutations of each null and redraws of each interval."""
    batch_size: int
    """Prompts per forward pass; does not change the result."""

    def __post_init__(self) -> None:
        for name in ("num_addresses", "num_resamplings", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_questions", "num_notes", "num_deleted"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 2")
        if self.num_edited < 0 or self.num_edited == 1:
            raise ValueError(f"num_edited={self.num_edited} must be 0 or at least 2")
        if self.num_deleted > self.num_questions:
            raise ValueError(
                f"num_deleted={self.num_deleted} must be at most num_questions={self.num_questions}"
            )
