"""Runs models in the processes of a tensor parallel group, and collects what each rank says.

As a program it is one rank: ``python -m tests.tensor_ranks RANK SIZE DIRECTORY``.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import FileStore

from data_plane.kv_cache import KVCache
from data_plane.model import Model, ModelError, load_model
from data_plane.tensor_parallel import ALONE, TensorGroup
from kernels import AttentionBatch

REPOSITORY = Path(__file__).parent.parent
PREFILL, DECODES, BLOCK_SIZE = 21, 6, 16
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Job:
    """A model to load and run: its directory, where {rank} is the rank's number, and how."""

    name: str
    directory: str
    dtype: str = "float32"
    load_format: str = "safetensors"


@dataclass(frozen=True)
class Outcome:
    """What a rank made of a job.

    logits: [1 + DECODES, vocabulary], of the prompt's last token and of each decode.
    refusal: the sentence, where the model was refused. facts: some of the model's.
    """

    logits: Tensor
    refusal: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def run_job(job: Job, group: TensorGroup = ALONE) -> Outcome:
    """Load the model, prefill a prompt and decode a fixed continuation."""
    try:
        model = load_model(
            Path(job.directory.format(rank=group.rank)),
            dtype=job.dtype,
            load_format=job.load_format,
            group=group,
        )
    except ModelError as error:
        return Outcome(torch.empty(0), str(error))
    model.warm_up()
    logits = run_tokens(model)
    facts = dataclasses.asdict(model.facts) | {
        "parameters": sum(parameter.numel() for parameter in model._module.parameters())
    }
    del facts["dtype"]
    return Outcome(logits, facts=facts)


def run_tokens(model: Model) -> Tensor:
    """Logits [1 + DECODES, vocabulary] of a prompt's last token, then of one token at a time."""
    facts = model.facts
    count = PREFILL + DECODES
    tokens = (torch.arange(count) * 37 + 11) % facts.vocabulary_size
    blocks = -(-count // BLOCK_SIZE)
    cache = KVCache(
        facts.layer_count,
        blocks,
        0,
        facts.local_kv_head_count,
        BLOCK_SIZE,
        facts.head_size,
        facts.dtype,
    )
    rows = []
    for start, stop in ((0, PREFILL), *((at, at + 1) for at in range(PREFILL, count))):
        positions = torch.arange(start, stop)
        batch = AttentionBatch.build(
            torch.tensor([0, stop - start], dtype=torch.int32),
            torch.tensor([stop], dtype=torch.int32),
            torch.arange(blocks, dtype=torch.int32)[None],
            positions,
            decode_count=int(stop - start == 1),
        )
        last = torch.tensor([stop - start - 1])
        rows.append(model.forward(tokens[start:stop], positions, batch, cache, last))
    return torch.cat(rows).float()


def run_ranks(jobs: Sequence[Job], size: int, directory: Path) -> list[dict[str, Outcome]]:
    """Run the jobs one after another in a group of so many processes; by rank, then by job."""
    directory.mkdir(parents=True)
    (directory / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    command = [sys.executable, "-m", "tests.tensor_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(directory)],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    failed = [error for rank, error in zip(ranks, errors, strict=True) if rank.returncode]
    assert not failed, "\n".join(failed)
    return [_read(directory, rank) for rank in range(size)]


def _read(directory: Path, rank: int) -> dict[str, Outcome]:
    said = json.loads((directory / f"{rank}.json").read_text())
    logits = load_file(directory / f"{rank}.safetensors")
    return {name: Outcome(logits[name], **fields) for name, fields in said.items()}


def _main(rank: int, size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    store = FileStore(str(directory / "store"), size)
    group = TensorGroup.join(rank, size, store, timeout=TIMEOUT)
    assert group.minimum(rank + 3) == 3
    jobs = [Job(**fields) for fields in json.loads((directory / "jobs.json").read_text())]
    outcomes = {job.name: run_job(job, group) for job in jobs}
    save_file(
        {name: outcome.logits for name, outcome in outcomes.items()},
        directory / f"{rank}.safetensors",
    )
    said = {
        name: {"refusal": outcome.refusal, "facts": outcome.facts}
        for name, outcome in outcomes.items()
    }
    (directory / f"{rank}.json").write_text(json.dumps(said))
    group.leave()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
