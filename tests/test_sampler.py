"""The sampler against slow references: one row, one token, one rule at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import pytest
import torch

from data_plane import sampler
from data_plane.philox import philox, uniforms
from data_plane.sampler import Logprobs, Rows, Samples, collect_scores, draw, score_prompt
from data_plane.sampling_table import SamplingTable

VOCABULARY = 97
NAN, INFINITY = float("nan"), float("inf")


@dataclass
class Request:
    """One row as a client would put it."""

    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])
    output: list[int] = field(default_factory=list)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    sample_index: int = 0
    min_length: int = 0
    stop_ids: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    logprob_count: int = -1


def fill(requests: list[Request], slots: np.ndarray, vocabulary: int) -> tuple:
    table = SamplingTable(64, vocabulary)
    tokens, prompt_lengths = np.zeros((64, 64), np.int32), np.zeros(64, np.int32)
    for slot, request in zip(slots.tolist(), requests, strict=True):
        table.temperature[slot] = request.temperature
        table.top_k[slot], table.top_p[slot] = request.top_k, request.top_p
        table.min_p[slot] = request.min_p
        table.repetition_penalty[slot] = request.repetition
        table.presence_penalty[slot] = request.presence
        table.frequency_penalty[slot] = request.frequency
        table.seed[slot], table.sample_index[slot] = request.seed, request.sample_index
        table.min_length[slot] = request.min_length
        table.logprob_count[slot] = request.logprob_count
        if request.stop_ids:
            table.stop_ids[slot] = np.array(request.stop_ids, np.int32)
        if request.bias:
            ids, values = zip(*request.bias.items(), strict=True)
            table.bias[slot] = (np.array(ids, np.int32), np.array(values, np.float32))
        history = request.prompt + request.output
        tokens[slot, : len(history)] = history
        tokens[slot, len(history) :] = 5  # what lies past the end must not matter
        prompt_lengths[slot] = len(request.prompt)
    return table, tokens, prompt_lengths


def sample(logits, rows, slots, lengths, table, tokens, prompt_lengths) -> Samples:
    drawn = Rows(rows, slots, lengths)
    device = torch.from_numpy(tokens)
    draws = draw(logits, drawn, table, device, prompt_lengths, torch.from_numpy)
    return draws.collect([value.numpy() for value in draws.values])


def prompt_logprobs(logits, slot, first_position, following, count) -> Logprobs | None:
    ids = torch.from_numpy(following).long()
    scores = score_prompt(logits, slot, first_position, ids, count)
    values = [value.numpy() for part in scores for value in part.values]
    return collect_scores(scores, values, np.zeros(0, np.int64))


def run(logits: torch.Tensor, requests: list[Request], rows=None, slots=None) -> Samples:
    rows = np.arange(len(requests)) if rows is None else np.array(rows)
    slots = np.arange(len(requests))[::-1] if slots is None else np.array(slots)
    slots = slots.astype(np.int32)
    lengths = np.array([len(each.prompt + each.output) for each in requests], np.int32)
    table, tokens, prompt_lengths = fill(requests, slots, logits.shape[1])
    return sample(logits, rows, slots, lengths, table, tokens, prompt_lengths)


def changed(logits: torch.Tensor, request: Request) -> np.ndarray:
    x = logits.float().numpy().copy()
    history = request.prompt + request.output
    for token, value in request.bias.items():
        x[token] += np.float32(value)
    if len(history) < request.min_length:
        x[request.stop_ids] = -np.inf
    penalty = np.float32(request.repetition)
    for token in set(history):
        x[token] = x[token] * penalty if x[token] < 0 else x[token] / penalty
    for token in set(request.output):
        x[token] -= np.float32(request.frequency) * np.float32(request.output.count(token))
        x[token] -= np.float32(request.presence)
    return x


def distribution(logits: torch.Tensor, request: Request) -> np.ndarray:
    """Probabilities, float64 [V], after everything."""
    x = changed(logits, request).astype(np.float64)
    weights = np.exp((x - x.max()) / np.float64(np.float32(request.temperature)))
    weights[weights < np.float32(request.min_p)] = 0
    order = np.lexsort((np.arange(len(x)), -x))
    if request.top_k:
        weights[order[request.top_k :]] = 0
    if request.top_p < 1:
        target, mass = np.float64(np.float32(request.top_p)) * weights.sum(), 0.0
        for token in order:
            if mass >= target:
                weights[token] = 0
            mass += weights[token]
    return weights / weights.sum()


def reference(logits: torch.Tensor, request: Request) -> int:
    if request.temperature == 0:
        return int(changed(logits, request).argmax())
    position = len(request.prompt + request.output)
    u = uniforms(
        np.array([request.seed], np.uint64),
        np.array([request.sample_index], np.int32),
        np.array([position], np.int32),
    )[0]
    return int(np.searchsorted(distribution(logits, request).cumsum(), u, side="right"))


def varied(generator: np.random.Generator, count: int, vocabulary: int) -> list[Request]:
    def pick(*values):
        return values[generator.integers(len(values))]

    return [
        Request(
            prompt=generator.integers(0, vocabulary, generator.integers(1, 12)).tolist(),
            output=generator.integers(0, 12, generator.integers(0, 20)).tolist(),
            temperature=pick(0.0, 0.3, 1.0, 1.7, 1e-30),
            top_k=pick(0, 0, 1, 5, 40, vocabulary),
            top_p=pick(1.0, 1.0, 0.2, 0.9, 0.999),
            min_p=pick(0.0, 0.0, 0.05, 0.5, 1.0),
            repetition=pick(1.0, 1.3, 0.7),
            presence=pick(0.0, 0.4, -0.6),
            frequency=pick(0.0, 0.2, -0.1),
            seed=int(generator.integers(0, 2**64, dtype=np.uint64)),
            sample_index=int(generator.integers(0, 16)),
            min_length=pick(0, 8, 30),
            stop_ids=pick([], [0, 1], [int(generator.integers(vocabulary))]),
            bias=pick({}, {3: 2.5, 7: -100.0}, {0: 1.0}),
            logprob_count=pick(-1, 0, 4),
        )
        for _ in range(count)
    ]


def test_philox_gives_the_known_answers_of_random123() -> None:
    counters = [[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    keys = [[0] * 2, [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]]
    answers = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    words = philox(np.array(counters, np.uint64).T, np.array(keys, np.uint64).T)
    assert words.T.tolist() == answers


def test_uniforms_are_uniform_and_differ_in_every_argument() -> None:
    n = 20_000
    positions, zeros = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    seeds = np.full(n, 2**63 + 5, np.uint64)
    base = uniforms(seeds, zeros, positions)
    assert base.min() >= 0 and base.max() < 1
    assert np.abs(np.histogram(base, 20, (0, 1))[0] - n / 20).max() < 6 * np.sqrt(n / 20)
    for other in (
        uniforms(seeds + np.uint64(2**32), zeros, positions),
        uniforms(seeds, zeros + 1, positions),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_equals_reference_row_by_row(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(1)
    requests = varied(generator, 60, VOCABULARY)
    logits = torch.from_numpy(generator.normal(0, 3, (60, VOCABULARY))).to(dtype)
    before = logits.clone()
    samples = run(logits, requests)
    assert torch.equal(logits, before)
    assert samples.token_ids.dtype == np.int32 and not samples.faults
    expected = [reference(row, each) for row, each in zip(logits, requests, strict=True)]
    assert samples.token_ids.tolist() == expected


def test_a_row_alone_in_a_chunk_or_in_a_batch_is_the_same(monkeypatch) -> None:
    generator = np.random.default_rng(2)
    requests = varied(generator, 40, VOCABULARY)
    logits = torch.from_numpy(generator.normal(0, 2, (40, VOCABULARY))).bfloat16()
    together = run(logits, requests)
    alone = [run(logits[i : i + 1], [each]) for i, each in enumerate(requests)]
    assert together.token_ids.tolist() == [each.token_ids[0] for each in alone]
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    chunked = run(logits, requests)
    parts = [each.logprobs for each in alone if each.logprobs is not None]
    for column in fields(Logprobs):
        whole = getattr(together.logprobs, column.name)
        assert np.array_equal(whole, getattr(chunked.logprobs, column.name))
        if column.name != "slots":
            single = np.concatenate([getattr(part, column.name) for part in parts])
            assert np.array_equal(whole, single), column.name


@pytest.mark.parametrize("candidates", [1, 4, 50])
def test_narrow_and_full_searches_for_the_nucleus_agree(monkeypatch, candidates: int) -> None:
    generator = np.random.default_rng(3)
    requests = varied(generator, 60, VOCABULARY)
    # Rounded logits have many ties.
    logits = torch.from_numpy(generator.normal(0, 2, (60, VOCABULARY)).round())
    expected = [reference(row, each) for row, each in zip(logits, requests, strict=True)]
    monkeypatch.setattr(sampler, "CANDIDATES", candidates)
    assert run(logits, requests).token_ids.tolist() == expected


@pytest.mark.parametrize(
    "request_",
    [
        Request(),
        Request(temperature=0.5),
        Request(top_k=3),
        Request(top_p=0.6),
        Request(min_p=0.2),
        Request(temperature=2.0, top_k=8, top_p=0.8, min_p=0.1),
        Request(output=[0, 0, 4], repetition=1.5, presence=0.5, frequency=0.3, top_k=6),
    ],
)
def test_draws_follow_the_distribution(request_: Request) -> None:
    n, vocabulary = 6_400, 12
    logits = torch.linspace(-1, 2, vocabulary).roll(5)[None]
    expected = distribution(logits[0], request_)
    table, tokens, prompt_lengths = fill([request_], np.zeros(1, np.int32), vocabulary)
    table.copy(np.zeros(63, np.int64), np.arange(1, 64), np.zeros(63, np.int32))
    drawn = np.zeros(vocabulary, np.int64)
    lengths = np.full(64, len(request_.prompt + request_.output), np.int32)
    tokens[:], prompt_lengths[:] = tokens[0], prompt_lengths[0]
    rows, slots = np.zeros(64, np.int64), np.arange(64, dtype=np.int32)
    for start in range(0, n, 64):
        table.seed[:] = np.arange(start, start + 64)
        ids = sample(logits, rows, slots, lengths, table, tokens, prompt_lengths).token_ids
        drawn += np.bincount(ids, minlength=vocabulary)
    assert not drawn[expected == 0].any()
    share, total = expected[expected > 0], drawn.sum()
    chi_square = ((drawn[expected > 0] - total * share) ** 2 / (total * share)).sum()
    freedom = len(share) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("u", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_distribution_draw_tokens_with_weight(monkeypatch, u: float) -> None:
    monkeypatch.setattr(sampler, "uniforms", lambda seeds, *_: np.full(len(seeds), u))
    logits = torch.full((2, VOCABULARY), -INFINITY)
    logits[:, 20:60] = torch.randn(40, generator=torch.Generator().manual_seed(0)) / 10
    ids = run(logits, [Request(), Request(top_p=0.9999, top_k=39)]).token_ids
    assert ids[0] == (20 if u == 0 else 59)
    assert 20 <= ids[1] < 60


@pytest.mark.parametrize("scale", [1.0, 1e4, 3e38])
def test_extreme_temperatures_and_logits_do_not_overflow(scale: float) -> None:
    logits = torch.tensor([[0.1, 1.0, -0.4, 0.9, -1.0]]) * scale
    cold = [Request(temperature=each, seed=seed) for each in (1e-45, 1e-9) for seed in range(9)]
    assert set(run(logits, cold, rows=[0] * 18).token_ids.tolist()) == {1}
    hot = run(
        logits, [Request(temperature=100.0, top_p=0.5), Request(temperature=100.0)], rows=[0, 0]
    )
    assert not hot.faults and hot.token_ids.min() >= 0


def test_forks_share_a_row_and_differ_by_sample_index() -> None:
    logits = torch.zeros(2, VOCABULARY)
    requests = [Request(seed=9, sample_index=index) for index in range(16)]
    ids = run(logits, requests, rows=[1] * 16).token_ids
    assert len(set(ids.tolist())) > 8
    assert ids.tolist() == [reference(logits[1], each) for each in requests]


def test_greedy_batch_takes_one_argmax(monkeypatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a plain greedy batch needs no more than an argmax")

    monkeypatch.setattr(sampler, "_draw", forbidden)
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()
    greedy = Request(temperature=0.0, top_k=5, top_p=0.5, stop_ids=[3], min_length=2)
    samples = run(logits, [greedy] * 6, rows=[3, 2, 1, 0, 0, 3])
    assert samples.token_ids.tolist() == logits.argmax(-1)[[3, 2, 1, 0, 0, 3]].tolist()
    assert samples.logprobs is None and samples.faults == []


def test_nan_and_boundless_rows_fault_alone() -> None:
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0))
    clean = logits.clone()
    logits[1, 40] = NAN
    logits[2] = -INFINITY
    logits[3, 7] = INFINITY
    logits[4, :5] = -INFINITY
    for temperature in (0.0, 0.8):
        requests = [Request(temperature=temperature, logprob_count=1)] * 6
        good, samples = run(clean, requests), run(logits, requests)
        assert samples.token_ids[[1, 2, 3]].tolist() == [-1, -1, -1]
        assert samples.token_ids[[0, 5]].tolist() == good.token_ids[[0, 5]].tolist()
        assert samples.faults[0] == (1, "the model gave NaN logits")
        assert [row for row, _ in samples.faults] == [1, 2, 3]
        assert samples.logprobs is not None and len(samples.logprobs.slots) == 3
        assert np.isfinite(samples.logprobs.logprobs).all()
    everything = Request(stop_ids=list(range(VOCABULARY)), min_length=10)
    samples = run(clean, [everything, Request()])
    assert [row for row, _ in samples.faults] == [0] and samples.token_ids[1] >= 0


def test_stop_ids_are_banned_up_to_the_minimum_length() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4], logits[0, 9] = 50.0, 40.0
    for have, expected in ((3, 9), (4, 9), (5, 4)):
        request = Request(prompt=[1] * have, stop_ids=[4], min_length=5, temperature=0.0)
        assert run(logits, [request]).token_ids[0] == expected


def test_columns_past_the_vocabulary_are_never_drawn() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 9] = 100
    table = SamplingTable(1, 9)
    one = np.zeros(1, np.int32)
    samples = sample(logits, one, one, one + 1, table, np.zeros((1, 4), np.int32), one + 1)
    assert samples.token_ids[0] == 0


def test_logprobs_are_of_the_raw_distribution() -> None:
    generator = np.random.default_rng(5)
    logits = torch.from_numpy(generator.normal(0, 2, (8, VOCABULARY)).round(1)).bfloat16()
    requests = varied(generator, 8, VOCABULARY)
    for count, request in zip((0, 3, -1, 20, 1, 0, 5, 200), requests, strict=True):
        request.logprob_count = count
    samples = run(logits, requests)
    found = samples.logprobs
    assert found is not None
    raw = torch.log_softmax(logits.float(), -1).numpy()
    at, offset = 0, 0
    for row, request in enumerate(requests):
        if request.logprob_count < 0:
            continue
        token = samples.token_ids[row]
        assert found.slots[at] == 7 - row and found.token_ids[at] == token
        assert found.positions[at] == len(request.prompt + request.output)
        assert found.logprobs[at] == pytest.approx(raw[row, token], abs=1e-5)
        assert found.ranks[at] == 1 + (logits[row] > logits[row, token]).sum()
        count = min(request.logprob_count, VOCABULARY)
        assert found.top_counts[at] == count
        best = np.lexsort((np.arange(VOCABULARY), -logits[row].float().numpy()))[:count]
        assert found.top_token_ids[offset : offset + count].tolist() == best.tolist()
        assert found.top_logprobs[offset : offset + count] == pytest.approx(
            raw[row, best], abs=1e-5
        )
        at, offset = at + 1, offset + count
    assert at == len(found.slots) and offset == len(found.top_token_ids)
    assert found.logprobs.dtype == np.float32 and found.top_token_ids.dtype == np.int32


def test_prompt_logprobs_of_a_chunk(monkeypatch) -> None:
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    logits = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[2, 5] = NAN
    following = np.arange(8, dtype=np.int32) * 3
    found = prompt_logprobs(logits, 4, 17, following, 2)
    assert found.slots.tolist() == [4] * 8 and found.positions.tolist() == list(range(17, 25))
    assert found.token_ids.tolist() == following.tolist() and found.top_counts.tolist() == [2] * 8
    raw = torch.log_softmax(logits, -1)
    good = [0, 1, 3, 4, 5, 6, 7]
    assert found.logprobs[good] == pytest.approx(raw[good, following[good]].numpy(), abs=1e-5)
    assert found.top_token_ids.reshape(8, 2)[good].tolist() == raw.topk(2).indices[good].tolist()
    assert prompt_logprobs(logits[:0], 4, 17, following[:0], 2) is None


def test_clear_and_copy_carry_every_column() -> None:
    table = SamplingTable(4, VOCABULARY)
    fresh = {
        name: column.copy()
        for name, column in vars(table).items()
        if "column" not in name and isinstance(column, np.ndarray)
    }
    assert len(fresh) == 12
    for name in fresh:
        getattr(table, name)[1] = 3
    table.stop_ids[1] = np.array([7], np.int32)
    table.bias[3] = (np.array([7], np.int32), np.array([1.0], np.float32))
    table.copy(np.array([1, 1]), np.array([2, 3]), np.array([5, 6]))
    for name in fresh:
        expected = [5, 6] if name == "sample_index" else [3, 3]
        assert getattr(table, name)[[2, 3]].tolist() == expected
    assert sorted(table.stop_ids) == [1, 2, 3] and not table.bias
    table.clear(np.array([1, 2, 3]))
    assert not table.stop_ids and not table.bias
    for name, column in fresh.items():
        assert np.array_equal(getattr(table, name), column), name


def test_an_empty_batch_is_fine() -> None:
    samples = run(torch.zeros(0, VOCABULARY), [])
    assert len(samples.token_ids) == 0 and samples.faults == [] and samples.logprobs is None


def test_processors_of_transformers_agree() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    generator = np.random.default_rng(7)
    x = torch.from_numpy(generator.normal(0, 3, (1, VOCABULARY))).float()
    for output in ([], [4, 4, 9, 11, 4]):
        request = Request(output=output, repetition=1.4)
        history = torch.tensor([request.prompt + output])
        theirs = processors.RepetitionPenaltyLogitsProcessor(1.4)(history, x.clone())
        ours = x.clone()
        table, tokens, prompt_lengths = fill([request], np.zeros(1, np.int32), VOCABULARY)
        one = np.zeros(1, np.int32)
        rows = Rows(one, one, one + history.shape[1])
        device = torch.from_numpy(tokens)
        ours = sampler._apply_penalties(ours, rows, table, device, prompt_lengths, torch.from_numpy)
        assert torch.equal(ours, theirs)
    for request, warpers in (
        (Request(top_k=7), [processors.TopKLogitsWarper(7)]),
        (Request(top_p=0.7), [processors.TopPLogitsWarper(0.7)]),
        (Request(min_p=0.03), [processors.MinPLogitsWarper(0.03)]),
        (
            Request(temperature=1.6, top_k=20, top_p=0.8),
            [
                processors.TemperatureLogitsWarper(1.6),
                processors.TopKLogitsWarper(20),
                processors.TopPLogitsWarper(0.8),
            ],
        ),
    ):
        scores = x.clone()
        for warper in warpers:
            scores = warper(None, scores)
        theirs = torch.softmax(scores, -1)[0].numpy()
        assert distribution(x[0], request) == pytest.approx(theirs, abs=1e-6)
