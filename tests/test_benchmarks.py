"""The benchmarks: each runs, in small, and says what it measured; what they share is right."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- each of them, in small


def quick(name: str, output: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Runs a benchmark as a user does. Its tables by their titles, with each variant's figures."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--output", str(output)]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True, timeout=280)
    text = (output / f"{name}.json").read_text()
    made = json.loads(text)
    assert made["benchmark"] == name
    assert made["machine"]["cores"] >= 1
    assert "torch" in made["machine"]
    assert str(output) not in text
    assert "<svg" in (output / f"{name}.svg").read_text()
    tables = {table["title"]: table["variants"] for table in made["tables"]}
    for title, variants in tables.items():
        for figures in variants.values():
            assert len(figures["rounds"]) in (1, made["options"]["rounds"]), title
            assert all(map(math.isfinite, figures["rounds"])), title
    return tables


def median(tables: dict[str, dict[str, Any]], title: str, variant: str) -> float:
    [found] = [variants for name, variants in tables.items() if title in name]
    return float(found[variant]["median"])


def check_rollout(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    again = "prefix tokens computed again"
    assert median(tables, again, "sync") == 0 < median(tables, again, "staged fresh")
    trained, generated, against_uncut = list(tables.values())[:3]
    assert against_uncut["uncut, log-probs"]["ratio"] == 1
    for rates in (trained, generated):
        assert {"sync", "staged fresh", "uncut, log-probs"} <= set(rates)
        best = max(rates[name]["median"] for name in ("sync", "sync, log-probs"))
        for figures in rates.values():
            assert figures["ratio"] == pytest.approx(figures["median"] / best)
    for name in ("sync", "sync, log-probs"):  # nothing is left over
        assert trained[name]["median"] == pytest.approx(generated[name]["median"])
    return generated


def test_a_rollout_on_virtual_time_gains_and_comes_near_the_upper_bound(tmp_path: Path) -> None:
    rates = check_rollout(quick("rollout", tmp_path, "--simulated"))
    sync, fresh, uncut = (rates[name]["median"] for name in ("sync", "staged fresh", "uncut"))
    assert 1.2 * sync < fresh < 1.02 * uncut


@pytest.mark.engines
def test_a_rollout_on_the_real_engine(tmp_path: Path) -> None:
    check_rollout(quick("rollout", tmp_path))


def check_caps(tables: dict[str, dict[str, Any]]) -> None:
    assert list(tables["generated tokens/s"]) == ["cap 4", "cap 16", "auto"]
    assert tables["generated tokens/s"]["cap 16"]["ratio"] == 1
    assert median(tables, "preemptions", "cap 4") < median(tables, "preemptions", "cap 16")
    assert median(tables, "limit", "cap 16") == 16
    assert 2 < median(tables, "limit", "auto") < 16


def test_caps_are_compared_on_a_small_cache_on_virtual_time(tmp_path: Path) -> None:
    check_caps(quick("cap", tmp_path, "--simulated"))


@pytest.mark.engines
def test_caps_are_compared_on_a_small_cache_of_the_real_engine(tmp_path: Path) -> None:
    check_caps(quick("cap", tmp_path))


@pytest.mark.engines
def test_a_sync_is_timed_beside_a_copy_and_step_by_step(tmp_path: Path) -> None:
    tables = quick("sync", tmp_path)
    whole = next(v for title, v in tables.items() if title.endswith(": seconds"))
    steps = next(v for title, v in tables.items() if title.endswith("of each step"))
    total = sum(figures["rounds"][0] for figures in steps.values())
    assert total == pytest.approx(whole["sync"]["rounds"][0])
    assert whole["copy"]["median"] < whole["sync"]["median"]
    assert median(tables, "peak", "files, in weights") >= 1


@pytest.mark.engines
@pytest.mark.boots(2)
def test_a_training_step_is_timed_with_generation_beside_it(tmp_path: Path) -> None:
    tables = quick("overlap", tmp_path)
    for place in ("client here", "engine apart"):
        assert median(tables, "cap 8: seconds of a step", place) > 0
        assert median(tables, "cap 8: us of the loop per token", place) > 0
        assert median(tables, "cap 8: tokens/s", place) > 0


def test_a_training_step_is_timed_beside_plain_transformers(tmp_path: Path) -> None:
    tables = quick("training_step", tmp_path)
    assert median(tables, "seconds of a step", "transformers") > 0
    assert median(tables, "seconds of a step", "ours") > 0


def test_a_resume_is_timed_beside_a_run_that_begins_anew_and_a_save_beside_a_copy(
    tmp_path: Path,
) -> None:
    tables = quick("resume", tmp_path)
    title, saved = tables
    assert median(tables, saved, "save") > 0
    assert "4,000 tokens in 40 trajectories" in saved
    assert int(title.split(" in flight, ")[1].split(" tokens")[0].replace(",", "")) > 0
    assert median(tables, title, "resumed") > 0


def test_what_grows_is_measured_at_each_size(tmp_path: Path) -> None:
    stages, buffer = quick("scale", tmp_path).values()
    assert list(stages) == ["16 in flight", "32 in flight"]
    assert list(buffer) == ["2 groups", "4 groups"]


def test_the_scheduler_is_measured_at_each_number_in_flight(tmp_path: Path) -> None:
    tables = quick("scheduler", tmp_path)
    assert list(tables["us per chunk"]) == ["100 in flight", "1,000 in flight"]
    assert 8 <= median(tables, "bytes per token", "held") < 200


@pytest.mark.parametrize("more", [[], ["--train"]], ids=["scoring", "training"])
def test_packed_padded_and_equal_rows_are_timed_side_by_side(
    tmp_path: Path, more: list[str]
) -> None:
    tables = quick("scoring", tmp_path, *more)
    computed, passes = (
        {name: figures["median"] for name, figures in tables[title].items()}
        for title in ("computed / real tokens", "passes")
    )
    assert list(computed) == ["packed", "cut by length", "fewest passes", "equal rows"]
    assert computed["packed"] == 1 == computed["equal rows"]
    assert 1 < computed["cut by length"] < computed["fewest passes"]
    assert passes["fewest passes"] < passes["cut by length"]


def test_rewards_are_timed_in_every_pattern(tmp_path: Path) -> None:
    tables = quick("rewards", tmp_path)
    assert len(tables["calls/s"]) == 6
    assert median(tables, "ms of a call", "judged, burst") > 20


def test_training_end_to_end_is_timed_and_evaluated_on_the_quickstart(tmp_path: Path) -> None:
    tables = quick("end_to_end", tmp_path, "--simulated", "--ways", "staged kept")
    assert median(tables, "trained tokens/s", "staged kept") > 0
    assert list(tables)[-1] == "held-out reward after equal trained tokens"


@pytest.mark.engines
def test_training_end_to_end_on_the_real_engine(tmp_path: Path) -> None:
    rates = quick("end_to_end", tmp_path, "--ways", "sync")["trained tokens/s"]
    assert rates["sync"]["ratio"] == 1


def test_unbiasedness_draws_its_figure(tmp_path: Path) -> None:
    figure = tmp_path / "figure.svg"
    command = [sys.executable, "benchmarks/unbiasedness.py", "--quick", "--output", str(figure)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "token ratio, clipped: nearer than none" in done.stdout
    assert "<svg" in figure.read_text()


# ---------------------------------------------------------------- end to end, and TRL


def logged(file: Path, tokens_per_s: float, rewards: list[float]) -> Path:
    """What `copris fit` logs: a slow batch, then one a second, and a row for each evaluation."""
    columns = ["time/cycle_s", "train/tokens_per_s", "val/sums/avg_at_k"]
    lines = [",".join(columns)]
    for reward in rewards:
        lines += [f"1.0,{tokens_per_s},", f"1.0,{tokens_per_s},", f",,{reward}"]
    lines[1] = f"4.0,{tokens_per_s / 4},"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.usefixtures("shared")
def test_rewards_are_compared_after_as_many_trained_tokens(tmp_path: Path) -> None:
    benchmark = importlib.import_module("end_to_end")
    slow = benchmark.Run.read(logged(tmp_path / "slow.csv", 100, [0.1, 0.5]))
    fast = benchmark.Run.read(logged(tmp_path / "fast.csv", 150, [0.2, 0.8]))
    assert slow.rate(skip=1) == 100
    assert slow.held_out == {2: 0.1, 4: 0.5}
    rates, trl, first, last, equal = benchmark.tables({"sync": [slow], "TRL": [fast]}, 1)
    assert rates.ratios("TRL") == [1.5]
    assert trl.baseline == "TRL"
    assert (first.values["TRL"], last.values["TRL"]) == ([0.2], [0.8])
    # The slower trained 400 tokens; the faster was evaluated after 300 and 600.
    assert equal.values["sync"] == [0.5]
    assert equal.values["TRL"] == [pytest.approx(0.4)]


@pytest.fixture
def quickstart(tmp_path: Path, shared: None) -> list[str]:
    from copris_lightning.quickstart.warm_start import tiny_model

    model = tiny_model(tmp_path / "tiny")
    simulated = importlib.import_module("end_to_end").SIMULATED
    engine = json.dumps(simulated["data.init_args.engine"])
    return [
        f"--config={ROOT}/configs/quickstart.yaml",
        f"--model.init_args.model={model}",
        f"--data.init_args.engine={engine}",
    ]


def test_trl_is_told_what_the_config_says(quickstart: list[str]) -> None:
    peer = importlib.import_module("trl_peer")
    changes = ["--data.init_args.batch.group_size=4", "--seed_everything=7"]
    cli = peer.read_config([*quickstart, *changes, "--trainer.max_steps=3"])
    told = peer.grpo_arguments(cli, passes=2)
    settings, loss = cli.datamodule.settings, cli.model.estimator.loss
    trajectories = settings.batch.groups * 4
    assert (told["seed"], told["max_steps"], told["num_generations"]) == (7, 3, 4)
    assert told["per_device_train_batch_size"] * 2 == trajectories
    assert told["max_completion_length"] == settings.task.sampling.max_new_tokens
    assert (told["epsilon"], told["epsilon_high"]) == (loss.clip_low, loss.clip_high)
    assert (told["loss_type"], told["scale_rewards"]) == ("dapo", "group")

    task = peer.TextTask(cli.model.model, settings)
    row, *_ = task.rows(2)
    prompt = settings.task.prompts[row["index"]]
    assert row["prompt"] == prompt.text
    # The end of a response is not the reward's to see.
    response = [*task.tokenizer.encode("no sum"), task.tokenizer.eos_token_id]
    assert task.rewards([response], [prompt]) == [settings.task.scoring.reward("no sum", prompt)]


def test_a_config_that_trl_would_train_otherwise_is_refused(quickstart: list[str]) -> None:
    peer = importlib.import_module("trl_peer")
    cli = peer.read_config([*quickstart, "--data.init_args.batch.updates=2"])
    with pytest.raises(ValueError, match=r"data\.batch\.updates"):
        peer.grpo_arguments(cli, passes=1)


# ---------------------------------------------------------------- what they share


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks' own modules can be imported, for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.usefixtures("shared")
def test_variants_run_by_turns_every_other_round_in_reverse() -> None:
    harness = importlib.import_module("harness")
    ran: list[str] = []
    variants = {name: lambda name=name: ran.append(name) or len(ran) for name in "abc"}
    values = harness.by_turns(variants, 2, warm_up=1)
    assert "".join(ran) == "abccbaabc"
    assert values == {"a": [6, 7], "b": [5, 8], "c": [4, 9]}


@pytest.mark.usefixtures("shared")
def test_ratios_are_of_one_round_to_the_best_baseline() -> None:
    table = importlib.import_module("harness").Table
    values = {"ours": [30.0, 10.0, 90.0], "slow": [1.0, 1.0, 1.0], "fast": [10.0, 5.0, 30.0]}
    rates = table("tokens/s", values, ("slow", "fast", "absent"))
    assert (rates.baseline, rates.ratios("ours")) == ("fast", [3, 2, 3])
    times = table("seconds", values, ("slow", "fast"), higher_is_better=False)
    assert (times.baseline, times.ratios("ours")) == ("slow", [30, 10, 90])
    assert table("seconds", values).ratios("ours") == []
    assert "30 (10 to 90)" in str(rates)
    assert "3.00 (2.00 to 3.00)" in str(rates)


@pytest.mark.usefixtures("shared")
def test_every_response_ends_at_its_own_length_over_all_its_stages() -> None:
    from copris_lightning.core.buffer import CarryOverBuffer
    from copris_lightning.engines.engine import Decoding, EngineSpec
    from copris_lightning.rollout.scheduler import RolloutScheduler
    from copris_lightning.rollout.shared_engine import SharedEngine
    from copris_lightning.rollout.task import Task, trajectory_seed

    workload = importlib.import_module("workload")
    engine = workload.ReplayedSimulation()
    engine.length_of = lengths = workload.Lengths(median=20, sigma=1.0, limit=90)
    loop = engine.new_event_loop()
    loop.run_until_complete(engine.start(EngineSpec("none", 16, 200, 98)))
    buffer = CarryOverBuffer(limit=16, group_size=2, batch_groups=4, max_new_tokens=90)
    shared = SharedEngine(engine, 16)
    task = Task(
        workload.Prompts(),
        importlib.import_module("reward").reward,
        lambda ids: "",
        Decoding(),
        seed=3,
    )
    scheduler = RolloutScheduler(shared, buffer, task)

    async def stages() -> list[Any]:
        groups = []
        for version in range(1, 7):
            groups += (await scheduler.take())[0]
            await shared.hold()
            await shared.release(version)
        await scheduler.close()
        await engine.close()
        return groups

    rows = [t for group in loop.run_until_complete(stages()) for t in group.trajectories]
    loop.close()
    found = [t.response_length for t in rows]
    assert found == [lengths(trajectory_seed(3, t.group_id, t.sample)) for t in rows]
    assert any(len(t.segments) > 1 for t in rows)
    assert engine.sent_again > 0
    assert engine.cached == 0


@pytest.mark.usefixtures("shared")
def test_replayed_lengths_are_log_normal_up_to_the_limit() -> None:
    from copris_lightning.rollout.task import trajectory_seed

    lengths = importlib.import_module("workload").Lengths(median=120, sigma=1.0, limit=1500)
    drawn = [lengths(trajectory_seed(0, group, 0)) for group in range(4000)]
    assert statistics.median(drawn) == pytest.approx(120, rel=0.05)
    logs = [math.log(n) for n in drawn if n < 1500]
    assert statistics.stdev(logs) == pytest.approx(1.0, abs=0.05)
    assert min(drawn) >= 1
    assert max(drawn) == 1500
