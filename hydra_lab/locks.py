"""One lock per model: hooks and traces live on the model's modules, so two threads must not use them at once.

`capture.record` and `lens.HydraLens` take the lock themselves. Code that calls a model directly while another thread
may trace it takes it too: `with model_lock(model): model(...)`.
"""

import threading
import weakref
from typing import Any

from torch import nn

_locks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()


def model_lock(model: nn.Module) -> "threading.RLock":  # pyright: ignore[reportGeneralTypeIssues, reportInvalidTypeForm]
    """The re-entrant lock of `model`; the same one for every caller, for as long as the model lives."""
    with _registry_lock:
        if model not in _locks:
            _locks[model] = threading.RLock()
        return _locks[model]
