"""The experts of each chunk of a text, one lane per block."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hydra_lab.capture.in_memory import InMemoryCapture
from hydra_lab.figures.theme import Theme, colours
from hydra_lab.metrics.records import routing_record
from hydra_lab.metrics.routing import RoutingMap, routing_map
from hydra_lab.widgets.base import Payload
from hydra_lab.widgets.colouring import ink
from hydra_lab.widgets.scene import SceneWidget, Shape, check_choice, scene_item, shape
from hydra_lab.widgets.text import visible

_CELL, _LANE, _LEFT, _TOP = 52, 34, 64, 24  # pixels: a chunk's width, a lane's height, where the cells begin
_LONG_TEXT = 160  # characters of a chunk's text


def routing_lanes_payload(
    routing: RoutingMap,
    chunk_texts: Sequence[str],
    *,
    margin: ArrayLike | None = None,
    selected: tuple[int, int] | None = None,
    theme: Theme = "light",
) -> Payload:
    """What `RoutingLanes` draws.

    Args:
        routing: of one text.
        chunk_texts: [C] text of each chunk.
        margin: [Y, C] logit of the last chosen expert less the best logit of those left out; see
            `hydra_lab.metrics.routing_margin`.
        selected: (block, chunk) that is outlined.

    Raises:
        ValueError: the shapes disagree, or nothing drawn is `selected`.
    """
    num_layers, num_chunks, _ = routing.experts.shape
    if len(chunk_texts) != num_chunks:
        raise ValueError(f"{len(chunk_texts)} texts for {num_chunks} chunks")
    distance = None if margin is None else np.asarray(margin, dtype=np.float64)
    if distance is not None and distance.shape != (num_layers, num_chunks):
        raise ValueError(f"margin has shape {distance.shape} for {num_layers} blocks and {num_chunks} chunks")
    palette = colours(routing.num_experts, theme)
    texts = [visible(text) for text in chunk_texts]
    texts = [text if len(text) <= _LONG_TEXT else text[:_LONG_TEXT] + " …" for text in texts]
    shapes: list[Shape] = [shape("text", "chunk", x=0, y=15, fill="currentColor")]
    shapes += [
        shape("text", str(c), x=_LEFT + (c + 0.5) * _CELL, y=15, fill="currentColor", text_anchor="middle")
        for c in range(num_chunks)
    ]
    rows: list[list[Payload]] = []
    for y, layer in enumerate(routing.layers):
        top = _TOP + y * _LANE
        shapes.append(shape("text", f"block {layer}", x=0, y=top + 19, fill="currentColor"))
        row: list[Payload] = []
        for c, text in enumerate(texts):
            experts = list(dict.fromkeys(routing.experts[y, c].tolist()))
            fill = palette[experts[0]]
            weights = ", ".join(f"{weight:.2f}" for weight in routing.weights[y, c])
            details = [
                ("block, chunk", f"{layer}, {c}"),
                ("experts, best first", ", ".join(map(str, experts))),
                ("mean weights", weights),
            ]
            if distance is not None:
                details.append(("margin, logits", f"{distance[y, c]:.3f}"))
            details.append(("text", text))
            x = _LEFT + c * _CELL
            cell = shape("rect", x=x + 1.5, y=top + 1.5, width=_CELL - 3, height=_LANE - 5, rx=3, fill=fill)
            label = shape(
                "text",
                "+".join(map(str, experts)),
                x=x + _CELL / 2,
                y=top + 19,
                fill=ink(fill),
                text_anchor="middle",
            )
            row.append(scene_item((int(layer), c), details, (cell, label)))
        rows.append(row)
    return {
        "label": "Experts of each chunk",
        "width": _LEFT + num_chunks * _CELL + 4,
        "height": _TOP + num_layers * _LANE + 4,
        "shapes": shapes,
        "rows": rows,
        "legend": {
            "label": "First-choice expert",
            "keys": [{"name": str(e), "fill": fill, "ink": ink(fill)} for e, fill in enumerate(palette)],
        },
        "note": f"A cell is a chunk of {routing.chunk_size} tokens; its numbers are its experts, best first.",
        "selected": check_choice(selected, rows),
        "theme": theme,
    }


def chunk_margins(logits: NDArray[Any], experts: NDArray[Any]) -> NDArray[np.float64]:
    """[Y, C] margins of the chunks of one text, from router logits [Y, C, E] and chosen experts [Y, C, K]; NaN where
    all experts are chosen."""
    scores = logits.astype(np.float64)
    chosen = np.take_along_axis(scores, experts, axis=-1).min(axis=-1)
    left_out = scores.copy()
    np.put_along_axis(left_out, experts, -np.inf, axis=-1)
    best = left_out.max(axis=-1)
    return np.where(np.isinf(best), np.nan, chosen - best)


class RoutingLanes(SceneWidget):
    """The experts of each chunk; takes the arguments of `routing_lanes_payload`.

    Attributes:
        selected: [block, chunk] that is selected, or None.
    """

    def __init__(self, routing: RoutingMap, chunk_texts: Sequence[str], **options: Any) -> None:
        super().__init__(routing_lanes_payload(routing, chunk_texts, **options))

    @classmethod
    def of_capture(
        cls, capture: InMemoryCapture, texts: Sequence[str], sample: int = 0, **options: Any
    ) -> "RoutingLanes":
        """The routing of one sample of a batch with the signal `routing`.

        Args:
            texts: [L] text of each of the sample's tokens.
        """
        record = routing_record(capture, samples=[sample], logits=True)
        routing = routing_map(record)
        size = routing.chunk_size
        pieces = ["".join(texts[start : start + size]) for start in range(0, routing.num_tokens, size)]
        assert record.logits is not None  # asked for above
        margin = chunk_margins(record.logits[:, 0, : len(pieces)], routing.experts)
        return cls(routing, pieces, margin=margin, **options)
