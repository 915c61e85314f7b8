"""Path use: how much of a block's update each path makes, and what the model loses without it.

A picture of a router's choices says nothing where the model ignores the experts, so every figure of a path's
decisions is drawn beside this result. The class lives below `capture` and `metrics` because both speak of it:
`hydra_lab.capture.path_use` measures it, `hydra_lab.metrics` and `hydra_lab.figures` read it.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IDLE_SHARE = 0.03
"""A path below this share of its block's update is idle there."""

IDLE_LOSS = 0.02
"""A path whose cut costs less than this in every domain (nats per token) is idle in the model."""


PATH_USE_FILE = "path_use.json"
"""Path use as it was measured for a model, in the model's directory."""


@dataclass(frozen=True, eq=False)
class PathUse:
    """Use of every path of a model on held-out text.

    Axes: Y blocks, P paths, Z domains.

    Attributes:
        layers: [Y] indices of the blocks.
        paths: [P] names of the paths.
        share: [Y, P] mean over tokens of |contribution_p| / sum_q |contribution_q|, in 0..1; NaN where the
            block lacks the path.
        cosine: [Y, P] mean over tokens of the cosine between the contribution and the block's whole update,
            -1..1; NaN where the block lacks the path.
        domains: [Z] names of the domains; empty where no path was cut, and then nothing is known of its cost.
        loss: [Z] mean loss of the untouched model, nats per predicted token.
        loss_increase: [P, Z] mean loss with the path cut in every block, minus `loss`; nats per predicted
            token.
        loss_increase_error: [P, Z] standard error of `loss_increase` over the samples (NaN for a single
            sample).
        num_samples: [Z] texts per domain.
        num_tokens: [Z] predicted tokens per domain.
    """

    layers: tuple[int, ...]
    paths: tuple[str, ...]
    share: NDArray[np.float64]
    cosine: NDArray[np.float64]
    domains: tuple[str, ...]
    loss: NDArray[np.float64]
    loss_increase: NDArray[np.float64]
    loss_increase_error: NDArray[np.float64]
    num_samples: NDArray[np.int64]
    num_tokens: NDArray[np.int64]

    def __post_init__(self) -> None:
        num_layers, num_paths, num_domains = len(self.layers), len(self.paths), len(self.domains)
        expected = {
            "share": (num_layers, num_paths),
            "cosine": (num_layers, num_paths),
            "loss": (num_domains,),
            "loss_increase": (num_paths, num_domains),
            "loss_increase_error": (num_paths, num_domains),
            "num_samples": (num_domains,),
            "num_tokens": (num_domains,),
        }
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape}")

    def share_of(self, path: str, layer: int) -> float:
        """Share of the update of block `layer` that `path` makes; NaN where the block lacks the path."""
        return float(self.share[self._layer(layer), self._path(path)])

    def cost_of(self, path: str) -> tuple[float, str]:
        """The largest loss increase when `path` is cut everywhere (nats per token), and the domain that pays
        it; NaN and "" where no cut was measured."""
        if not self.domains:
            return float("nan"), ""
        increase = self.loss_increase[self._path(path)]
        worst = int(np.argmax(increase))
        return float(increase[worst]), self.domains[worst]

    def layers_with(self, path: str) -> tuple[int, ...]:
        """The blocks that have `path`."""
        present = ~np.isnan(self.share[:, self._path(path)])
        return tuple(layer for layer, here in zip(self.layers, present, strict=True) if here)

    def is_idle(self, path: str, layer: int | None = None) -> bool:
        """Whether the model hardly uses `path`: cutting it costs less than `IDLE_LOSS` in every domain, or
        its share of the update is below `IDLE_SHARE` (in block `layer`, or, without one, in every block that
        has it)."""
        if self.cost_of(path)[0] < IDLE_LOSS:
            return True
        layers = self.layers_with(path) if layer is None else (layer,)
        return all(self.share_of(path, each) < IDLE_SHARE for each in layers)

    def describe(self, path: str, layer: int | None = None) -> str:
        """One line for a figure: the path's share and cost, and "IDLE" in front where the model hardly uses
        it."""
        layers = self.layers_with(path) if layer is None else (layer,)
        if not layers:
            raise ValueError(f"no block of this model has the path {path!r}")
        shares = [100 * self.share_of(path, each) for each in layers]
        low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
        share = f"{low}%" if low == high else f"{low} to {high}%"
        where = f"block {layer}'s update" if layer is not None else "its blocks' updates"
        cost, domain = self.cost_of(path)
        paid = f"cutting it everywhere costs up to {cost:.2f} nats/token ({domain})"
        text = f"{path}: {share} of {where}; {paid if domain else 'the cost of cutting it was not measured'}"
        return f"IDLE PATH, read with care. {text}" if self.is_idle(path, layer) else text

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; NaN becomes None."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PathUse":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, or has the wrong shape.
        """
        missing = {field.name for field in fields(cls)} - set(values)
        if missing:
            raise ValueError(f"path use lacks {', '.join(sorted(missing))}")
        floats = {
            name: np.array(values[name], dtype=np.float64)
            for name in ("share", "cosine", "loss", "loss_increase", "loss_increase_error")
        }
        return cls(
            layers=tuple(values["layers"]),
            paths=tuple(values["paths"]),
            domains=tuple(values["domains"]),
            num_samples=np.array(values["num_samples"], dtype=np.int64),
            num_tokens=np.array(values["num_tokens"], dtype=np.int64),
            **floats,
        )

    def _path(self, path: str) -> int:
        if path not in self.paths:
            raise ValueError(f"unknown path {path!r}; known: {', '.join(self.paths)}")
        return self.paths.index(path)

    def _layer(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"unknown block {layer!r}; known: {self.layers}")
        return self.layers.index(layer)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def read_path_use(directory: str | Path) -> PathUse:
    """The path use that was recorded for the model in `directory`.

    Raises:
        ValueError: none was recorded, or the file is damaged.
    """
    path = Path(directory) / PATH_USE_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: measure it with `hydra-lab info {directory} --text FILE --record`"
        )
    try:
        return PathUse.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is no path use: {error}") from None
