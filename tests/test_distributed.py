"""Training on two ranks: the same trajectories, losses, gradients and weights as on one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from copris_testing import digest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import SCENARIOS, TIME_LIMIT_S, train, trained_adapters
from simulated_fits import build
from two_ranks import outcomes, run

from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.sharding import check_strategy


@pytest.fixture(scope="module")
def results(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each scenario gave, a list over the two ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    return run("ranks.py", tiny_checkpoint, directory, SCENARIOS)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same training on one rank, where twice as many micro-batches make a batch; on padded
    sequences, while the two ranks pack theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("one")
    yield train("one", tiny_checkpoint, directory, model={"packing": False})
    torch.set_num_threads(threads)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(results: dict[str, Any], alone: Any, strategy: str) -> None:
    leader, other = outcomes(results, strategy)
    # The very same trajectories, advantages and versions.
    assert leader["ledger"] == alone["ledger"]
    assert len(leader["ledger"]) == 3 * 8
    assert leader["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert leader["losses"] == other["losses"]
    for ours, theirs in zip(leader["gradients"], alone["gradients"], strict=True):
        assert theirs.norm() > 0.02  # the limit: it is clipped
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    for ours, theirs in zip(leader["weights"], alone["weights"], strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for name, value in alone["metrics"].items():
        area = name.partition("/")[0]
        if area in ("is", "kl", "policy", "staleness", "train") and name != "train/tokens_per_s":
            assert leader["metrics"][name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_engine_gets_the_weights_of_the_trainer(results: dict[str, Any], strategy: str) -> None:
    leader, other = outcomes(results, strategy)
    assert other["synced"] == []
    # The first sync comes before any training.
    assert len(leader["synced"]) == 1 + len(leader["weights"])
    for synced, weights in zip(leader["synced"][1:], leader["weights"], strict=True):
        assert synced == {n: digest(w) for n, w in weights.items() if n != "lm_head.weight"}
    assert leader["synced"][1] != leader["synced"][0]


def test_a_reference_is_split_too_and_activations_may_be_recomputed(
    results: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from copris_lightning.core.estimator.penalties import KLPenalty

    leader, _ = outcomes(results, "fsdp2_with_a_reference")
    alone = train("one", tiny_checkpoint, tmp_path, model={"kl": KLPenalty(0.1)})
    assert leader["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for ours, theirs in zip(leader["gradients"], alone["gradients"], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_mixed_precision_is_the_same_with_split_weights(
    results: dict[str, Any], alone: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    leader, _ = outcomes(results, "fsdp2_in_mixed_precision")
    # The very same micro-batches: their shapes decide how bf16 rounds.
    options: Any = {"precision": "bf16-mixed", "accumulate_grad_batches": 4}
    whole = train("one", tiny_checkpoint, tmp_path, **options)
    for ours, theirs, exact in zip(
        leader["gradients"], whole["gradients"], alone["gradients"], strict=True
    ):
        # Much nearer to each other than to full precision.
        assert (ours - theirs).norm() <= 0.1 * (theirs - exact).norm()


def test_adapters_train_with_activations_computed_again(
    results: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Also where the reference is the policy without them."""
    leader, _ = outcomes(results, "fsdp2_with_adapters")
    model = {**trained_adapters(), "gradient_checkpointing": False}
    alone = train("one", tiny_checkpoint, tmp_path, model=model)
    assert leader["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for ours, theirs in zip(leader["gradients"], alone["gradients"], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert leader["synced"][0] == alone["synced"][0]


@pytest.mark.parametrize("saved", ["fsdp2_resumed", "fsdp2_in_parts_resumed"])
def test_a_resumed_fsdp2_run_goes_on_as_if_it_had_not_stopped(
    results: dict[str, Any], saved: str
) -> None:
    straight, _ = outcomes(results, "fsdp2")
    resumed, _ = outcomes(results, saved)
    assert resumed["ledger"] == straight["ledger"]
    assert resumed["losses"] == pytest.approx(straight["losses"][2:], abs=1e-6)
    assert {n: digest(w) for n, w in resumed["weights"][-1].items()} == {
        n: digest(w) for n, w in straight["weights"][-1].items()
    }


def test_a_rollout_longer_than_the_ranks_time_limit_keeps_them_asleep(
    results: dict[str, Any],
) -> None:
    leader, other = outcomes(results, "long_rollout")
    assert len(leader["ledger"]) == 8
    assert other["wall_s"] > TIME_LIMIT_S
    assert other["cpu_s"] < 0.5 * TIME_LIMIT_S


def test_skewed_lengths_and_a_rank_with_nothing_to_learn_from(results: dict[str, Any]) -> None:
    leader, _ = outcomes(results, "skewed")
    records = leader["ledger"]
    pairs = [records[i : i + 2] for i in range(0, len(records), 2)]
    assert len(pairs) == 6
    # It did happen that one rank's only trajectory was left out, and both.
    assert any(sum("excluded" in r for r in pair) == 1 for pair in pairs)


def test_a_broken_trajectory_on_one_rank_makes_all_start_again(results: dict[str, Any]) -> None:
    leader, other = outcomes(results, "quarantined")
    excluded = [r for r in leader["ledger"] if "excluded" in r]
    assert 0 < len(excluded) < len(leader["ledger"])
    assert leader["losses"] == other["losses"]
    assert all(torch.isfinite(g).sum() > 0 for g in leader["gradients"])


def test_fsdp2_without_sizes_is_told_them(results: dict[str, Any]) -> None:
    for message in outcomes(results, "fsdp2_without_sizes"):
        assert "tensor_parallel_size=2" in message
        assert "data_parallel_size=2, the number of ranks" in message


def test_fsdp1_needs_a_gpu_and_says_so() -> None:
    with pytest.raises((ValueError, MisconfigurationException), match="GPU"):
        L.Trainer(accelerator="cpu", strategy="fsdp", logger=False)


def test_deepspeed_needs_a_gpu_and_says_so_before_an_engine_boots(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, strategy="deepspeed_stage_2")
    with pytest.raises(RuntimeError, match="only supported on CUDA GPUs"):
        trainer.fit(module, data)
    assert data.session is None
    assert not log


def test_a_strategy_whose_weights_cannot_be_had_is_refused() -> None:
    trainer: Any = SimpleNamespace(strategy=object())
    with pytest.raises(ConfigurationError, match=r"trainer\.strategy=object.* use auto, ddp"):
        check_strategy(trainer)


@pytest.mark.parametrize("where", ["failing", "failing_in_validation"])
def test_a_failure_on_rank_0_ends_the_others_too(results: dict[str, Any], where: str) -> None:
    leader, other = outcomes(results, where)
    assert leader.startswith("RewardError")
    assert other.startswith("RolloutError('the rollout failed on rank 0: RewardError")


def test_fsdp1_units_are_put_together_one_at_a_time(results: dict[str, Any]) -> None:
    for result in outcomes(results, "fsdp1_weights"):
        assert result["gathered"] == result["expected"]
        assert result["held"] < 10**6


def test_fused_and_renamed_weights_are_put_together_as_they_would_be_saved(
    results: dict[str, Any],
) -> None:
    for result in outcomes(results, "split_experts"):
        assert len(result) == 4
        for gathered, expected in result.values():
            assert gathered == expected


def test_a_checkpoint_within_a_step_is_the_same_on_all_ranks(results: dict[str, Any]) -> None:
    for result in outcomes(results, "ddp_cut_within_a_step"):
        uncut, cut = result["uncut"], result["cut"]
        assert len(cut["losses"]) == 2
        # The first of them is of a batch that was trained on before and after the cut.
        assert cut["losses"] == pytest.approx(uncut["losses"][1:], rel=1e-5)
        for ours, theirs in zip(cut["weights"], uncut["weights"][1:], strict=True):
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        batches = [record for record in uncut["ledger"] if record["batch"] >= 1]
        assert cut["ledger"] == batches
        for name in ("staleness/lag_mean", "staleness/lag_max", "is/ratio_mean"):
            assert cut["metrics"][name] == pytest.approx(uncut["metrics"][name], rel=1e-6)


def test_a_rank_that_waits_for_another_is_idle(results: dict[str, Any]) -> None:
    figures, same = (result["metrics"] for result in outcomes(results, "ddp_with_a_slow_rank"))
    cycle = figures["time/cycle_s"]

    def seconds(activity: str, rank: int) -> float:
        return float(figures[f"time/{activity}_fraction/rank_{rank}"] * cycle)

    # 1.5 s more for each of two micro-batches. What rank 0 waits for the second one is within
    # DDP's own communication. (A rank that gets no processor for a while makes the other wait.)
    assert seconds("train", 1) > 2.9
    assert seconds("idle", 0) > seconds("idle", 1) + 0.7
    for rank in range(2):
        whole = sum(seconds(a, rank) for a in ("rollout", "score", "train", "sync", "idle"))
        assert whole == pytest.approx(cycle, rel=1e-3)
    mean = (seconds("idle", 0) + seconds("idle", 1)) / 2
    assert figures["time/idle_fraction"] * cycle == pytest.approx(mean, rel=0.05)
    for name in ("time/idle_fraction", "train/tokens_per_s"):
        assert figures[name] == same[name]
