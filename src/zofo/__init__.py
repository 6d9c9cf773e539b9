"""zofo: fine-tune every weight of a language model in the memory of parameter-efficient fine-tuning."""

from importlib.metadata import version as _version

from zofo import noise as noise
from zofo.config import ZOFOConfig as ZOFOConfig
from zofo.errors import ZofoError as ZofoError
from zofo.training.trainer import ZOFOTrainer as ZOFOTrainer
from zofo.zo.perturb import direction as direction
from zofo.zo.perturb import perturbed as perturbed

__all__ = ["ZOFOConfig", "ZOFOTrainer", "ZofoError", "direction", "noise", "perturbed"]
__version__ = _version("zofo")
