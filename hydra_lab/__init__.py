"""hydra_lab: a workbench around a real Hydra language model (arXiv 2508.15099).

Importing it registers the model with transformers' Auto classes and loads nothing of the lab: what needs plotly,
nnsight or a Zarr store is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hydra_lab.config import HydraConfig as HydraConfig
from hydra_lab.modeling import HydraForCausalLM as HydraForCausalLM
from hydra_lab.modeling import HydraModel as HydraModel

if TYPE_CHECKING:
    from hydra_lab.capture import open_capture as open_capture
    from hydra_lab.capture import record as record
    from hydra_lab.lens import HydraLens as HydraLens
    from hydra_lab.loading import load as load

__version__ = "0.1.0"

_LAZY = {
    "HydraLens": "hydra_lab.lens",
    "load": "hydra_lab.loading",
    "open_capture": "hydra_lab.capture",
    "record": "hydra_lab.capture",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
