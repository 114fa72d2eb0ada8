"""The command line: a thin shell around `mmrep.run` and friends.

Nothing heavy is imported before a command runs, so that ``--help`` and ``list`` answer at once.
"""

from __future__ import annotations

import logging
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrep._cli_errors import is_for_people, message

if TYPE_CHECKING:
    from mmrep.results import Results
    from mmrep.run import Run

app = typer.Typer(
    name="mmrep", help="Any kind of data in one embedding space.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

RecipeName = Annotated[str, typer.Argument(help="Name of a recipe (`mmrep list recipes`), or path of a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, as train.steps=100 or optim.lr=3e-4.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Saved model: a folder or a hub id.")]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps on a few samples, to see that it runs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved config and shapes; train nothing.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Refuse kernels that are not reproducible (GPUs); slower.")
    ] = False,
) -> None:
    """Train a recipe, then evaluate it. Under torchrun or accelerate launch, on several processes."""
    from mmrep.recipe import read_recipe
    from mmrep.run import Run

    changes = [*(overrides or ()), *(["train.deterministic=true"] if deterministic else [])]
    resolved = read_recipe(recipe, changes, smoke=smoke)
    if dry_run:
        from mmrep.describe import describe

        typer.echo(describe(Run(resolved, smoke=smoke)))
        return
    folder = out or _default_folder(recipe, smoke)
    run = Run(resolved, folder, smoke=smoke)
    _train(run, folder, resume, f"mmrep train {recipe} {' '.join(overrides or ())}".strip())


app.command("finetune", help="The same as train, with a recipe that begins from a saved model (start: …).")(train)


def _train(run: Run, folder: Path, resume: bool, command: str) -> None:
    from mmrep.training.engine import end_processes

    results = run.train(resume=resume, command=command, tell=typer.echo)
    end_processes()
    if results:
        _show(results)
        typer.echo(f"\nRun: {folder}    Next: mmrep report {folder}    mmrep index {folder}    mmrep search {folder} …")


@app.command()
def bind(
    model: Annotated[str, typer.Argument(help="Saved model: a folder, a run folder or a hub id.")],
    add: Annotated[str, typer.Option(help="The new modality, as MODALITY or COLUMN=MODALITY.")],
    data: Annotated[str, typer.Option(help="A table, a YAML file of a source or data section, or a recipe.")],
    through: Annotated[
        list[str], typer.Option(help="Tower that it is bound through, or COLUMN=TOWER; may be repeated.")
    ],
    overrides: Overrides = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of the new tower; default: by its modality.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/bind-<modality>.")] = None,
    features: Annotated[Path, typer.Option(help="Where features of the old towers are kept.")] = Path("runs/features"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps on a few samples, to see that it runs.")] = False,
) -> None:
    """Add a modality to a saved model's space; its old towers stay as they are, to the last bit."""
    from mmrep.bind import bind_recipe
    from mmrep.recipe import read_recipe
    from mmrep.run import Run

    made = bind_recipe(model, add=add, data=data, through=through, encoder=encoder, features=str(features))
    resolved = read_recipe(made, overrides or (), smoke=smoke)
    folder = out or _default_folder(f"bind-{add.rpartition('=')[2]}", smoke)
    _train(Run(resolved, folder, smoke=smoke), folder, resume, f"mmrep bind {model} --add {add} --data {data}")


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="Saved models of one architecture: folders or hub ids.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; must not exist.")],
    alpha: Annotated[
        float | None, typer.Option(help="Of two models A B: (1 - alpha) A + alpha B. Default: the mean of all.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="What the models were tuned from: adds their task vectors.")] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="With --base, of each model; may be repeated. Default: 1 / number."),
    ] = None,
    by_delta: Annotated[
        bool, typer.Option("--by-delta", help="With --base: each tensor by how far each model has moved it.")
    ] = False,
    learn: Annotated[
        str | None, typer.Option(help="With --base: a recipe, on whose data its objectives find the scales.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="With --learn: batches to learn from; default 100.")] = None,
) -> None:
    """Merge models in the space of their weights: interpolation, the mean of several, or task vectors."""
    from mmrep.finetune._command import merge as merged

    typer.echo(
        merged(models, out, alpha=alpha, base=base, scale=scale or (), by_delta=by_delta, learn=learn, steps=steps)
    )


@app.command()
def sweep(
    start: Annotated[str, typer.Argument(help="The model before fine-tuning.")],
    run: Annotated[Path, typer.Argument(help="Run folder of the fine-tuned one; its recipe says what is measured.")],
    names: Annotated[list[str] | None, typer.Argument(help="Which evaluations; default all of the recipe's.")] = None,
    steps: Annotated[int, typer.Option(help="How many steps alpha makes from 0 to 1.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Folder of sweep.html and sweep.json; default the run's.")] = None,
) -> None:
    """Measure every point between a model and its fine-tuned successor, and draw it."""
    from mmrep.finetune._command import sweep as swept

    typer.echo(swept(start, run, names or None, steps, out or run))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run folder; with --model, also a recipe.")],
    names: Annotated[list[str] | None, typer.Argument(help="Which evaluations; default all of the recipe's.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Another model, saved or of the hub; default the run's.")
    ] = None,
) -> None:
    """Evaluate a run's model again, or any model by the evaluations of a run or recipe."""
    from mmrep.run import evaluate_other, open_run

    _show(open_run(run).evaluate(names or None) if model is None else evaluate_other(run, model, names or None))


@app.command()
def encode(
    inputs: Annotated[
        list[str], typer.Argument(help="Values: files or texts, as the modality reads them; - = lines of stdin.")
    ],
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Where to write the embeddings, .npy float32 [n, dim].")],
    modality: Annotated[str | None, typer.Option(help="Tower or modality; needed if the model has several.")] = None,
    batch_size: int = 32,
    truncate_dim: int | None = None,
) -> None:
    """Embed files or texts into a .npy file."""
    import numpy as np

    from mmrep.hub.load import load

    values: list[Any] = [line.rstrip("\n") for line in sys.stdin] if inputs == ["-"] else list(inputs)
    vectors = load(_model_folder(model)).encode(values, modality, batch_size=batch_size, truncate_dim=truncate_dim)
    np.save(out, np.asarray(vectors), allow_pickle=False)
    typer.echo(f"{len(values)} embeddings → {out}", err=True)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Whatever mmrep.load takes: a folder, a hub id, open_clip:model/tag, …")],
    target: Annotated[str, typer.Argument(help="hf, sentence-transformers, open_clip, onnx or peft.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; absent or empty.")],
    tower: Annotated[str | None, typer.Option(help="The only tower to write.")] = None,
    base: Annotated[str | None, typer.Option(help="With peft: the model that the adapter is for.")] = None,
) -> None:
    """Write a model in the layout of another library."""
    from mmrep.hub.load import load

    written = load(_model_folder(model)).export(target, out, tower=tower, base=base)
    typer.echo(f"{model} → {written}", err=True)


