"""Reading the model's decisions: `record` for one batch, `capture_files` and `open_capture` for millions of tokens, and
`compare` for two captures of one text.

`record` needs torch alone; the others are imported when they are first used, because they need xarray and zarr.
"""

from typing import TYPE_CHECKING, Any

from hydra_lab.capture.record import PathUpdate as PathUpdate
from hydra_lab.capture.record import Recording as Recording
from hydra_lab.capture.record import record as record

if TYPE_CHECKING:
    from hydra_lab.capture.comparison import Comparison as Comparison
    from hydra_lab.capture.comparison import compare as compare
    from hydra_lab.capture.engine import CaptureProgress as CaptureProgress
    from hydra_lab.capture.engine import capture_files as capture_files
    from hydra_lab.capture.store import Capture as Capture
    from hydra_lab.capture.store import open_capture as open_capture

_LATE = {
    "Comparison": "hydra_lab.capture.comparison",
    "compare": "hydra_lab.capture.comparison",
    "Capture": "hydra_lab.capture.store",
    "open_capture": "hydra_lab.capture.store",
    "CaptureProgress": "hydra_lab.capture.engine",
    "capture_files": "hydra_lab.capture.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATE[name]), name)
