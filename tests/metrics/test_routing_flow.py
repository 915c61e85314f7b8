"""Flow of chunks between the experts of successive blocks."""

import numpy as np
import pytest

from hydra_lab.figures import routing_flow as draw
from hydra_lab.figures import to_csv
from hydra_lab.metrics import RoutingRecord, routing_flow


def record_of(first: np.ndarray, chunks: list[int], num_experts: int = 4) -> RoutingRecord:
    """A record with the given first choices [Y, N, C]; the second choice is the next expert."""
    experts = np.stack([first, (first + 1) % num_experts], axis=-1)
    return RoutingRecord(
        layers=tuple(range(0, 2 * len(first), 2)), experts=experts, num_experts=num_experts, chunk_size=8,
        length=np.array([8 * each for each in chunks]), domains=("text",) * len(chunks),
    )  # fmt: skip


def test_flow_counts_each_chunk_once_and_none_behind_the_end() -> None:
    first = np.array([[[0, 1, 3], [2, 3, 3]], [[1, 1, 0], [0, 0, 0]]])
    flow = routing_flow(record_of(first, [2, 1]))
    expected = np.zeros((4, 4))
    for a, b in ((0, 1), (1, 1), (2, 0)):
        expected[a, b] = 1 / 3
    assert flow.num_chunks == 3 and flow.num_samples == 2
    np.testing.assert_allclose(flow.share[0], expected)


def test_information_is_log_of_the_experts_for_a_copy_and_near_zero_for_chance() -> None:
    rng = np.random.default_rng(0)
    choices = rng.integers(0, 4, (1, 50, 100))
    copied = routing_flow(record_of(np.concatenate([choices, (choices + 1) % 4]), [100] * 50))
    assert copied.information[0] == pytest.approx(np.log(4), abs=0.01)
    drawn = routing_flow(record_of(np.concatenate([choices, rng.integers(0, 4, choices.shape)]), [100] * 50))
    assert drawn.information[0] < 3 * 9 / (2 * 5000)  # three times the bias that the docstring states


def test_one_block_has_no_flow() -> None:
    with pytest.raises(ValueError, match="two blocks"):
        routing_flow(record_of(np.zeros((1, 1, 1), dtype=np.int64), [1]))


def test_the_figure_says_what_flows_where() -> None:
    figure = draw(routing_flow(record_of(np.array([[[0, 1]], [[1, 1]]]), [2])))
    lines = to_csv(figure).splitlines()
    assert lines[1:] == [",0: expert 0,2: expert 1,50.0,", ",0: expert 1,2: expert 1,50.0,"]