@app.command()
def convert(
    weights: Annotated[str, typer.Argument(help="File of weights (.pt, .pth, .bin), or package:name/file.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    like: Annotated[
        str | None, typer.Option(help="timm:name: take the tensors' names from this network, by their order.")
    ] = None,
) -> None:
    """Write a torch file of weights as safetensors. Only tensors are read: nothing in the file is run."""
    from mmrep.hub.torch_file import convert as write

    typer.echo(f"{write(weights, out, like=like)} tensors → {out}", err=True)


@app.command()
def index(
    data: Annotated[Path, typer.Argument(help="Run folder (its held-out data is indexed), or a folder of files.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Saved model; default the run's own.")] = None,
    modality: Annotated[str, typer.Option(help="What the files are.")] = "image",
    out: Annotated[Path | None, typer.Option(help="Index folder; default <data>/index.")] = None,
    source: Annotated[str | None, typer.Option(help="Which held-out source of the run; default all.")] = None,
) -> None:
    """Embed a folder of files, or a run's data, into a searchable index on disk."""
    from mmrep.config import ConfigError
    from mmrep.embed.search import index_folder, index_run

    is_run = (data / "config.yaml").is_file()
    if not is_run and model is None:
        raise ConfigError([f"{data} is no run folder: say which model embeds its files with --model"])
    target = out or data / "index"
    if is_run:
        report = index_run(data, target, modality=modality, source=source, model=model)
    else:
        report = index_folder(data, target, model=_model_folder(model or ""), modality=modality)
    typer.echo(report)


@app.command()
def search(
    where: Annotated[Path, typer.Argument(help="Index folder, or a run folder or folder of files that holds `index`.")],
    query: Annotated[str, typer.Argument(help="A text, or the path of a file.")],
    modality: Annotated[
        str | None, typer.Option(help="What the query is; default: image for an existing file, else text.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many results.")] = 5,
) -> None:
    """Search an index with a text or with a file."""
    from mmrep.embed.search import open_search

    searcher = open_search(where)
    kind = modality or ("image" if Path(query).is_file() else "text")
    for rank, hit in enumerate(searcher.search(query, kind, k), 1):
        typer.echo(f"{rank:3d}  {hit.score:6.3f}  {hit.id}  {hit.record.get('text', '')}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default <run>/report.html.")] = None,
) -> None:
    """Write one static HTML page about a run."""
    from mmrep.report.from_run import report_run

    typer.echo(str(report_run(run, out)))


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="recipes, encoders, losses, objectives, sources, …")] = "recipes",
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as '*vit*'.")] = "*",
) -> None:
    """List registered names; imports none of them."""
    from mmrep.registry import REGISTRIES, UnknownNameError, near

    if kind == "recipes":
        from mmrep._recipe_files import recipe_names

        names = recipe_names(pattern)
    elif kind in REGISTRIES:
        names = REGISTRIES[kind].names(pattern)
    else:
        kinds = ["recipes", *REGISTRIES]
        raise UnknownNameError(f"unknown kind {kind!r}{near(kind, kinds)} One of: {', '.join(kinds)}")
    for name in names:
        typer.echo(name)


