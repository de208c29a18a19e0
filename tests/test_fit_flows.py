"""Whole fits in each of the four flows, on the simulated engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import FLOWS, IN_FLOWS, train_in
from simulated_fits import build, ledger
from two_ranks import outcomes, run

from copris_lightning import Evaluation
from copris_lightning.core.cap import Cap
from copris_lightning.core.estimator.corrections import Truncation
from copris_lightning.datamodules.settings import Flow
from copris_lightning.engines.simulated_tokens import KVCache
from copris_lightning.errors import ConfigurationError

SAME = ("batch", "prompt_id", "sample", "segments", "response", "reward", "advantage")
every_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)


def fit(checkpoint: Path, directory: Path, flow: dict[str, Any], **options: Any) -> Any:
    """A fit in a flow, whose training takes some virtual time."""
    ckpt_path = options.pop("ckpt_path", None)
    data = {**flow, "max_staleness": 2, **options.pop("data", {})}
    trainer, module, datamodule, log = build(checkpoint, directory, data=data, **options)
    datamodule.engine.training_s = 0.1
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer, log


def test_a_run_whose_cap_follows_the_kv_cache_goes_on_the_same(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def run(name: str, cut: Path | None = None) -> tuple[list[dict[str, Any]], float]:
        keep = ModelCheckpoint(
            tmp_path, filename=name + "-{step}", every_n_train_steps=3, save_top_k=-1
        )
        options = {"max_steps": 8, "enable_checkpointing": True, "callbacks": [keep]}
        trainer, module, datamodule, _ = build(
            tiny_checkpoint,
            tmp_path / name,
            data={"cap": Cap(4, 24)},
            kv_cache=KVCache(160, prefix_s=1e-3),
            **options,
        )
        trainer.fit(module, datamodule=datamodule, ckpt_path=cut)
        return records(tmp_path / name), trainer.callback_metrics["rollout/cap"].item()

    whole, cap = run("whole")
    rest, same = run("cut", tmp_path / "whole-step=3.ckpt")
    assert rest
    assert rest == whole[-len(rest) :]
    assert 4 < cap == same < 24


def records(directory: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in SAME} for record in ledger(directory)]


@every_flow
@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_that_saved_and_one_that_goes_on_from_there_are_the_same(
    tiny_checkpoint: Path, tmp_path: Path, flow: dict[str, Any], updates: int
) -> None:
    options = {"data": {"updates": updates}, "max_steps": 8, "enable_checkpointing": True}
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tiny_checkpoint, tmp_path / "whole", flow, callbacks=[keep], **options)
    keep = ModelCheckpoint(tmp_path, filename="later-{step}", every_n_train_steps=3, save_top_k=-1)
    cut = tmp_path / "step=3.ckpt"
    fit(tiny_checkpoint, tmp_path / "cut", flow, callbacks=[keep], ckpt_path=cut, **options)
    rest, whole = records(tmp_path / "cut"), records(tmp_path / "whole")
    assert rest
    assert rest == whole[-len(rest) :]
    assert any(len(record["segments"]) > 1 for record in rest)


@pytest.mark.parametrize(
    ("flow", "name"),
    [({"mode": "streaming"}, "flow.mode=streaming"), ({"kv": "kept"}, "flow.kv=kept")],
    ids=str,
)
def test_a_flow_that_needs_what_a_checkpoint_does_not_hold_is_named(
    tiny_checkpoint: Path, tmp_path: Path, flow: dict[str, Any], name: str
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True}
    fit(tiny_checkpoint, tmp_path / "a", {}, callbacks=[keep], max_steps=2, **options)
    with pytest.raises(ConfigurationError, match=f"{name} needs the engine's log-probs"):
        fit(tiny_checkpoint, tmp_path / "b", flow, ckpt_path=tmp_path / "step=2.ckpt", **options)


@every_flow
def test_tokens_are_of_the_lags_that_the_flow_has(
    tiny_checkpoint: Path, tmp_path: Path, flow: dict[str, Any]
) -> None:
    trainer, log = fit(tiny_checkpoint, tmp_path, flow, max_steps=8)
    found = [(r["batch"], s) for r in ledger(tmp_path) for s in r["segments"]]
    assert max(batch - segment["version"] for batch, segment in found) <= 2
    kept = any(segment["kv_version"] < segment["version"] for _, segment in found)
    assert kept == (flow.get("kv") == "kept")
    assert ("staleness/kv_lag_mean" in trainer.callback_metrics) is True
    assert (trainer.callback_metrics["staleness/kv_lag_mean"] > 0) == kept
    assert log.count("collect") == 8


@every_flow
def test_evaluations_during_a_fit(
    tiny_checkpoint: Path, tmp_path: Path, flow: dict[str, Any]
) -> None:
    from copris_testing import SomePrompts

    data = {"evaluations": {"val": Evaluation(SomePrompts(5), samples=2)}}
    options = {"max_steps": 4, "val_check_interval": 1, "num_sanity_val_steps": 1}
    trainer, _ = fit(tiny_checkpoint, tmp_path, flow, data=data, **options)
    assert "val/val/avg_at_k" in trainer.callback_metrics
    assert len(ledger(tmp_path)) == 4 * 8


@pytest.fixture(scope="module")
def on_two_ranks(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run("ranks.py", tiny_checkpoint, tmp_path_factory.mktemp("flows"), IN_FLOWS)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_in_every_flow(
    on_two_ranks: Any, tiny_checkpoint: Path, tmp_path: Path, strategy: str, name: str
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train_in(name, "one", tiny_checkpoint, tmp_path)
    torch.set_num_threads(threads)
    leader, other = outcomes(on_two_ranks, f"{strategy}_{name}")
    assert leader["ledger"] == alone["ledger"]
    assert leader["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert leader["losses"] == other["losses"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "streamed"}, r"^mode='streamed' must be staged or streaming"),
        ({"kv": "old"}, r"^kv='old' must be fresh or kept"),
        ({"mode": "streaming"}, r"^mode=streaming needs max_staleness"),
        (
            {"mode": "streaming", "max_staleness": 1, "behavior_logprobs": "trainer"},
            r"^behavior_logprobs=trainer with mode=streaming: .* weights that are gone",
        ),
        (
            {"kv": "kept", "behavior_logprobs": "trainer"},
            r"^behavior_logprobs=trainer with kv=kept: .* keys and values of older weights",
        ),
        ({"behavior_logprobs": "mine"}, r"^behavior_logprobs='mine' must be"),
    ],
    ids=str,
)
def test_flows_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Flow(**settings)


def test_behaviour_logprobs_are_by_default_those_that_can_be_had() -> None:
    flows = [Flow(**flow, max_staleness=1) for flow in FLOWS.values()]
    assert [flow.source for flow in flows] == ["trainer", "engine", "engine", "engine"]
    assert Flow(behavior_logprobs="engine").source == "engine"


def test_a_correction_of_the_mismatch_is_refused_where_the_trainers_are_not_computed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"flow\.mode=staged and flow\.kv=fresh"):
        fit(tiny_checkpoint, tmp_path, {"kv": "kept"}, model={"corrections": [Truncation()]})
