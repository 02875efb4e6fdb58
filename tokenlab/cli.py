"""The command line: thin, and the same grammar everywhere."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenlab import config
from tokenlab.core.errors import UserError

if TYPE_CHECKING:
    from tokenlab.tokenizers import Tokenizer

USAGE = """\
  tokenlab train FILE|RUN [field=value ...]   train an experiment, or go on with a run folder
  tokenlab train FILE:FUNCTION                train what another function than config() returns
  tokenlab train FILE --help                  every field with its type, value and meaning
  tokenlab eval RUN                           evaluate the newest checkpoint of a run
  tokenlab eval --model PATH --corpus NAME    bits per byte of a published model
  tokenlab generate RUN --prompt TEXT         continue a text
  tokenlab generate --model PATH --prompt TEXT    the same with a published model
  tokenlab models [fetch NAME]                list or fetch published models
  tokenlab data [fetch NAME]                  list or prepare the built-in corpora
  tokenlab study FILE                         run a study; exits 1 if a claim does not hold
  tokenlab systems                            all systems, their papers and status
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; user errors exit with 2 and one line, a diverged run with 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What these libraries log as errors also reaches us as exceptions, which say it once.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        code = run(arguments)
    except UserError as error:
        sys.stderr.write(f"tokenlab: {error}\n")
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("tokenlab: interrupted\n")
        code = 130
    except ValueError as error:
        from kernels_pallas.common.dispatch import CannotRun  # here, because it imports JAX

        if not isinstance(error, CannotRun):
            raise
        sys.stderr.write(f"tokenlab: {error}\n")
        code = 2
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """The grammar of all commands."""
    top = argparse.ArgumentParser(
        prog="tokenlab", usage=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", add_help=False)
    train.add_argument("experiment", type=pathlib.Path)
    train.add_argument("overrides", nargs="*", metavar="field=value")
    train.add_argument("--run-dir", type=pathlib.Path, help="the run folder itself")
    train.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"))
    train.add_argument("--help", "-h", action="store_true", dest="fields")
    evaluate = commands.add_parser("eval")
    _add_source(evaluate)
    evaluate.add_argument("--corpus", help="prepared data set to score a --model on")
    evaluate.add_argument("--text", help="text files to score a --model on, such as 'notes/*.txt'")
    evaluate.add_argument("--documents", type=int, help="leading held-out documents; all")
    evaluate.add_argument("--length", type=int, default=512, help="window in tokens")
    evaluate.add_argument("--stride", type=int, help="targets a window scores; half its length")
    evaluate.add_argument("--batch-size", type=int, default=8, help="windows at a time")
    generate = commands.add_parser("generate")
    _add_source(generate)
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("--tokens", type=int, default=128, help="most tokens to write")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--min-p", type=float)
    generate.add_argument("--stop", action="append", default=[], help="may be repeated")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--cache", help="such as 'SinkCache(budget=256)'; keeps all by default")
    generate.add_argument("--prefill-chunk", type=int, help="prompt tokens of a pass; all")
    data = commands.add_parser("data")
    data.add_argument("action", nargs="?", choices=["list", "fetch"], default="list")
    data.add_argument("name", nargs="?")
    models = commands.add_parser("models")
    models.add_argument("action", nargs="?", choices=["list", "fetch"], default="list")
    models.add_argument("name", nargs="?")
    study = commands.add_parser("study")
    study.add_argument("experiment", type=pathlib.Path)
    study.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"))
    study.add_argument("--record", type=pathlib.Path, help="also write the result to this file")
    study.add_argument("--known", type=pathlib.Path, help="a record whose unchanged arms stand")
    index = commands.add_parser("systems")
    index.add_argument("--markdown", action="store_true", help="the page docs/systems.md")
    return top


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=pathlib.Path, nargs="?")
    command.add_argument("--model", type=pathlib.Path, help="a published model: a folder, a .gguf")
    command.add_argument("--step", type=int, help="which checkpoint; the newest by default")


def run(arguments: Sequence[str]) -> int:
    """Parses and dispatches; returns the exit code."""
    grammar = parser()
    options, rest = grammar.parse_known_args(arguments)
    # argparse stops taking overrides at the first option; they may stand on either side of it.
    if options.command != "train" or any(item.startswith("-") for item in rest):
        grammar.parse_args(arguments)
    else:
        options.overrides += rest
    console = Console()
    # Commands import late, so that a mistyped command answers at once.
    match options.command:
        case "train":
            return _train(options, console)
        case "eval":
            return _eval(options, console)
        case "generate":
            return _generate(options, console)
        case "study":
            return _study(options, console)
        case "models":
            return _models(options, console)
        case "systems":
            return _systems(options, console)
        case _:
            return _data(options, console)


