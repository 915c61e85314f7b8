"""Cost of removing experts, by domain."""

from typing import Any

import numpy as np
import pytest

from hydra_lab.figures import expert_cost as draw
from hydra_lab.metrics import expert_cost


def test_means_and_errors_by_domain() -> None:
    cost = np.array([[[1.0, 3.0, 5.0], [0.0, 0.0, -1.0]]])
    result = expert_cost(cost, [2], ["code", "code", "prose"])
    assert result.layers == (2,) and result.domains == ("code", "prose")
    np.testing.assert_allclose(result.cost, [[[2.0, 0.0], [5.0, -1.0]]])
    np.testing.assert_allclose(result.error[0, 0], [1.0, 0.0])  # std 2^.5 over 2^.5
    assert np.isnan(result.error[0, 1]).all() and result.num_samples.tolist() == [2, 1]
    figure: Any = draw(result)
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == 5.0
    assert "3 samples" in figure.layout.title.text


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match="cost"):
        expert_cost(np.zeros((1, 2, 3)), [2], ["code"])
