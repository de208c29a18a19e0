"""`copris`: LightningCLI with the model's path shared between trainer and engine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from copris_lightning.config_files import (
    check_files,
    refuse_doubled_keys,
    with_all_evaluations,
)
from copris_lightning.datamodules.checkpoint_file import check_file, read
from copris_lightning.errors import ConfigurationError
from copris_lightning.keys import SHORT, refusals, with_keys, without_short_names
from copris_lightning.parsing import CoprisParser, configuration_error
from copris_lightning.policy.module import CoprisModule
from copris_lightning.runs.directory import directory_of, record
from copris_lightning.runs.resume import NothingToTrain, begin, newest_saved

_EPILOG = (
    "`copris serve --help` is about vLLM servers for rollouts, `copris simulate --help` about the "
    "fastest cap. Of each command, `--ckpt_path last` is the newest checkpoint of the newest run "
    "under the logger's name, and an error if there is none; `auto` starts a new run then."
)

_SHORT_NAMES = "Short names of what is changed often: " + ", ".join(
    f"--{name} is --{key}" for name, key in SHORT.items()
)


class CoprisCLI(LightningCLI):
    """``copris fit | validate | test | predict --config FILE [--config OVERLAY] [--key value]``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The engine boots with the checkpoint that the module trains; one seed for everything."""
        parser.link_arguments("model.init_args.model", "data.init_args.model")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)

    def before_instantiate_classes(self) -> None:
        """Errors of objects shall name them."""
        if isinstance(self.parser, CoprisParser):
            self.parser.name_refusals()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Name what a module, a data module, a callback or Lightning refuses."""
        for _, refused in refusals(self.config_init):
            raise refused.error
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or "trainer.devices does not fit in memory"
            raise ConfigurationError(f"trainer: {reason}") from error

    def _parse_ckpt_path(self) -> None:
        """Look at the file before Lightning loads it, which it does for hyper-parameters only."""
        command = self.config.get("subcommand")
        given = self.config[command].get("ckpt_path") if command else None
        if given and Path(given).is_file():
            check_file(Path(given))
            if (read(Path(given)) or {}).get("hyper_parameters"):
                super()._parse_ckpt_path()

    def _run_subcommand(self, subcommand: str) -> None:
        """Decide what to go on from and where to write, then run."""
        asked = self.config_init[subcommand].get("ckpt_path")
        try:
            found = begin(self.trainer, subcommand, asked)
        except NothingToTrain as done:
            # A scheduler that starts a finished job again has nothing to complain about.
            if asked != "auto":
                raise
            print(f"copris: {done}")
            return
        self.config_init[subcommand]["ckpt_path"] = found
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            # Lightning would end with status 0, as if all were done.
            if self.trainer.is_global_zero:
                print(f"copris: {_stopped(self.trainer, subcommand)}", file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGTERM) from None


class RunConfig(SaveConfigCallback):
    """Saves the config in the run's directory, beside those of the run that it goes on from:
    ``config.yaml``, then ``config_1.yaml``, ..."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file, once."""
        directory = directory_of(trainer)
        if self.already_saved:
            return
        if trainer.is_global_zero:
            directory.mkdir(parents=True, exist_ok=True)
            names = (f"config_{i}.yaml" if i else "config.yaml" for i in count())
            path = next(directory / name for name in names if not (directory / name).exists())
            self.parser.save(self.config, path, skip_none=False, multifile=False)
        self.already_saved = True

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say in the checkpoint whose it is."""
        record(trainer, checkpoint)


def _stopped(trainer: L.Trainer, command: str) -> str:
    """What to say of a command that SIGTERM ended."""
    said = f"{command} was ended by SIGTERM"
    if command != "fit":
        return said
    said += f" after {trainer.global_step} optimizer steps"
    if trainer.max_steps > 0:
        said += f" of {trainer.max_steps}"
    if found := newest_saved(trainer):
        return f"{said}; to go on: the same command with --ckpt_path {found}"
    return (
        f"{said}, without a checkpoint: a ModelCheckpoint among trainer.callbacks with "
        "save_on_exception saves one"
    )


def _seed(seed_everything: bool | int | None) -> int:
    """``true`` draws a seed for the trainer only; the rollout's must be known to be repeated."""
    if seed_everything is None:
        raise ConfigurationError("seed_everything=null must be true or false or a whole number")
    if not 0 <= seed_everything < 2**32:
        raise ConfigurationError(f"seed_everything={seed_everything} must be from 0 to 2^32 - 1")
    return 0 if isinstance(seed_everything, bool) else seed_everything


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    A setting that cannot work ends with its message alone and status 2; any other error shows
    where it came from.
    """
    try:
        args = without_short_names(sys.argv[1:] if args is None else args)
        check_files(args)
        args = with_all_evaluations(args)
        refuse_doubled_keys()
        CoprisCLI(
            CoprisModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=CoprisParser,
            save_config_callback=RunConfig,
            # A step takes as long as its rollout: all are worth logging, not one in fifty.
            trainer_defaults={"log_every_n_steps": 1},
            parser_kwargs={
                "epilog": f"{_EPILOG} {_SHORT_NAMES}",
                **{command: {"epilog": _SHORT_NAMES} for command in CoprisCLI.subcommands()},
            },
            seed_everything_default=0,
            # The module takes optimizer and schedule itself, and steps the schedule per step.
            auto_configure_optimizers=False,
            args=args,
        )
    except ValueError as error:
        found = configuration_error(error)
        if found is None:
            raise
        print(f"copris: {with_keys(str(found))}", file=sys.stderr)
        return 2
    return 0
