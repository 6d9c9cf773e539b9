"""zofo: fine-tune every weight of a language model in the memory of parameter-efficient fine-tuning."""

import importlib as _importlib
import typing as _typing
from importlib.metadata import version as _version

if _typing.TYPE_CHECKING:
    from zofo import noise as noise
    from zofo.config import ZOFOConfig as ZOFOConfig
    from zofo.errors import ZofoError as ZofoError
    from zofo.training.trainer import ZOFOTrainer as ZOFOTrainer
    from zofo.zo.perturb import direction as direction
    from zofo.zo.perturb import perturbed as perturbed

__all__ = ["ZOFOConfig", "ZOFOTrainer", "ZofoError", "direction", "noise", "perturbed"]
__version__ = _version("zofo")

_HOMES = {
    "ZOFOConfig": "zofo.config",
    "ZOFOTrainer": "zofo.training.trainer",
    "ZofoError": "zofo.errors",
    "direction": "zofo.zo.perturb",
    "perturbed": "zofo.zo.perturb",
}


def __getattr__(name: str) -> _typing.Any:
    """Imports a public name when it is first asked for, so that `zofo --help` need not wait for torch."""
    if name == "noise":
        return _importlib.import_module("zofo.noise")
    if name not in _HOMES:
        raise AttributeError(f"module 'zofo' has no attribute {name!r}")
    value = vars(_importlib.import_module(_HOMES[name]))[name]
    globals()[name] = value
    return value
