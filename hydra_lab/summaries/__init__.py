"""Running summaries of a capture: additive counts, from which most metrics follow without the raw arrays.

A summary is a dict of groups (`tokens`, and those of the captured signals) of arrays by name. `summarize` makes it from
the rows of one commit, `merge` from two parts that follow each other:
`merge(summarize(first rows), summarize(next rows)) == summarize(all rows)`. Counts are int64 and exact; sums are
float64, and rounded as the order of the merges has it: merge in the order of the commits, one after the other, and the
result is the same to the bit.

`FIELDS[group][name]` says what an array holds, in which unit, over which axes, and how parts become one;
`AXES[group][name]` names the axes alone. Their sizes, for windows of L tokens:

    layer                    blocks that have the path, in order (`layers_of`)
    domain                   labels given to `summarize`, in their order
    length                   0 .. L tokens
    position_bin             bins between `position_edges(L)`
    chunk                    chunks of the group's chunk size
    expert, other_expert, slot, head, query_head, path, kind (of attention: window, sink, selected)
    row                      rows of the memory's value table
    token                    ids of the vocabulary
    window                   `WINDOWS`, lengths in tokens
    share                    steps 0, 1/1000, ..., 1 of a number between 0 and 1
    lag                      0 .. chunks - 1
    context                  places of a list of the best contexts (see `hydra_lab.summaries.fields.contexts_fields`)
    loss_bin, margin_bin, decay_bin, distance_bin
                             bins between `LOSS_EDGES`, `MARGIN_EDGES`, `DECAY_EDGES`, `distance_edges(L, block size)`

Only the groups are there whose rows are, and what is large is left out of models so large that it would not be bounded
(`FIELDS` says where). Numbers of samples, chunks, tokens and windows all follow from `tokens.length`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_lab.summaries import attention, memory, paths, routing, ssm, tokens, workspace
from hydra_lab.summaries.arrays import NUM_CONTEXTS as NUM_CONTEXTS
from hydra_lab.summaries.arrays import POSITION_BINS as POSITION_BINS
from hydra_lab.summaries.arrays import SHARE_STEPS as SHARE_STEPS
from hydra_lab.summaries.arrays import Batch, Samples
from hydra_lab.summaries.arrays import bin_edges as bin_edges
from hydra_lab.summaries.arrays import position_edges as position_edges
from hydra_lab.summaries.attention import distance_edges as distance_edges
from hydra_lab.summaries.fields import NO_SCORE as NO_SCORE
from hydra_lab.summaries.fields import Arrays, Fields, merge_arrays
from hydra_lab.summaries.fields import Field as Field
from hydra_lab.summaries.routing import MARGIN_EDGES as MARGIN_EDGES
from hydra_lab.summaries.routing import WINDOWS as WINDOWS
from hydra_lab.summaries.ssm import DECAY_EDGES as DECAY_EDGES
from hydra_lab.summaries.tokens import LOSS_EDGES as LOSS_EDGES
from hydra_lab.summaries.tokens import NO_SAMPLE as NO_SAMPLE

Summary = dict[str, Arrays]
"""Arrays by group and name."""

_GROUPS: dict[str, tuple[Fields, Callable[[Batch], Arrays]]] = {
    "tokens": (tokens.FIELDS, tokens.summarize),
    "routing": (routing.FIELDS, routing.summarize),
    "attention": (attention.FIELDS, attention.summarize),
    "mass": (attention.MASS_FIELDS, attention.summarize_mass),
    "workspace": (workspace.FIELDS, workspace.summarize),
    "memory": (memory.FIELDS, memory.summarize),
    "ssm": (ssm.FIELDS, ssm.summarize),
    "paths": (paths.FIELDS, paths.summarize),
}

FIELDS: dict[str, Fields] = {group: fields for group, (fields, _) in _GROUPS.items()}
"""What the arrays hold, by group and name."""

AXES: dict[str, dict[str, tuple[str, ...]]] = {
    group: {name: field.axes for name, field in fields.items()} for group, fields in FIELDS.items()
}
"""Names of the arrays' axes, by group and name."""


def summarize(
    rows: Mapping[tuple[str, str], NDArray[Any]],
    *,
    config: Mapping[str, Any],
    domains: Sequence[str],
    first_sample: int,
) -> Summary:
    """Summarize some samples of a capture.

    Args:
        rows: (group, name) -> array [samples, ...], as `hydra_lab.capture.layout` lists them; `tokens` at least.
        config: the model's configuration as a dict.
        domains: labels that `tokens.domain` indexes.
        first_sample: index in the capture of the first sample.
    """
    batch = Batch(
        rows=rows,
        config=config,
        samples=Samples(
            length=rows["tokens", "length"].astype(np.int64),
            domain=rows["tokens", "domain"].astype(np.int64),
            num_domains=len(domains),
            first=first_sample,
        ),
    )
    held = {group for group, _ in rows}
    return {group: make(batch) for group, (_, make) in _GROUPS.items() if group in held}


def merge(first: Summary, second: Summary) -> Summary:
    """The summary of the samples of `first` followed by those of `second`.

    Raises:
        ValueError: the two do not hold the same arrays in the same shapes.
    """
    if set(first) != set(second):
        differing = ", ".join(sorted(set(first) ^ set(second)))
        raise ValueError(f"the summaries to merge do not hold the same groups: only one has {differing}")
    return {group: merge_arrays(FIELDS[group], arrays, second[group]) for group, arrays in first.items()}


def layers_of(config: Mapping[str, Any], group: str) -> tuple[int, ...]:
    """The blocks that the axis `layer` of a group runs over."""
    num_layers = int(config["num_hidden_layers"])
    if group in ("attention", "mass"):
        every = int(config["attention_every"])
        return tuple(i for i in range(num_layers) if every and (i + 1) % every == 0)
    listed = {"routing": "moe_layers", "workspace": "workspace_layers", "memory": "memory_layers"}
    return tuple(sorted(config[listed[group]])) if group in listed else tuple(range(num_layers))
