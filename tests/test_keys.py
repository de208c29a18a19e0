"""Settings' names: from an object's own to the YAML key, and short ones for the command line."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from copris_lightning.__main__ import main
from copris_lightning.errors import ConfigurationError, under
from copris_lightning.keys import SHORT, with_keys, without_short_names, yaml_key

SIMULATED = str(Path(__file__).parents[1] / "configs" / "simulated.yaml")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("flow.cap", "data.init_args.flow.cap"),
        ("task.sampling.temperature", "data.init_args.task.sampling.temperature"),
        ("task.prompts.path", "data.init_args.task.prompts.init_args.path"),
        ("task.scoring.reward", "data.init_args.task.scoring.reward"),
        ("evaluations.a-b.sampling.top_p", "data.init_args.evaluations.a-b.sampling.top_p"),
        ("evaluations.a.prompts.split", "data.init_args.evaluations.a.prompts.init_args.split"),
        ("engine.lengths.median", "data.init_args.engine.init_args.lengths.median"),
        ("credit.advantage", "data.init_args.credit.advantage"),
        ("model", "model.init_args.model"),
        ("lora.rank", "model.init_args.lora.rank"),
        ("estimator.kl.coefficient", "model.init_args.estimator.kl.coefficient"),
        ("estimator.ratio.proximal", "model.init_args.estimator.ratio.init_args.proximal"),
        (
            "estimator.corrections[1].max_lag",
            "model.init_args.estimator.corrections[1].init_args.max_lag",
        ),
        ("optimizer.lr", "model.init_args.optimizer.init_args.lr"),
        ("flow.nothing", None),
        ("trainer.max_steps", None),
        ("model.safetensors", None),
    ],
)
def test_a_name_is_given_its_key(name: str, key: str | None) -> None:
    assert yaml_key(name) == key


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("flow.cap=0 must be", "data.init_args.flow.cap=0 must be"),
        ("lower flow.cap, or", "lower data.init_args.flow.cap, or"),
        ("engine: it is not there", "data.init_args.engine: it is not there"),
        ("the engine: it is not there", "the engine: it is not there"),
        ("it serves x, not model='y'", "it serves x, not model.init_args.model='y'"),
        ("data.init_args.flow.cap=0", "data.init_args.flow.cap=0"),
        ("path='flow.cap' and --flow.cap", "path='flow.cap' and --flow.cap"),
        ("trainer.precision=16-true", "trainer.precision=16-true"),
    ],
)
def test_a_message_names_keys(message: str, says: str) -> None:
    assert with_keys(message) == says


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("cap=0 must be", "flow.cap=0 must be"),
        ("lengths.median=0 must be", "flow.lengths.median=0 must be"),
        ("corrections[0].x: no", "flow.corrections[0].x: no"),
        ("nothing is installed: why", "flow: nothing is installed: why"),
    ],
)
def test_whoever_holds_an_object_names_it(message: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as error, under("flow"):
        raise ConfigurationError(message)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--temperature=0"], "data.init_args.task.sampling.temperature=0.0 must be above 0"),
        (
            ["--model.init_args.estimator.corrections=[{class_path: copris_lightning.LagRejection, "
             "init_args: {max_lag: -1}}]"],
            "model.init_args.estimator.corrections[0].init_args.max_lag=-1 must be at least 0",
        ),
        (
            ["--data.init_args.engine.init_args.lengths.sigma=-1"],
            "data.init_args.engine.init_args.lengths.sigma=-1.0 must be at least 0",
        ),
        (
            ["--model.init_args.estimator.kl={coefficient: 0}"],
            "model.init_args.estimator.kl.coefficient=0.0 must be a number above 0",
        ),
        (["--data.init_args.task.template.system="], "data.init_args.task.template.system=''"),
        (["--reward=some_rewards.parity", "--cap=0"], "data.init_args.flow.cap=0 must be at"),
    ],
)  # fmt: skip
def test_what_an_object_refuses_is_named_by_its_whole_key(
    options: list[str], says: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["fit", "--config", SIMULATED, f"--model={tiny_checkpoint}", *options])
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("copris: ")]
    assert status == 2
    assert line.startswith(f"copris: {says}"), line


# -- short names ---------------------------------------------------------------------------


def printed(*options: str) -> dict[str, Any]:
    """A run's config, nested as it is."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["fit", "--config", SIMULATED, *options, "--print_config"])
    content: dict[str, Any] = yaml.safe_load(out.getvalue())
    return content


def test_every_short_name_sets_its_key_and_is_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = dict.fromkeys(SHORT, 7) | {"model": "x/y", "reward": "some_rewards.parity"}
    config = printed(*(f"--{name}={value}" for name, value in values.items()))
    for name, key in SHORT.items():
        found: Any = config
        for part in key.split("."):
            found = found[part]
        assert found == values[name], name
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all(f"--{name}is--{key}" in shown for name, key in SHORT.items())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--cap=3", "--data.init_args.flow.cap=4"], "--cap and --data.init_args.flow.cap set the"),
        (["--data.flow.cap", "4", "--cap", "3"], "--data.flow.cap and --cap set the same"),
        (["--model=x", "--model.init_args.model=y"], "--model and --model.init_args.model set"),
    ],
)
def test_a_setting_by_both_its_names_is_refused(args: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        without_short_names(args)


def test_a_class_for_the_module_is_still_lightnings() -> None:
    args = ["--model", "copris_lightning.CoprisModule", "--model.init_args.model=y"]
    assert without_short_names(args) == args


# -- evaluations of several files ----------------------------------------------------------


def test_evaluations_of_several_files_add_up(tmp_path: Path) -> None:
    """The second file names another, the third changes the first."""
    prompts = {"class_path": "copris_testing.SomePrompts", "init_args": {"size": 4}}
    files = ({"a": {"prompts": prompts}}, {"b": {"prompts": prompts, "samples": 2}})
    options = []
    for i, evaluations in enumerate([*files, {"a": {"samples": 3}}]):
        path = tmp_path / f"{i}.yaml"
        path.write_text(yaml.safe_dump({"data": {"init_args": {"evaluations": evaluations}}}))
        options += ["--config", str(path)] if i % 2 else [f"--config={path}"]
    made = printed(*options)["data"]["init_args"]["evaluations"]
    assert {name: one["samples"] for name, one in made.items()} == {"a": 3, "b": 2}
    assert all(one["prompts"] == prompts for one in made.values())