def parse_overrides(items: Sequence[str]) -> dict[str, str]:
    """``["a.b=1"]`` as ``{"a.b": "1"}``.

    Raises:
        UserError: an item has no equals sign.
    """
    overrides = {}
    for item in items:
        path, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{item!r} is not an override; write field=value")
        overrides[path] = value
    return overrides


def _train(options: argparse.Namespace, console: Console) -> int:
    from tokenlab.evals import DepthHistogram
    from tokenlab.files import experiment_of
    from tokenlab.plots import plot_curves, plot_depths
    from tokenlab.train.folder import default_folder
    from tokenlab.train.loop import Diverged, report, train

    experiment = config.replace(
        experiment_of(options.experiment), parse_overrides(options.overrides)
    )
    if options.fields:
        _print_fields(experiment, console)
        return 0
    folder = options.run_dir
    if folder is None:
        resumed = options.experiment.is_dir()
        folder = options.experiment if resumed else default_folder(experiment, options.runs)
    try:
        outcome = train(experiment, folder, console=console)
    except Diverged as error:
        sys.stderr.write(f"tokenlab: {error}\n")
        return 1
    report(outcome, folder)
    plot_curves(folder).savefig(folder / "curves.png", dpi=150)
    depths = {name: DepthHistogram.read(figures) for name, figures in outcome.evals.items()}
    varying = {name: histogram for name, histogram in depths.items() if len(histogram.depth)}
    if varying:
        plot_depths(varying, unit="depth").savefig(folder / "depths.png", dpi=150)
    if outcome.finished:
        _print_evals(outcome.evals, console)
        for prompt, text in outcome.samples:
            console.print(f"[bold]{prompt}[/bold]{text}", highlight=False)
    else:
        console.print(f"stopped at step {int(outcome.state.step)}; the same command goes on")
    console.print(f"run folder: {folder}", soft_wrap=True)
    return 0


def _print_fields(experiment: object, console: Console) -> None:
    for path, kind, value, doc in config.describe(experiment):
        line = Text.assemble((path, "bold"), f": {kind} = {value}")
        console.print(line, soft_wrap=True)
        if doc:
            console.print(Text(f"    {doc}", style="dim"), soft_wrap=True)


