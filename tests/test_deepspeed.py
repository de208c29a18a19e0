"""Training under DeepSpeed on two ranks of a CPU: as on one, whatever is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from copris_testing import SomePrompts, digest
from deepspeed_ranks import SCENARIOS, TWO_UPDATES, UNEVEN, falling
from ranks import train, trained_adapters
from simulated_fits import build
from two_ranks import outcomes, run

from copris_lightning import Evaluation
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.quickstart.warm_start import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def results(
    tiny_checkpoint: Path, directory: Path, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """What each scenario of the selected tests gave, a list over the two ranks."""
    markers = [item.get_closest_marker("deepspeed") for item in request.session.items]
    wanted = {name for marker in markers if marker is not None for name in marker.args}
    names = [name for name in SCENARIOS if name in wanted]
    return run("deepspeed_ranks.py", tiny_checkpoint, directory, names, DS_ACCELERATOR="cpu")


def case(scenario: str, *values: Any) -> Any:
    """A test's parameters: its scenario, which the ranks run if the test is selected, and more."""
    return pytest.param(scenario, *values, marks=pytest.mark.deepspeed(scenario))


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same training on one rank, by name; each is run once."""
    untied = tmp_path_factory.mktemp("untied")
    uneven_adapters = {**UNEVEN, "model": {**UNEVEN["model"], **trained_adapters()}}
    ways: dict[str, tuple[Path, dict[str, Any]]] = {
        "plain": (tiny_checkpoint, {}),
        "uneven": (tiny_checkpoint, UNEVEN),
        "adapters": (tiny_checkpoint, {"model": trained_adapters()}),
        "adapters and a head": (untied, uneven_adapters),
        "reference": (tiny_checkpoint, {"model": {"kl": KLPenalty(0.1)}}),
        "falling rate": (tiny_checkpoint, {"model": {"lr_scheduler": falling}}),
        "two updates": (tiny_checkpoint, TWO_UPDATES),
    }
    done: dict[str, Any] = {}

    def trained(way: str) -> Any:
        if way not in done:
            if way == "adapters and a head":
                tiny_model(untied, hidden_size=64, layers=2, tied=False)
            checkpoint, options = ways[way]
            done[way] = train("one", checkpoint, tmp_path_factory.mktemp("one"), **options)
        return done[way]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield trained
    torch.set_num_threads(threads)


def assert_near(ours: list[Any], theirs: list[Any]) -> None:
    """Gradients to 1e-5 of their norm, in full precision 1e-6 as a rule."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("scenario", "way"),
    [
        case("stage_2", "plain"),
        case("stage_3", "plain"),
        case("stage_3_uneven", "uneven"),
        case("stage_2_with_adapters", "adapters"),
        case("stage_3_with_adapters", "adapters"),
        case("stage_3_with_adapters_and_a_head", "adapters and a head"),
        case("stage_2_with_a_reference", "reference"),
    ],
)
def test_two_ranks_train_as_one(
    results: dict[str, Any], alone: Any, scenario: str, way: str
) -> None:
    leader, other = outcomes(results, scenario)
    one = alone(way)
    assert leader["ledger"] == one["ledger"]
    assert leader["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert leader["losses"] == other["losses"]
    assert max(gradient.norm() for gradient in one["gradients"]) > 0.02  # the limit: it is clipped
    assert_near(leader["gradients"], one["gradients"])
    for ours, theirs in zip(leader["weights"], one["weights"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    # The first sync, before any training: adapters begin with a model that is not changed.
    assert leader["synced"][0] == one["synced"][0]
    assert len(leader["synced"]) == len(one["synced"]) == 1 + len(one["weights"])
    assert other["synced"] == []


@pytest.mark.parametrize("scenario", [case("stage_2"), case("stage_3")])
def test_the_engine_gets_the_weights_of_the_trainer(results: dict[str, Any], scenario: str) -> None:
    leader, _ = outcomes(results, scenario)
    for synced, weights in zip(leader["synced"][1:], leader["weights"], strict=True):
        assert synced == {n: digest(w) for n, w in weights.items() if n != "lm_head.weight"}
    assert leader["synced"][1] != leader["synced"][0]


@pytest.mark.deepspeed("stage_2_in_mixed_precision")
def test_mixed_precision_rounds_neither_advantages_nor_log_probs(
    results: dict[str, Any], alone: Any
) -> None:
    leader, _ = outcomes(results, "stage_2_in_mixed_precision")
    # The first ratio is 1, so that the loss is of the advantages alone; bf16 is off by 4e-4.
    assert leader["losses"] == pytest.approx(alone("plain")["losses"][:1], abs=1e-5)


@pytest.mark.parametrize(
    ("scenario", "way", "steps"),
    [
        case("stage_2_resumed", "falling rate", 2),
        case("stage_3_resumed", "adapters", 2),
        case("stage_2_resumed_within_a_batch", "two updates", 3),
        case("stage_3_resumed_within_a_batch", "two updates", 3),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    results: dict[str, Any], alone: Any, scenario: str, way: str, steps: int
) -> None:
    resumed, _ = outcomes(results, scenario)
    straight = alone(way)
    assert resumed["ledger"] == straight["ledger"]
    assert_near(resumed["gradients"], straight["gradients"][steps:])
    for name, weight in straight["weights"][-1].items():
        torch.testing.assert_close(resumed["weights"][-1][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "scenario",
    [
        case("stage_2_cut_within_a_step"),
        case("stage_3_cut_within_a_step"),
    ],
)
def test_a_checkpoint_within_a_step_resumes_at_its_first_micro_batch(
    results: dict[str, Any], scenario: str
) -> None:
    for result in outcomes(results, scenario):
        uncut, cut = result["uncut"], result["cut"]
        assert len(cut["losses"]) == 2
        assert cut["losses"] == pytest.approx(uncut["losses"][1:], rel=1e-5)
        for ours, theirs in zip(cut["weights"], uncut["weights"][1:], strict=True):
            for name, weight in theirs.items():
                torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)
        batches = [record for record in uncut["ledger"] if record["batch"] >= 1]
        assert cut["ledger"] == batches


@pytest.mark.deepspeed(
    "stage_2_resumed", "stage_2_validated", "stage_3_resumed", "stage_3_validated"
)
def test_a_checkpoint_is_evaluated_under_stage_2_and_as_one_file_after_stage_3(
    results: dict[str, Any],
    alone: Any,
    directory: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (figures,) = outcomes(results, "stage_2_validated")[0]
    assert figures["val/response_tokens"] > 0
    for message in outcomes(results, "stage_3_validated"):
        assert "convert_zero_checkpoint_to_fp32_state_dict" in message

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    file = tmp_path / "whole.ckpt"
    convert_zero_checkpoint_to_fp32_state_dict(directory / "stage_3_resumed/last.ckpt", file)
    data = {"evaluations": {"val": Evaluation(SomePrompts(4))}}
    trainer, module, rollouts, _ = build(
        tiny_checkpoint, tmp_path, data=data, model=trained_adapters()
    )
    trainer.validate(module, rollouts, ckpt_path=file)
    loaded = module.policy.model.state_dict()
    for name, weight in alone("adapters")["weights"][1].items():  # it was saved at step 2
        torch.testing.assert_close(loaded[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.deepspeed("quarantined", "too_many_quarantined")
def test_a_broken_trajectory_on_one_rank_makes_all_start_again(results: dict[str, Any]) -> None:
    leader, other = outcomes(results, "quarantined")
    excluded = [r for r in leader["ledger"] if "excluded" in r]
    assert 0 < len(excluded) < len(leader["ledger"])
    assert leader["losses"] == other["losses"]
    for message in outcomes(results, "too_many_quarantined"):
        assert "max_quarantined allows 0" in message


@pytest.mark.parametrize("where", [case("failing"), case("failing_in_validation")])
def test_a_failure_on_rank_0_ends_the_others_too(results: dict[str, Any], where: str) -> None:
    leader, other = outcomes(results, where)
    assert leader.startswith("RewardError")
    assert other.startswith("RolloutError('the rollout failed on rank 0: RewardError")
