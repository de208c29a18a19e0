"""Resuming on other data or with other settings: right training, or a refusal that names it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from simulated_fits import build, ledger
from some_rewards import another, by_answer

from copris_lightning import Evaluation, Sampling
from copris_lightning.core.buffer import CarryOverBuffer, Status
from copris_lightning.core.estimator.corrections import Truncation
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt

SIZES = {"cap": 16, "groups": 3, "max_new_tokens": 24}


class Rows:
    """Prompts from a list, whose reward is right for the answer that they came with."""

    def __init__(self, rows: list[Prompt]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Prompt:
        return self.rows[index]


def rows(count: int = 10) -> list[Prompt]:
    return [
        Prompt(f"p{i:03d}", text=f"{5 * i}+{i % 7}=", answer=f"answer {i}", extra={"n": i})
        for i in range(count)
    ]


class SaveAt(L.Callback):
    """A checkpoint after a micro-batch."""

    def __init__(self, file: Path, micro_batch: int) -> None:
        self.file = file
        self.left = micro_batch

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def fit(
    checkpoint: Path, directory: Path, file: Path | None = None, **options: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    data = {"prompts": Rows(rows()), "reward": by_answer, **SIZES, **options.pop("data", {})}
    trainer, module, datamodule, _ = build(
        checkpoint,
        directory,
        data=data,
        **{"accumulate_grad_batches": 2, "max_steps": 4, **options},
    )
    trainer.fit(module, datamodule, ckpt_path=file)
    return {n: p.detach().clone() for n, p in module.named_parameters()}, ledger(directory)


@pytest.fixture(scope="module")
def cut(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with trajectories that are carried over, and with scored ones."""
    directory = tmp_path_factory.mktemp("cut")
    fit(tiny_checkpoint, directory, callbacks=[SaveAt(directory / "cut.ckpt", 4)])
    state = torch.load(directory / "cut.ckpt", weights_only=True)["RolloutDataModule"]
    buffer = CarryOverBuffer(limit=16, group_size=2, batch_groups=3, max_new_tokens=24)
    buffer.load_state_dict(state["buffer"])
    assert buffer.count(Status.CARRIED_OVER)
    assert any(trajectory.verdict for trajectory in buffer.trajectories())
    return directory / "cut.ckpt"


def test_a_row_inserted_at_the_top_is_named(
    tiny_checkpoint: Path, tmp_path: Path, cut: Path
) -> None:
    data = {"prompts": Rows([Prompt("new", text="5+5=", answer="answer 99"), *rows()])}
    with pytest.raises(ConfigurationError, match=r"cut\.ckpt.*prompt 'new' \(row 0\) is new"):
        fit(tiny_checkpoint, tmp_path, cut, data=data)


LONG = Prompt("long", text="1+1=" * 5, answer="answer 1")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompts": Rows(rows(9))}, "there were 10 prompts, and there are 9"),
        ({"prompts": Rows(rows(11))}, r"prompt 'p010' \(row 10\) and those after it are new"),
        ({"prompts": Rows(rows()[::-1])}, r"'p009' \(row 0\) was number 9: the order is another"),
        ({"seed": 7}, r"seed=7 .*seed_everything\) is not the checkpoint's 0"),
        ({"temperature": 0.7}, r"temperature=0\.7 is not the checkpoint's 1\.0.*responses"),
        ({"max_new_tokens": 20}, "max_new_tokens=24, this run has 20"),
        ({"group_size": 3}, "group_size=2, this run has 3"),
        ({"reward": another}, r"reward=another is not the checkpoint's by_answer"),
        (
            {"prompts": Rows([LONG, *rows()]), "skip_long_prompts": True},
            "the same, but stand in other rows",
        ),
        (
            {"skip_long_prompts": True, "max_prompt_tokens": 4},
            r"prompts are not those that the checkpoint was saved with",
        ),
    ],
    ids=str,
)
def test_what_is_not_as_it_was_is_named_before_the_engine_boots(
    tiny_checkpoint: Path, tmp_path: Path, cut: Path, data: dict[str, Any], message: str
) -> None:
    settings = {"prompts": Rows(rows()), "reward": by_answer, **SIZES, **data}
    trainer, module, datamodule, log = build(tiny_checkpoint, tmp_path, data=settings)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(module, datamodule, ckpt_path=cut)
    assert log == []
    assert datamodule.engine.closed == 0


def test_logprobs_that_only_older_weights_could_give_are_not_recomputed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "engine.ckpt"
    data = {"behavior_logprobs": "engine"}
    fit(tiny_checkpoint, tmp_path, callbacks=[SaveAt(file, 4)], data=data)
    with pytest.raises(ConfigurationError, match=r"behavior_logprobs=trainer .* engine"):
        fit(tiny_checkpoint, tmp_path, file)


