"""What the reader of one generation has, whatever number of streams it came from. Knows pb2."""

from __future__ import annotations

import uuid

from protos.inference.v1 import inference_pb2 as pb
from protos.validation import MAX_SAMPLES


class Progress:
    """Counts a generation's events, and makes the request for what is missing.

    The request id is settled here: a second attempt is to find the generation of the first.

    Attributes:
        engine_id: of the engine that runs it, once it is accepted.
        events: taken so far that bring the answer further.
        complete: the last one was among them.
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = pb.GenerateRequest()
        self._request.CopyFrom(request)
        self._request.request_id = request.request_id or uuid.uuid4().hex
        self._received = dict(enumerate(request.received_token_counts))
        self._finished: set[int] = set()
        # Every stream brings the prompt's log-probabilities from the first on.
        self._prompt_logprobs = 0
        self._prompt_logprobs_of_stream = 0
        self._accepted = False
        self.engine_id = ""
        self.events = 0
        self.complete = False

    @property
    def request_id(self) -> str:
        return self._request.request_id

    def resume(self) -> pb.GenerateRequest:
        """The request for what is missing; the same message each time."""
        self._prompt_logprobs_of_stream = 0
        if any(self._received.values()):
            output = self._request.output
            samples = output.sample_count if output.HasField("sample_count") else 1
            # A count that the service refuses is the service's to refuse.
            length = max(min(samples, MAX_SAMPLES), 1 + max(self._received))
            counts = [self._received.get(sample, 0) for sample in range(length)]
            self._request.received_token_counts[:] = counts
        return self._request

    def take(self, event: pb.GenerateResponse) -> bool:
        """Counts an event, and cuts off what came before; returns whether anything is left.

        Only events with log-probabilities of the prompt are ever changed.
        """
        kind = event.WhichOneof("event")
        if kind == "delta":
            delta = event.delta
            count = len(delta.token_ids)
            self._received[delta.sample] = self._received.get(delta.sample, 0) + count
            if delta.prompt_logprobs:
                self._cut_prompt_logprobs(delta)
            left = bool(count or delta.text or delta.prompt_logprobs)
            self.events += left
            return left
        if kind == "best_so_far":
            return True
        new = True
        if kind == "accepted":
            self.engine_id = event.accepted.engine_id
            new, self._accepted = not self._accepted, True
        elif kind == "finished":
            new = event.finished.sample not in self._finished
            self._finished.add(event.finished.sample)
        else:
            new, self.complete = not self.complete, True
        self.events += new
        return new

    def _cut_prompt_logprobs(self, delta: pb.Delta) -> None:
        start = self._prompt_logprobs_of_stream
        self._prompt_logprobs_of_stream += len(delta.prompt_logprobs)
        del delta.prompt_logprobs[: max(self._prompt_logprobs - start, 0)]
        self._prompt_logprobs += len(delta.prompt_logprobs)
