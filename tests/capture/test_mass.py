"""The mass of attention in a capture on disk."""

from pathlib import Path

import numpy as np
import pytest

from hydra_lab import metrics
from hydra_lab.capture import capture_files, open_capture
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.capture.layout import SIGNALS, signals_of
from hydra_lab.config import HydraConfig
from tests.helpers import lively_model, random_ids


class Numbers:
    """A tokenizer whose texts are token ids with spaces between them."""

    name_or_path = "numbers"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(97)}


def test_mass_on_disk_is_that_of_the_batch(tmp_path: Path) -> None:
    model = lively_model()
    ids = random_ids(model.config, 1, 29)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, ids[0].tolist())))
    capture_files(
        model, Numbers(), [text], tmp_path / "run.zarr", sequence_length=40, signals=("mass",), progress=False
    )
    capture = open_capture(tmp_path / "run.zarr")
    assert capture.groups == ("tokens", "mass")
    on_disk, in_memory = (
        metrics.mass_record(capture),
        metrics.mass_record(capture_batch(model, ids, signals=["mass"])),
    )
    np.testing.assert_allclose(on_disk.mass[:, :, :29], in_memory.mass, atol=1e-3)
    assert np.isnan(on_disk.mass[:, :, 29:]).all() and on_disk.layers == in_memory.layers == (1, 3)
    np.testing.assert_allclose(metrics.mass_by_kind(on_disk).by_head.sum(axis=-1), 1, atol=1e-3)


def test_signals_that_are_captured_only_by_name() -> None:
    config = HydraConfig.from_preset("nano")
    assert signals_of(config, None) == SIGNALS
    assert signals_of(config, ["mass", "memory"]) == ("memory", "mass")
    with pytest.raises(ValueError, match=r"'masses' is not one of routing, attention, .*, mass"):
        signals_of(config, ["masses"])
    without = HydraConfig.from_preset("nano", attention_every=0)
    with pytest.raises(ValueError, match="no attention path, so there is no signal 'mass'"):
        signals_of(without, ["mass"])