def _print_evals(evals: Mapping[str, Mapping[str, float]], console: Console) -> None:
    table = Table("evaluation", "figure", "value")
    for name, figures in evals.items():
        for figure, value in figures.items():
            table.add_row(name, figure, f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
    console.print(table)


def _check_source(options: argparse.Namespace) -> None:
    if (options.run is None) == (options.model is None):
        raise UserError(f"give {options.command} a run folder or --model PATH, one of the two")
    if options.model is not None and options.step is not None:
        raise UserError("--step names a checkpoint of a run; a --model has one set of weights")


def _eval(options: argparse.Namespace, console: Console) -> int:
    _check_source(options)
    if options.model is not None:
        return _eval_model(options, console)
    return _eval_run(options, console)


def _eval_model(options: argparse.Namespace, console: Console) -> int:
    from tokenlab.data.corpora import TextFiles, TfdsCorpus
    from tokenlab.evals import HeldOutText
    from tokenlab.interop import load_pretrained

    if (options.corpus is None) == (options.text is None):
        raise UserError("give eval --model a --corpus NAME or --text PATTERN, one of the two")
    if options.text is None:
        corpus = TfdsCorpus(name=options.corpus)
    else:
        corpus = TextFiles(pattern=options.text, held_out=1.0)
    stride = max(1, options.length // 2) if options.stride is None else options.stride
    try:
        evaluation = HeldOutText(
            corpus=corpus,
            length=options.length,
            stride=stride,
            batch_size=options.batch_size,
            max_documents=options.documents,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    evaluation.documents()  # the corpus is seen to be there before a model is read
    model, params, tokenizer = load_pretrained(options.model)
    if options.length > model.max_length:
        raise UserError(f"--length {options.length} exceeds the context of {model.max_length}")
    figures = evaluation(model=model, params=params, tokenizer=tokenizer)
    _print_evals({"held_out": figures}, console)
    return 0


def _eval_run(options: argparse.Namespace, console: Console) -> int:
    for name in ("corpus", "text", "documents", "stride"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is for --model; a run is evaluated as its experiment says")
    from tokenlab.train.folder import write_json
    from tokenlab.train.mesh import placed_on
    from tokenlab.train.run import open_run

    run, state = open_run(options.run, step=options.step)
    with placed_on(run.trainer.mesh):
        evals = {
            name: evaluation(
                model=run.experiment.model, params=state.best_params, tokenizer=run.tokenizer
            )
            for name, evaluation in run.experiment.evals.items()
        }
    _print_evals(evals, console)
    write_json(options.run / f"eval-{int(state.step)}.json", evals)
    return 0


def _named_model(options: argparse.Namespace) -> tuple[Any, Any, Tokenizer]:
    """Model, parameters and tokenizer of a run or of a published model."""
    from tokenlab.interop import load_pretrained
    from tokenlab.train.run import open_run

    if options.model is not None:
        return load_pretrained(options.model)
    run, state = open_run(options.run, step=options.step)
    return run.experiment.model, state.best_params, run.tokenizer


def _generate(options: argparse.Namespace, console: Console) -> int:
    from tokenlab.cache import CachePolicy, FullCache
    from tokenlab.core.context import View
    from tokenlab.decode import Autoregressive, complete, usual_sampler

    _check_source(options)
    cache: CachePolicy = FullCache()
    if options.cache is not None:
        cache = config.coerce(options.cache, CachePolicy, "--cache")
    try:
        sampler = usual_sampler(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model, params, tokenizer = _named_model(options)
    view = View(model=model, params=params)
    decoder = Autoregressive(
        max_new_tokens=options.tokens,
        sampler=sampler,
        end_ids=(tokenizer.eos_id,),
        cache=cache,
        prefill_chunk=options.prefill_chunk,
    )
    streamed = len(options.prompt) == 1
    if streamed:
        sys.stdout.write(options.prompt[0])
    completions, generation = complete(
        view,
        tokenizer,
        options.prompt,
        decoder=decoder,
        seed=options.seed,
        stop=options.stop,
        on_text=_write if streamed else None,
    )
    if streamed:
        sys.stdout.write("\n")
    else:
        for prompt, text in completions:
            console.print(f"[bold]{prompt}[/bold]{text}\n", highlight=False)
    mean = generation.logp_model.sum() / max(1, generation.lengths.sum())
    console.print(f"{generation.lengths.sum()} tokens, mean log-probability {mean:.3f} nats")
    for name, counts in generation.statistics.items():
        console.print(f"{name}: {counts.sum():,.0f}")
    return 0


def _write(row: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _data(options: argparse.Namespace, console: Console) -> int:
    from tokenlab.data import corpora

    if options.action == "fetch":
        if options.name is None:
            raise UserError("name a corpus: tokenlab data fetch english_prose")
        console.print(str(corpora.prepare(options.name)), soft_wrap=True)
        return 0
    console.print(json.dumps(corpora.known(), indent=2))
    return 0


def _models(options: argparse.Namespace, console: Console) -> int:
    from tokenlab.interop import assets

    if options.action == "fetch":
        if options.name is None:
            raise UserError("name a model: tokenlab models fetch smollm2_135m")
        console.print(str(assets.fetch_model(options.name)), soft_wrap=True)
        return 0
    console.print(json.dumps(assets.known_models(), indent=2))
    return 0


def _study(options: argparse.Namespace, console: Console) -> int:
    from tokenlab.files import load_module
    from tokenlab.study.study import read_record, run_study, tables
    from tokenlab.train.folder import write_json

    module = load_module(options.experiment)
    if "study" not in vars(module):
        raise UserError(f"{options.experiment} has no function study() that returns a Study")
    study = module.study()
    folder = options.runs / f"study-{study.name}"
    known = None if options.known is None else read_record(options.known)
    result = run_study(study, folder, console=console, known=known)
    for table in tables(result):
        console.print(table)
    console.print(f"results: {folder}", soft_wrap=True)
    if options.record is not None:
        write_json(options.record, result.record())
    return 0 if result.holds else 1


def _systems(options: argparse.Namespace, console: Console) -> int:
    from tokenlab.systems import markdown, systems

    if options.markdown:
        sys.stdout.write(markdown(systems()))
        return 0
    table = Table("family", "system", "paper", "status")
    for entry in systems():
        table.add_row(entry.family, entry.name, entry.paper, entry.status)
    console.print(table)
    return 0
