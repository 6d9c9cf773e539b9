"""The environment of every test: no network, few threads, and tiny models on demand."""

import gc
import os

# before transformers is imported, by whichever test comes first
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

import quick  # noqa: F401
from tiny import FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer

# what `test_gpu_kernel.py` runs in a process of its own
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["noise/interpreted_noise.py"]

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")  # the same examples in every run
torch.set_num_threads(1)  # models are tiny, and tests may run side by side


def pytest_collection_finish(session):
    """Every training run ends with a full garbage collection, a fifth of a second over all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=FAMILIES)
def family(request):
    """The name of each architecture in turn."""
    return request.param


@pytest.fixture
def model(family):
    """A tiny random model of each architecture in turn."""
    return tiny_model(family)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model_folder(tmp_path):
    """A folder with a tiny Llama and its tokenizer, as `save_pretrained` leaves it."""
    return save_tiny_model(tmp_path / "tiny")
