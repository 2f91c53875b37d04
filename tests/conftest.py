"""Models that several test files share; made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Both variables must be there
# before triton is imported, and transformers imports it; without the other, compiling warns.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from data_plane.model import Model, load_model
from tests.models import add_tokenizer, tiny_model

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("llama")
    tiny_model("llama", directory, vocab_size=384, max_position_embeddings=1024)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def llama(llama_directory: Path) -> Model:
    return load_model(llama_directory, dtype="float32", name="tiny-llama")
