"""The one seam between the scheduler and whatever generates tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from copris_lightning.core.outcome import FinishReason
from copris_lightning.core.sampling import Sampling
from copris_lightning.weights.adapter import AdapterShape
from copris_lightning.weights.transport import Run, Weights


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an engine chooses tokens; the same for all requests of a scheduler.

    Attributes:
        sampling: from which distribution; greedy decoding depends on no seed.
        stop_token_ids: tokens that end the response, the model's own ends among them (the stop
            token is part of it).
        logprobs: whether chunks bring log-probs; they cost an engine time.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What an engine is asked for.

    Attributes:
        request_id: unique over the engine's life.
        token_ids: the prompt, followed by the response so far when a trajectory is resumed.
        max_new_tokens: the remaining budget, > 0.
        decoding: how to choose tokens, and which ends the response.
        seed: one per trajectory, distinct among all of a run. Engines mix in
            ``len(token_ids)``, so that a resumed response does not repeat its random numbers.
    """

    request_id: str
    token_ids: tuple[int, ...]
    max_new_tokens: int
    decoding: Decoding
    seed: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Newly generated tokens.

    Attributes:
        token_ids: in order; may be empty.
        logprobs: natural log, of the distribution sampled from; ``None`` if
            the request asked for none.
        version: the policy version of the weights that produced them.
        finish_reason: set on a request's last chunk.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    version: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What the run needs from the engine, known before it boots.

    Attributes:
        model: path or hub name of the checkpoint, as for ``from_pretrained``.
        max_num_seqs: how many requests will be in flight.
        max_model_len: longest prompt plus response, in tokens.
        vocab_size: tokens that the tokenizer knows and the model has an embedding for.
        seed: of the engine's sampling.
        adapter: the LoRA adapters that syncs bring; ``None`` if they bring whole weights.
        trust_remote_code: whether to run code that the checkpoint brings along.
    """

    model: str
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    seed: int = 0
    adapter: AdapterShape | None = None
    trust_remote_code: bool = False


@runtime_checkable
class Engine(Protocol):
    """Generates tokens. All coroutines run on the loop that :meth:`new_event_loop` made.

    Cancelling the consumer of :meth:`generate` aborts the request; nothing more of it is
    produced. :attr:`version` names the weights in use.
    """

    @property
    def version(self) -> int:
        """Policy version of the weights that generate now."""
        ...

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """The kind of loop this engine lives on (a simulated engine brings virtual time)."""
        ...

    def validate(self, spec: EngineSpec) -> None:
        """Check settings against the run, before anything slow starts.

        Raises:
            ConfigurationError: names the setting that cannot work.
        """
        ...

    async def start(self, spec: EngineSpec) -> None:
        """Boot. Generation may begin when this returns."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response, token ids in and token ids out.

        Raises:
            EngineError: the engine died or refused the request.
        """
        ...

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights; no request may be in flight.

        Args:
            weights: names as in the checkpoint, full tensors, tied weights once.
            version: what tokens made with them are labelled from now on.

        Raises:
            WeightSyncError: requests are in flight, or the weights did not arrive.
        """
        ...

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """Log-probs under the model's own distribution of each sequence's tokens after its first.

        Returns:
            one list of ``len(sequence) - 1`` values per sequence, or ``None`` from an engine
            that has no model to ask.
        """
        ...

    async def explain_mismatch(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Say which of the given weights the engine does not compute with (after a mismatch)."""
        ...

    async def close(self) -> None:
        """Free everything. May be called twice, and after a failure."""
        ...


@runtime_checkable
class RankedSync(Protocol):
    """An engine that can take weights from all of the trainer's ranks, with no copy in between."""

    def new_sender(self, weights: Weights, rank: int, run: Run) -> Callable[[], None] | None:
        """Make the sending side, on each rank; the engine has started.

        Args:
            weights: what is sent each time.
            rank: of this process in the trainer; rank 0 has the engine.
            run: on rank 0, reaches the engine.

        Returns:
            a function that sends the weights, to be called on each rank between
            :meth:`begin_update` and :meth:`finish_update`; ``None`` if the engine is set to take
            them by ``update_weights`` instead.
        """
        ...

    async def begin_update(self) -> None:
        """Be ready for weights.

        Raises:
            WeightSyncError: requests are in flight.
        """
        ...

    async def finish_update(self, version: int) -> None:
        """Drop what was computed with the old weights; new tokens bear ``version``."""
        ...


@runtime_checkable
class Resting(Protocol):
    """An engine that can leave its memory to the trainer."""

    async def rest(self) -> None:
        """Give memory away until the next request or update; no request may be in flight."""
        ...


@runtime_checkable
class Killable(Protocol):
    """An engine with processes of its own, which must be ended even if its loop hangs."""

    def kill(self) -> None:
        """Kill them at once; called from another thread."""
        ...
