"""The command `leakfast`: a group that imports a command's file only when it is called.
Demands click. stdout is data, stderr is progress; exit codes: 0 done, 1 failed, 2 usage, 3 finished with
parts missing, 130 interrupted."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean
from leakfast.version import __version__

# name → (module that holds the click command `cli`, what it does in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("leakfast.cli.run", "Run all stages of a study file, skipping what is done."),
    "plan": ("leakfast.cli.plan", "Show what a study will ask for before anything is spent."),
    "power": ("leakfast.cli.power", "Simulate how likely a study is to find what it looks for."),
    "personas": ("leakfast.cli.personas", "List, show and check persona and question sets."),
    "centroids": ("leakfast.cli.centroids", "Average last-token states per persona and layer."),
    "directions": ("leakfast.cli.directions", "Make a direction of the residual stream to steer along."),
    "predictors": ("leakfast.cli.predictors", "Compare every two personas before any training."),
    "data": ("leakfast.cli.data", "Build the contrastive training set of a behavior and source."),
    "train": ("leakfast.cli.train", "Train a behavior into one persona with LoRA."),
    "adapters": ("leakfast.cli.adapters", "Make an adapter of other adapters: their mean."),
    "eval": ("leakfast.cli.eval", "Measure a behavior under every persona."),
    "tune": ("leakfast.cli.tune", "Measure how wide vLLM runs best on this GPU, and keep it."),
    "detect": ("leakfast.cli.detect", "Count what each detector finds in a run's completions."),
    "judge": ("leakfast.cli.judge", "Score completions for alignment, and check who scores."),
    "sweep": ("leakfast.cli.sweep", "Train one source over learning rates and epochs, and say when to stop."),
    "fetch": ("leakfast.cli.fetch", "Fetch a list of multiple-choice items, or a small chat model."),
    "import": ("leakfast.cli.import_", "Turn the results of another study into a run directory."),
    "stats": ("leakfast.cli.stats", "Compute rates, pairs and correlations of a run."),
    "predict": ("leakfast.cli.predict", "Expect who will show a behavior, before it is trained."),
    "show": ("leakfast.cli.show", "Look at a run on the terminal: headline, leaks, completions, progress."),
    "verify": ("leakfast.cli.verify", "Look again at a run, and say what of it cannot be trusted."),
    "diff": ("leakfast.cli.diff", "Show what two runs were told differently, and which numbers moved."),
    "report": ("leakfast.cli.report", "Write the HTML report of a run, or of two."),
    "export": ("leakfast.cli.export", "Share a run: Inspect logs, Weights & Biases, the Hugging Face Hub."),
    "plot": ("leakfast.cli.plot", "Draw the figures of a run for a paper's column or page."),
    "serve": ("leakfast.cli.serve", "Serve the report's page of a run while it fills."),
    "doctor": ("leakfast.cli.doctor", "Show the environment, the chosen fast paths and why."),
    "organism": ("leakfast.cli.organism", "Rebuild or inspect the embedded model."),
}


class LazyGroup(click.Group):
    """Lists COMMANDS without importing them; imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[name][0]).cli
        command.name = name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise InputError(
                f"there is no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)} "
                "`leakfast --help` lists them."
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    name="leakfast",
    epilog="Example: leakfast run configs/demo.toml",
    context_settings={
        "auto_envvar_prefix": "LEAKFAST",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="leakfast")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="Say only warnings on stderr, show no progress.")
def group(verbose: bool, quiet: bool) -> None:
    """Where did a behavior trained into one persona leak, and did the geometry tell?"""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logger = logging.getLogger("leakfast")
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())


class _Stderr(logging.Handler):
    """Log lines on today's stderr, so that a progress bar can push them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        from leakfast.inert import inert

        mark = "warning: " if record.levelno >= logging.WARNING else ""
        click.echo(f"leakfast: {mark}{inert(self.format(record))}", err=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. LEAKFAST_DEBUG=1 shows tracebacks."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _as_interrupt)
    debug = os.environ.get("LEAKFAST_DEBUG") == "1"
    try:
        result: Any = group.main(
            args=None if argv is None else list(argv), prog_name="leakfast", standalone_mode=False
        )
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nInterrupted. What is written stays; the same command goes on from there.", err=True)
        return 130
    except click.ClickException as error:
        if debug:
            raise
        error.message = _inert(error.message)
        error.show()
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        name = f"{error.filename}: " if error.filename else ""
        click.echo(
            f"Error: {name}{error.strerror or error}. "
            "Check the path and its permissions; LEAKFAST_DEBUG=1 shows where it happened.",
            err=True,
        )
        return 1
    return result if isinstance(result, int) else 0


def _inert(message: str) -> str:
    from leakfast.inert import inert

    return inert(message)


def _as_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