@app.command()
def methods(
    pattern: Annotated[str, typer.Argument(help="Names or ids that match, such as '*jepa*' or S053.")] = "*",
    todo: Annotated[bool, typer.Option(help="Only those that no recipe claims.")] = False,
) -> None:
    """List the published methods: which recipe is which, its equation's source, what was checked, what is not done."""
    from mmrep.methods import methods as catalogue
    from mmrep.methods import methods_table

    wanted = pattern.lower()
    rows = [row for row in catalogue() if any(fnmatchcase(x.lower(), wanted) for x in (row.id, row.name))]
    typer.echo(methods_table([row for row in rows if not (todo and row.claims)]))


@app.command()
def cp(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.")],
    to: Annotated[Path, typer.Argument(help="Folder or file to copy it to.")],
) -> None:
    """Copy a recipe to a place where you can edit it."""
    from mmrep._recipe_files import recipe_text
    from mmrep.config import ConfigError

    text = recipe_text(recipe)
    target = to / f"{recipe}.yaml" if to.is_dir() else to
    if target.exists():
        raise ConfigError([f"{target} exists already; it is not overwritten"])
    target.write_text(text, encoding="utf-8")
    typer.echo(str(target))


@app.command()
def check(
    what: Annotated[
        str, typer.Argument(help="Name of an encoder, path of a saved model or recipe, or the word `gradients`.")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [A.B=VALUE]...",
            help="After an encoder: fields of its config. After `gradients`: the recipe, and changes to it.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="gradients: how many to start, default 2; a launcher's number goes first.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="gradients: size of the batch; default 16 a process.")] = None,
) -> None:
    """Check an encoder's contract, a saved model, or a recipe; or, with `gradients RECIPE`, training on many processes.

    `mmrep check hf-image path=./checkpoint` builds the encoder with these fields of its config.

    `mmrep check gradients RECIPE [a.b=value ...]` compares the gradient of one process with that of several real ones,
    which take unequal shares of one batch of the recipe's data: per loss, tower, temperature and objective. Exit code 1
    if any differs. Under torchrun or accelerate launch it checks those processes; else it starts its own.
    """
    from mmrep.check import check as run_checks
    from mmrep.check import check_gradients
    from mmrep.config import ConfigError

    if what == "gradients":
        text, agree = check_gradients(rest or (), processes=processes, samples=samples)
        if text:
            typer.echo(text)
        if not agree:
            sys.exit(1)
        return
    if processes is not None or samples is not None:
        raise ConfigError([f"check {what}: --processes and --samples are options of `check gradients`"])
    for line in run_checks(what, rest or ()):
        typer.echo(line)


@app.command()
def env() -> None:
    """Versions and machine, for a bug report."""
    from mmrep.describe import environment

    for name, value in environment().items():
        typer.echo(f"{name:18s} {value}")


def main() -> None:
    """Entry point: expected errors become one readable message and exit code 2; Ctrl-C is exit code 130."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        typer.echo("stopped; continue with --resume", err=True)
        sys.exit(130)
    except Exception as error:
        if not is_for_people(error):
            raise
        typer.echo(f"error: {message(error)}", err=True)
        sys.exit(2)


def _default_folder(recipe: str, smoke: bool) -> Path:
    base = Path("runs") / (Path(recipe).stem + ("-smoke" if smoke else ""))
    if smoke:
        import shutil

        shutil.rmtree(base, ignore_errors=True)  # a smoke run is only a look: the last one is no work to keep
    return base


def _model_folder(name: str) -> str:
    """A run folder stands for its model."""
    inner = Path(name) / "model"
    return str(inner) if (inner / "config.json").is_file() else name


def _show(results: Results) -> None:
    from mmrep.describe import results_table

    typer.echo(results_table(results))
