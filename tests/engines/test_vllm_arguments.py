"""What vLLM is told, and what is refused before it boots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from copris_lightning import VLLMEngine
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.vllm_arguments import stream_interval
from copris_lightning.errors import ConfigurationError
from copris_lightning.weights.adapter import AdapterShape


@pytest.mark.parametrize(
    ("cap", "tokens"), [(1, 1), (32, 1), (33, 2), (64, 2), (256, 8), (1024, 32), (5000, 32)]
)
def test_the_more_are_in_flight_the_coarser_they_stream(cap: int, tokens: int) -> None:
    assert stream_interval(cap) == tokens


@pytest.mark.parametrize(
    ("spec", "sleep_level", "says"),
    [
        ({"keeps": True}, 1, r"^sleep_level=1 with flow\.kv=kept: "),
        ({"streams": True}, 2, r"^sleep_level=2 with flow\.mode=streaming: "),
        ({"keeps": True, "adapter": AdapterShape(4, ())}, None, r"^flow\.kv=kept with syncs of ad"),
    ],
)
def test_what_does_not_go_with_a_flow_is_refused(
    tiny_checkpoint: Path, spec: dict[str, Any], sleep_level: Any, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        VLLMEngine(sleep_level=sleep_level).validate(
            EngineSpec(str(tiny_checkpoint), 4, 64, vocab_size=98, **spec)
        )
