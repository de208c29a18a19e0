"""The one seam between the scheduler and whatever generates tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from copris_lightning.core.cap import Cap, Load
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.segments import Span
from copris_lightning.weights.adapter import AdapterShape
from copris_lightning.weights.transport import Run, Transport


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


Ending = Literal["stop", "length", "held"]
"""Why a stream ended: a token that ends the response, the budget, or :meth:`Engine.hold`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Newly generated tokens.

    Attributes:
        token_ids: in order; may be empty.
        logprobs: natural log, of the distribution sampled from; ``None`` if
            the request asked for none.
        version: the policy version that made them, as far as is known when the chunk comes: never
            newer than the truth, which the spans tell.
        ending: set on a stream's last chunk.
        spans: on a stream's last chunk, over all tokens of the stream, oldest first; their lengths
            add up to the tokens of all its chunks. Empty before.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    version: int
    ending: Ending | None = None
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What the run needs from the engine, known before it boots.

    Attributes:
        model: path or hub name of the checkpoint, as for ``from_pretrained``.
        max_num_seqs: how many requests will be in flight at most.
        max_model_len: longest prompt plus response, in tokens.
        vocab_size: tokens that the tokenizer knows and the model has an embedding for.
        seed: of the engine's sampling.
        adapter: the LoRA adapters that syncs bring; ``None`` if they bring whole weights.
        trust_remote_code: whether to run code that the checkpoint brings along.
        keeps: whether it will be held with its requests.
        streams: whether it is to generate while the trainer trains.
        min_num_seqs: how many will be in flight at least, by how full its KV cache is: then it has
            to tell that (:meth:`Engine.load`). By default the number is fixed.
    """

    model: str
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    seed: int = 0
    adapter: AdapterShape | None = None
    trust_remote_code: bool = False
    keeps: bool = False
    streams: bool = False
    min_num_seqs: int | None = None

    @property
    def cap(self) -> Cap:
        """How many requests may be in flight."""
        least = self.max_num_seqs if self.min_num_seqs is None else self.min_num_seqs
        return Cap(least, self.max_num_seqs)


@runtime_checkable
class Engine(Protocol):
    """Generates tokens. All coroutines run on the loop that :meth:`new_event_loop` made.

    It is either running or held. It is held when it has started, and after :meth:`hold`; requests
    that come meanwhile wait. :meth:`release` lets it run under a policy version.
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
        """Boot. It is held, and version 0, when this returns."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response, token ids in and token ids out.

        Closing the generator early aborts the request and throws away what was not read.

        Raises:
            EngineError: the engine died or refused the request.
        """
        ...

    async def hold(self, *, keep: bool = False) -> None:
        """Stop generating.

        Args:
            keep: leave all requests where they are, with their keys and values; their streams go
                on after the release. Otherwise every open stream ends: its last chunk, ``"held"``,
                brings all tokens that were made and not yet read. Nobody need read them for this
                to return.
        """
        ...

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        """Generate again; tokens made from now on bear ``version``.

        Args:
            version: not below the present one.
            clear_kv: forget keys and values computed before, prefixes of later requests included.
        """
        ...

    def load(self) -> Load | None:
        """How busy it is, now or lately; ``None`` if it does not tell."""
        ...

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """Log-probs under the model's own distribution of each sequence's tokens after its first;
        also while held.

        Returns:
            one list of ``len(sequence) - 1`` values per sequence, or ``None`` from an engine
            that has no model to ask.
        """
        ...

    def transport(self, rank: int, run: Run) -> Transport:
        """The way of weights to this engine, made once on every rank of the trainer.

        Args:
            rank: of this process in the trainer; rank 0 has started the engine.
            run: on rank 0, reaches the engine's loop from the main thread.
        """
        ...

    async def close(self) -> None:
        """Free everything. May be called twice, and after a failure."""
        ...

    def kill(self) -> None:
        """End what is left of it at once; called from another thread, when its loop hangs."""
        ...
