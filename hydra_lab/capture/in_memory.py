"""One batch as a capture that lives in memory, for prompts: the same groups and arrays as on disk."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from hydra_lab.capture.layout import KINDS, chunk_size_of, layers_of, rows_of, signals_of, specs_of, taps_of
from hydra_lab.capture.record import record
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import PATHS


class InMemoryCapture(dict[str, xr.Dataset]):
    """Groups by name, as `hydra_lab.capture.layout` lists them.

    Attributes:
        attributes: `config` (of the model, as a dict) and `signals`.
        domains: [N] domain label of each sample.
        logits: [N, L, vocabulary] next-token logits; None unless they were asked for.
    """

    def __init__(
        self,
        groups: Mapping[str, xr.Dataset],
        attributes: dict[str, Any],
        domains: tuple[str, ...],
        logits: Tensor | None = None,
    ) -> None:
        super().__init__(groups)
        self.attributes = attributes
        self.domains = domains
        self.logits = logits

    def plain(self, group: str) -> xr.Dataset:
        """One group; as `self[group]`."""
        return self[group]


def capture_batch(
    model: HydraForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    domains: Sequence[str] | None = None,
    signals: Sequence[str] | None = None,
    keep_logits: bool = False,
) -> InMemoryCapture:
    """Record the decisions of `model` on one batch.

    Args:
        input_ids: [B, L] token ids, padded on the right.
        attention_mask: [B, L] nonzero where a token is present; None: all.
        domains: [B] labels; "text" unless given.
        signals: groups to capture besides `tokens`; None for those of `hydra_lab.capture.layout.SIGNALS` that the model
            has.
        keep_logits: keep the logits, which a large vocabulary makes larger than all decisions.

    Raises:
        ValueError: the batch is padded on the left, or an argument is wrong (see `record`).
    """
    if attention_mask is not None and not bool((attention_mask[:, :1] != 0).all()):
        raise ValueError("attention_mask pads on the left (or has an empty row); pad on the right")
    labels = tuple(domains) if domains is not None else ("text",) * len(input_ids)
    if len(labels) != len(input_ids):
        raise ValueError(f"{len(labels)} domains for {len(input_ids)} rows")
    config = model.config
    groups = signals_of(config, signals)
    specs = specs_of(config, groups, input_ids.shape[1], max(1, len(set(labels))))
    recording = record(
        model, input_ids, attention_mask, taps=taps_of(groups), contributions="paths" in groups
    )
    rows = rows_of(recording, input_ids, specs, config)
    datasets: dict[str, xr.Dataset] = {}
    for group, arrays in specs.items():
        variables = {
            name: (("sample", *spec.dims), rows[group, name])
            for name, spec in arrays.items()
            if (group, name) in rows
        }
        chunk_size = chunk_size_of(config, group)
        dataset = xr.Dataset(variables, attrs={} if chunk_size is None else {"chunk_size": chunk_size})
        if group != "tokens":
            dataset = dataset.assign_coords(layer=np.array(layers_of(config, group), dtype=np.int64))
        if "path" in dataset.dims:
            dataset = dataset.assign_coords(path=list(PATHS))
        if "kind" in dataset.dims:
            dataset = dataset.assign_coords(kind=list(KINDS))
        datasets[group] = dataset
    return InMemoryCapture(
        datasets,
        {"config": config.to_dict(), "signals": list(groups)},
        labels,
        recording.logits if keep_logits else None,
    )
