"""The command line: a thin skin over the functions of the stages.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import logging
import sys
from collections.abc import Callable
from importlib import import_module

import typer
from rich.text import Text
from typer.exceptions import TyperException

from gistfast.cli.options import command, command_class, errors_in_one_line, say
from gistfast.cli.store import app as store_app
from gistfast.launch import rank
from gistfast.progress import console
from gistfast.settings.base import Settings
from gistfast.settings.stages import (
    EvaluateSettings,
    PictureSettings,
    PrecomputeSettings,
    QuickstartSettings,
    TrainSettings,
    to_dict,
)

app = typer.Typer(
    help="Train small text-embedding models with a guide that runs only once.",
    no_args_is_help=True,
    add_completion=False,
    # Rich tables would cut long flags short on a narrow terminal.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")
app.add_typer(store_app, name="store")

# Of each benchmark the module, whose `main` reads its own options, and what it measures.
_BENCHMARKS = {
    "loss": ("gistfast.kernels.bench", "Time and memory of the loss."),
    "gather": ("gistfast.store.bench", "Rows a second gathered from a mapped guide store."),
    "step": ("gistfast.training.bench", "A training step beside sentence-transformers' trainers."),
    "precompute": ("gistfast.guides.bench", "Texts embedded a second, against sentence-transformers."),
    "memory": ("gistfast.stages.memory_bench", "Memory of precompute, and how soon a stopped run goes on."),
}


def _precompute(settings: PrecomputeSettings) -> None:
    from gistfast.stages.precompute import precompute_part

    precompute_part(**to_dict(settings))


def _train(settings: TrainSettings) -> None:
    if settings.dry_run:
        from gistfast.evaluation.report import print_facts
        from gistfast.stages.dry_run import dry_run, facts

        print_facts(f"a dry run of {settings.out}", facts(dry_run(**to_dict(settings))))
        return
    from gistfast.stages.train import train
    from gistfast.training.ranks import leave

    train(**to_dict(settings))
    leave()


def _evaluate(settings: EvaluateSettings) -> None:
    from gistfast.evaluation.report import Panel, print_panels, scores_of
    from gistfast.stages.evaluate import evaluate

    print_panels([Panel(settings.model, {"score": scores_of(evaluate(**to_dict(settings)))})])


def _picture(settings: PictureSettings) -> None:
    from pathlib import Path

    from gistfast.training.run_folder import RunFolder
    from gistfast.training.run_picture import draw_run

    run = RunFolder(Path(settings.run).expanduser())
    out = run.picture if settings.out is None else Path(settings.out).expanduser()
    console.print(str(draw_run(run.metrics, out)), markup=False, highlight=False, soft_wrap=True)


def _quickstart(settings: QuickstartSettings) -> None:
    from gistfast.demo.quickstart import quickstart

    quickstart(**to_dict(settings))


_STAGES: dict[str, tuple[type[Settings], Callable[..., None]]] = {
    "precompute": (PrecomputeSettings, _precompute),
    "train": (TrainSettings, _train),
    "evaluate": (EvaluateSettings, _evaluate),
    "picture": (PictureSettings, _picture),
    "quickstart": (QuickstartSettings, _quickstart),
}
for _name, (_settings, _run) in _STAGES.items():
    app.command(_name, cls=command_class(_settings))(command(_settings, _run))


def _benchmark(name: str) -> Callable[[typer.Context], None]:
    """The command of a benchmark, which passes on all that follows its name."""
    module, about = _BENCHMARKS[name]

    def run(context: typer.Context) -> None:
        with errors_in_one_line():
            raise typer.Exit(import_module(module).main(context.args))

    run.__doc__ = f"{about}\n\nOptions are those of the benchmark: `gistfast bench {name} -- --help` lists them."
    return run


for _name in _BENCHMARKS:
    bench.command(_name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(_benchmark(_name))


class ConsoleHandler(logging.Handler):
    """Writes log lines through the console of the bars, unwrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        style = "yellow" if record.levelno >= logging.WARNING else ""
        console.print(Text(self.format(record), style=style), soft_wrap=True)


def configure_logging() -> None:
    """What gistfast says from information upwards, what others say from warnings upwards.

    Of several processes of a run the first alone gives information.
    """
    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("gistfast").setLevel(logging.INFO if rank() == 0 else logging.WARNING)


def main() -> None:
    """Entry point of the `gistfast` command."""
    configure_logging()
    try:
        code = app(prog_name="gistfast", standalone_mode=False)
    except TyperException as error:
        said, code = error.format_message(), error.exit_code
        if "\n" in said:
            # The help, with which a command answers that was called with nothing.
            typer.echo(said, err=True)
        else:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "gistfast"
            say(f"{said.rstrip('.')}: `{path} --help` lists what there is")
    sys.exit(code)


if __name__ == "__main__":
    main()
