"""What a beam search shows while it goes on: the best so far, to whoever asks for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from control_plane.beams import BeamFields, BeamSearch, EarlyStopping, Hypothesis
from control_plane.generation import BestSoFar, Delta, Generation
from control_plane.plan import Outcome
from control_plane.request import Request
from data_plane.model import Model
from protos.inference.v1 import inference_pb2 as pb
from tests.stack import Stack, request, running_stack
from tests.stub_engine import candidates

# A best so far as its tokens and its score.
Best = tuple[list[int], float]

# The search itself.

VOCABULARY = 12
PROMPT = [3, 1, 4]


def logprobs_after(tokens: list[int]) -> list[tuple[int, float]]:
    """Every token of a small vocabulary with its log-probability, best first."""
    pairs = candidates(np.array(tokens), VOCABULARY)
    total = np.logaddexp.reduce([score for _, score in pairs])
    return [(at, score - total) for at, (_, score) in zip(_order(tokens), pairs, strict=True)]


def _order(tokens: list[int]) -> list[int]:
    return np.random.default_rng(tokens).permutation(VOCABULARY).tolist()


def searched(fields: BeamFields, limit: int, stop_ids: tuple[int, ...]) -> Iterator[BeamSearch]:
    """A search after each of its steps."""
    search = BeamSearch(fields, len(PROMPT), limit, stop_ids)
    rows = [np.zeros(limit, np.int32) for _ in range(fields.width)]
    for row in rows:
        row[: len(PROMPT)] = PROMPT
    while not search.done:
        count = fields.candidate_count(len(stop_ids))
        for beam, row in enumerate(rows):
            pairs = logprobs_after(row[: search.length].tolist())[:count]
            search.report(beam, tuple(pairs))
        search.advance(lambda beam: rows[beam])
        before = [row.copy() for row in rows]
        for move in search.take_moves():
            rows[move.beam][:] = before[move.parent]
            rows[move.beam][search.length - 1] = move.token
        yield search


def brute_force(fields: BeamFields, limit: int, stop_ids: tuple[int, ...]) -> Iterator[Best]:
    """The best after each step, of all there is: lists of tokens and sums, nothing clever."""
    running: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[Best] = []
    for _ in range(limit - len(PROMPT)):
        grown = [
            ([*tokens, token], total + logprob)
            for tokens, total in running
            for token, logprob in logprobs_after(PROMPT + tokens)
        ]
        grown.sort(key=lambda beam: -beam[1])
        finished += [
            (tokens, total / len(tokens) ** fields.length_penalty)
            for tokens, total in grown[: fields.width]
            if tokens[-1] in stop_ids
        ]
        finished = sorted(finished, key=lambda best: -best[1])[: fields.width]
        running = [beam for beam in grown if beam[0][-1] not in stop_ids][: fields.width]
        alive = [
            (tokens, total / len(tokens) ** fields.length_penalty) for tokens, total in running
        ]
        yield max(finished + alive, key=lambda best: best[1])


@pytest.mark.parametrize("early_stopping", ["heuristic", "first", "never"])
@pytest.mark.parametrize(("width", "penalty"), list(product((1, 2, 3, 5), (-0.5, 0.0, 0.7, 1.5))))
def test_the_best_is_that_of_brute_force(
    width: int, penalty: float, early_stopping: EarlyStopping
) -> None:
    fields = BeamFields(width, penalty, early_stopping, stream_best=True)
    stop_ids = (2, 7)
    steps = zip(searched(fields, 24, stop_ids), brute_force(fields, 24, stop_ids), strict=False)
    former = None
    for search, (tokens, score) in steps:
        if search.done:
            assert search.best is None
            break
        assert search.best is not None
        assert search.best.tokens.tolist() == tokens
        assert search.best.score == pytest.approx(score, rel=1e-5)
        assert search.best.stopped == (tokens[-1] in stop_ids)
        # The same object is the same best, which nobody has to be told again.
        assert (search.best is former) == (former is not None and former.tokens.tolist() == tokens)
        former = search.best
    else:
        raise AssertionError("the search did not end")
    if former is not None and former.stopped:
        assert search.hypotheses(1)[0].score >= former.score


def test_a_search_that_does_not_tell_keeps_no_best() -> None:
    assert all(search.best is None for search in searched(BeamFields(3), 16, (2,)))


# What a reader gets of it.


def generation_of(tokenizer: object = None) -> Generation:
    beams = BeamFields(2, stream_best=True)
    asked = Request("r", np.array(PROMPT, np.int32), 16, beams=beams)
    return Generation(asked, b"", tokenizer, (), "kind")  # type: ignore[arg-type]


def hypothesis(*tokens: int, score: float = -1.0, stopped: bool = False) -> Hypothesis:
    return Hypothesis(np.array(tokens, np.int32), score, stopped)


def test_a_slow_reader_gets_the_latest_only_and_nothing_after_the_end() -> None:
    async def main() -> None:
        generation = generation_of()
        generation.accept("engine", 0)
        deltas = generation.deltas([0])
        assert await anext(deltas) is None
        generation.show_best(hypothesis(5))
        assert await anext(deltas) == BestSoFar("", [5], -1.0)
        for tokens in ((5, 6), (5, 6, 7), (8, 9, 10, 11)):
            generation.show_best(hypothesis(*tokens, score=-len(tokens)))
        assert await anext(deltas) == BestSoFar("", [8, 9, 10, 11], -4.0)
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        generation.show_best(generation.best or hypothesis())
        await asyncio.sleep(0)
        assert not waiting.done(), "what has been shown is not shown again"
        generation.show_best(hypothesis(12))
        generation.end_beams([hypothesis(5, 6, 2, score=-0.5, stopped=True)])
        last = await waiting
        assert isinstance(last, Delta) and last.token_ids == [5, 6, 2] and last.ending
        assert generation.best is None and generation.samples[0].score == -0.5
        assert [delta async for delta in deltas] == []
        # Who comes late gets the answer alone.
        assert [type(delta) async for delta in generation.deltas([0])] == [type(None), Delta]

    asyncio.run(main())


def test_text_is_that_of_the_tokens_whatever_came_before(
    llama: Model, llama_directory: Path
) -> None:
    """Bests that grow, branch off, shrink and end in the middle of characters."""
    rng = random.Random(4)

    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            tokenizer = stack.replica.router.leaders[0].tokenizer
            assert tokenizer is not None
        generation = generation_of(tokenizer)
        generation.accept("engine", 0)
        deltas = generation.deltas([0])
        await anext(deltas)
        tokens: list[int] = tokenizer.encode("a fox — ")
        for _ in range(300):
            tokens = tokens[: rng.choice([len(tokens)] * 3 + [rng.randrange(len(tokens) + 1)])]
            tokens = tokens + [rng.randrange(8, 384) for _ in range(rng.randrange(1, 4))]
            stopped = rng.random() < 0.2
            generation.show_best(hypothesis(*tokens, stopped=stopped))
            found = await anext(deltas)
            assert isinstance(found, BestSoFar) and found.token_ids == tokens
            whole = tokenizer.decode(tokens)
            if stopped:
                assert found.text == whole
            else:
                # What is incomplete is held back, and is at most three bytes.
                assert whole.startswith(found.text) and len(whole) - len(found.text) <= 1

    asyncio.run(main())


# Over both planes.

STOPS = list(range(100, 116))


def searches(stream_best: bool = True) -> list[pb.GenerateRequest]:
    rng = random.Random(7)
    messages = []
    for index, (width, penalty) in enumerate(product((2, 4), (0.6, 1.0, 1.4))):
        prompt = [rng.randrange(8, 384) for _ in range(rng.randrange(5, 40))]
        search = pb.BeamSearch(width=width, length_penalty=penalty, stream_best=stream_best)
        message = request(prompt, 20, beam_search=search, request_id=f"search-{index}")
        message.stopping.stop_token_ids.extend(STOPS)
        message.output.sample_count = width
        messages.append(message)
    return messages


Recorded = dict[str, list[Best]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """All bests that searches had to show, by request; clients may have missed some."""
    shown: Recorded = {}
    show_best: Callable[[Generation, Hypothesis], None] = Generation.show_best

    def record(self: Generation, best: Hypothesis) -> None:
        if best is not self.best:
            entry = (best.tokens.tolist(), best.score)
            shown.setdefault(self.request.request_id, []).append(entry)
        show_best(self, best)

    monkeypatch.setattr(Generation, "show_best", record)
    return shown


def is_part(bests: list[pb.BestSoFar], shown: list[Best]) -> bool:
    """Whether a client got some of what was shown, in that order."""
    left = iter(tokens for tokens, _ in shown)
    return all(any(list(best.token_ids) == tokens for tokens in left) for best in bests)


async def score_of(stack: Stack, message: pb.GenerateRequest, output: list[int]) -> float:
    """The score that tokens have by the log-probabilities of the model."""
    prompt = [*message.token_ids.ids, *output]
    answer = await stack.generate(request(prompt, 1, output=pb.Output(prompt_logprob_count=0)))
    total = sum(entry.logprob for entry in answer.prompt_logprobs[-len(output) :])
    return total / len(output) ** message.beam_search.length_penalty


def test_bests_are_what_the_model_says_and_lead_to_the_answer(
    llama: Model, llama_directory: Path, recorded: Recorded
) -> None:
    async def main() -> None:
        ended_early = 0
        async with running_stack(llama, directory=llama_directory) as stack:
            tokenizer = stack.replica.router.leaders[0].tokenizer
            assert tokenizer is not None
            answers = await stack.together(searches())
            for message, answer in zip(searches(), answers, strict=True):
                bests, shown = answer.bests, recorded[message.request_id]
                assert bests and is_part(bests, shown)
                running = [len(tokens) for tokens, _ in shown if tokens[-1] not in STOPS]
                assert running == sorted(set(running))
                for best in bests:
                    output = list(best.token_ids)
                    score = await score_of(stack, message, output)
                    assert best.score == pytest.approx(score, abs=1e-4)
                    whole = tokenizer.decode(output)
                    assert whole.startswith(best.text) and len(whole) - len(best.text) <= 1
                tokens, score = shown[-1]
                if tokens[-1] in STOPS:
                    ended_early += 1
                    assert answer.finished[0].score >= score - 1e-6
                if tokens == answer.ids:
                    assert answer.finished[0].score == pytest.approx(score)
                    if bests[-1].token_ids == tokens:
                        assert answer.text == bests[-1].text
            assert ended_early
            await stack.idle()

    asyncio.run(main())


def test_answers_are_the_same_and_nothing_is_shown_unless_asked_for(
    llama: Model, llama_directory: Path, recorded: Recorded
) -> None:
    async def main() -> None:
        async with running_stack(llama, directory=llama_directory) as stack:
            silent = await stack.together(searches(stream_best=False))
            assert recorded == {}
            await stack.idle()
            told = await stack.together(searches())
            await stack.idle()
        for one, other in zip(silent, told, strict=True):
            assert other.bests and not one.bests
            assert one.tokens == other.tokens and one.texts == other.texts
            assert [end.score for end in one.finished.values()] == pytest.approx(
                [end.score for end in other.finished.values()], abs=1e-4
            )

    asyncio.run(main())


@pytest.mark.parametrize(("preemption", "host_blocks"), [("swap", 200), ("recompute", 0)])
def test_preemption_changes_no_best(
    llama: Model, preemption: str, host_blocks: int, recorded: Recorded
) -> None:
    async def main() -> None:
        async with running_stack(llama) as stack:
            await stack.together(searches())
        alone = {name: list(shown) for name, shown in recorded.items()}
        recorded.clear()
        async with running_stack(
            llama,
            block_size=8,
            block_count=26,
            host_block_count=host_blocks,
            preemption=preemption,
        ) as stack:
            pressed = await stack.together(searches())
            assert stack.loop.scheduler.totals.preemptions > 0
            await stack.idle()
        for message, answer in zip(searches(), pressed, strict=True):
            shown, expected = recorded[message.request_id], alone[message.request_id]
            assert [tokens for tokens, _ in shown] == [tokens for tokens, _ in expected]
            scores = [score for _, score in expected]
            assert [score for _, score in shown] == pytest.approx(scores, abs=1e-4)
            assert answer.bests and is_part(answer.bests, shown)

    asyncio.run(main())


def test_after_a_takeover_the_search_shows_its_best_from_the_first_token_on(
    llama: Model, monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    message = searches()[-1]

    async def main() -> None:
        async with running_stack(llama) as stack:
            undisturbed = await stack.generate(message)
            expected = [tokens for tokens, _ in recorded.pop(message.request_id)]
        async with running_stack(llama) as stack:
            loop, deliver = stack.loop, stack.loop._deliver

            def fail_later(outcome: Outcome) -> None:
                deliver(outcome)
                if len(recorded.get(message.request_id, [])) == 5:
                    raise RuntimeError("planted")

            monkeypatch.setattr(loop, "_deliver", fail_later)
            answer = await stack.generate(message)
            assert stack.loop is not loop
            assert answer.tokens == undisturbed.tokens
            shown = recorded[message.request_id]
            assert [tokens for tokens, _ in shown] == expected[:5] + expected
            assert is_part(answer.bests, shown)
            await stack.idle()

    asyncio.run(main())
