"""Lengths and arrivals of requests for the simulations that need no model.

ShareGPT-like and Alpaca-like lengths are made up: lognormal with a fixed seed, scaled until their
means are those that the paper gives (section 6.1), prompt and output independent. Pairs that do
not fit the model are left out, as the paper's own benchmark leaves them out. Lengths of the Azure
trace are read from its file and shuffled, because its first minutes are not like its whole.

Time is counted in steps. Arrivals are Poisson. A load of 1 asks for all the memory there is, were
nothing wasted or shared; at `PRESSURE` the wait queue never empties, so that every allocator is
seen when it is full.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]

AZURE_FILE = "azure-llm-2023-conversation.csv"
PRESSURE = 1.5
# The paper's OPT-13B on 40 GB has memory for 15.7 thousand tokens and takes 2048 in a sequence. A
# workload with longer sequences gets a model and a pool that are larger by the same factor.
POOL_TOKENS, POOL_MODEL_LENGTH = 15_680, 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """A synthetic workload: mean lengths, and how heavy their tails are."""

    prompt_mean: float
    output_mean: float
    prompt_sigma: float
    output_sigma: float


SHAPES = {
    "sharegpt": Shape(161.31, 337.99, 1.2, 1.0),
    "alpaca": Shape(19.31, 58.45, 0.6, 1.0),
}


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Pairs of lengths, int64 [n, 2]: prompt and output.

    max_length: the model's. left_out: share of requests that are longer than that.
    """

    name: str
    pairs: Lengths
    max_length: int
    left_out: float = 0.0

    @property
    def pool_tokens(self) -> int:
        return POOL_TOKENS * self.max_length // POOL_MODEL_LENGTH

    def rate(self, load: float, samples: int) -> float:
        """Requests per step that come to a load."""
        prompt, output = self.pairs[:, 0], self.pairs[:, 1]
        # A request holds its prompt for as many steps as it has output, and one token more in each.
        token_steps = float((prompt * output + samples * output * output / 2).mean())
        return load * self.pool_tokens / token_steps


@dataclass(frozen=True, slots=True)
class Job:
    """One request: the step at which it arrives, its prompt's length and its output's."""

    arrival: int
    prompt: int
    output: int

    @property
    def final(self) -> int:
        """Tokens whose keys and values are written in the end: all but the last one drawn."""
        return self.prompt + self.output - 1


def synthetic(name: str, count: int = 200_000, seed: int = 0) -> Workload:
    """A workload with the paper's mean lengths."""
    shape, rng = SHAPES[name], np.random.default_rng(seed)
    logs = rng.normal(0, [shape.prompt_sigma, shape.output_sigma], (count, 2))
    means = np.array([shape.prompt_mean, shape.output_mean])
    scales = means.copy()
    fitting = np.zeros((0, 2), np.int64)
    # What the model's length cuts off lowers the means, so the scales are raised until they fit.
    for _ in range(40):
        lengths = np.maximum(np.rint(np.exp(logs) * scales), 1).astype(np.int64)
        fitting = lengths[lengths.sum(axis=1) <= POOL_MODEL_LENGTH]
        scales *= means / fitting.mean(axis=0)
    return Workload(name, fitting, POOL_MODEL_LENGTH, 1 - len(fitting) / count)


def azure(folder: Path, max_length: int = 8192, seed: int = 0) -> Workload:
    """The conversation service of the Azure trace of 2023."""
    with (folder / AZURE_FILE).open(newline="") as file:
        rows = [
            (int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)
        ]
    pairs = np.array(rows, np.int64)
    pairs = pairs[(pairs > 0).all(axis=1)]
    fitting = pairs[pairs.sum(axis=1) <= max_length]
    left_out = 1 - len(fitting) / len(rows)
    return Workload("azure", np.random.default_rng(seed).permutation(fitting), max_length, left_out)


def jobs(
    workload: Workload, steps: int, load: float = PRESSURE, samples: int = 1, seed: int = 1
) -> list[Job]:
    """Returns the requests that arrive in `steps` steps."""
    arrivals = np.random.default_rng(seed).poisson(workload.rate(load, samples), steps)
    when = np.repeat(np.arange(steps), arrivals)
    lengths = workload.pairs[np.arange(len(when)) % len(workload.pairs)]
    return [
        Job(at, prompt, output)
        for at, (prompt, output) in zip(when.tolist(), lengths.tolist(), strict=True)
    ]
