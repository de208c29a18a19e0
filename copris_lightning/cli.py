"""`copris`: LightningCLI with the model's path shared between trainer and engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from copris_lightning.datamodules.checkpoint_file import check_file, read
from copris_lightning.errors import ConfigurationError
from copris_lightning.module import CoprisModule


class CoprisCLI(LightningCLI):
    """``copris fit | validate | test | predict --config FILE [--config OVERLAY] [--key value]``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The engine boots with the checkpoint that the module trains; one seed for everything."""
        parser.link_arguments("model.init_args.model", "data.init_args.model")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)

    def _parse_ckpt_path(self) -> None:
        """Look at the file before Lightning loads it, which it does for hyper-parameters only."""
        command = self.config.get("subcommand")
        given = self.config[command].get("ckpt_path") if command else None
        if given and Path(given).is_file():
            check_file(Path(given))
            if (read(Path(given)) or {}).get("hyper_parameters"):
                super()._parse_ckpt_path()


def _seed(seed_everything: bool | int) -> int:
    """``true`` draws a seed for the trainer only; the rollout's must be known to be repeated."""
    return 0 if isinstance(seed_everything, bool) else seed_everything


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    A setting that cannot work ends with its message alone and status 2; any other error shows
    where it came from.
    """
    try:
        CoprisCLI(
            CoprisModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"epilog": "`copris serve --help` is about vLLM servers for rollouts."},
            seed_everything_default=0,
            # The module takes optimizer and schedule itself, and steps the schedule per step.
            auto_configure_optimizers=False,
            args=list(args) if args is not None else None,
        )
    except ValueError as error:
        found = _configuration_error(error)
        if found is None:
            raise
        print(f"copris: {found}", file=sys.stderr)
        return 2
    return 0


def _configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The error itself, or the one it wraps: the argument parser wraps what a class raises."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error