def test_logprobs_of_the_engine_that_nobody_asked_for_cannot_be_asked_for_later(
    tiny_checkpoint: Path, tmp_path: Path, cut: Path
) -> None:
    settings = {"prompts": Rows(rows()), "reward": by_answer, **SIZES}
    for change, key in (
        ({"data": {"behavior_logprobs": "engine"}}, r"flow\.behavior_logprobs needs"),
        ({"model": {"corrections": [Truncation()]}}, r"estimator\.corrections needs"),
    ):
        data = {**settings, **change.get("data", {})}
        trainer, module, datamodule, log = build(
            tiny_checkpoint, tmp_path, data=data, model=change.get("model")
        )
        with pytest.raises(ConfigurationError, match=key):
            trainer.fit(module, datamodule, ckpt_path=cut)
        assert log == []


def test_logprobs_of_the_engine_that_are_used_no_longer_are_let_go(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "measured.ckpt"
    measured = {"corrections": [Truncation(apply=False)]}
    weights, whole = fit(tiny_checkpoint, tmp_path / "whole")
    fit(tiny_checkpoint, tmp_path, callbacks=[SaveAt(file, 4)], model=measured)
    resumed, rest = fit(tiny_checkpoint, tmp_path / "resumed", file)
    assert rest
    assert rest == whole[-len(rest) :]
    for name, weight in weights.items():
        assert torch.equal(resumed[name], weight)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"cap": 5},
        {"groups": 2},
        {"evaluations": {"val": Evaluation(Rows(rows(3)), sampling=Sampling(0.5))}},
        {"timeout_s": 5.0},
    ],
    ids=str,
)
def test_what_may_change_may(
    tiny_checkpoint: Path, tmp_path: Path, cut: Path, data: dict[str, Any]
) -> None:
    _, records = fit(tiny_checkpoint, tmp_path, cut, data=data)
    assert [r for r in records if r["batch"] >= 2]


EDITS = ("none", "insert", "remove", "edit", "reorder", "append", "seed", "shorter prompts")


def edited(edit: str, draw: random.Random) -> dict[str, Any]:
    """Data settings after a change; at least one row of it is another's."""
    given = rows()
    place = draw.randrange(len(given))
    if edit == "insert":
        given.insert(place, Prompt("new", text="7+7=", answer="answer 77"))
    elif edit == "remove":
        del given[place]
    elif edit == "edit":
        changes = [{"answer": "answer 5000"}, {"text": "8+8="}, {"extra": {}}, {"id": "other"}]
        given[place] = replace(given[place], **draw.choice(changes))
    elif edit == "reorder":
        given.append(given.pop(place - 1 if place else 0))
    elif edit == "append":
        given.append(Prompt("last", text="9+9=", answer="answer 9"))
    data: dict[str, Any] = {"prompts": Rows(given)}
    if edit == "seed":
        data["seed"] = draw.randrange(1, 100)
    if edit == "shorter prompts":
        data |= {
            "max_prompt_tokens": draw.randrange(1, 5),
            "skip_long_prompts": draw.random() < 0.5,
        }
    return data


@pytest.fixture(scope="module")
def uncut(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The weights and the ledger of the run that nobody stopped."""
    return fit(tiny_checkpoint, tmp_path_factory.mktemp("uncut"))


@pytest.mark.parametrize("program", range(6))
@pytest.mark.timeout(900)
def test_any_order_of_save_resume_and_change_trains_right_or_refuses(
    tiny_checkpoint: Path,
    tmp_path: Path,
    uncut: tuple[dict[str, torch.Tensor], list[dict[str, Any]]],
    program: int,
) -> None:
    draw = random.Random(program)
    weights, records = uncut
    file: Path | None = None
    done = 0
    while True:
        micro_batches = draw.randrange(1, 5)
        last = done + micro_batches >= 8
        callbacks = [] if last else [SaveAt(tmp_path / f"{done}.ckpt", micro_batches)]
        if file is not None:
            change = edited(draw.choice(EDITS[1:]), draw)
            with pytest.raises(ConfigurationError):
                fit(tiny_checkpoint, tmp_path / "changed", file, data=change)
        ours, written = fit(tiny_checkpoint, tmp_path / "cut", file, callbacks=callbacks)
        if last:
            break
        file = tmp_path / f"{done}.ckpt"
        # A checkpoint within a step goes on from where the step begins.
        done = (done + micro_batches) // 2 * 2
    assert written == records
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights.items())
