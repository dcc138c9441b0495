"""`gistfast store`: look into a guide store, check it, mend it, clear it up."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import typer

from gistfast.cli.options import command
from gistfast.settings.stages import to_dict
from gistfast.settings.store import StoreGcSettings, StoreInfoSettings, StoreRepairSettings, StoreVerifySettings

app = typer.Typer(
    help="Look into a guide store, check it, mend it, clear it up.", no_args_is_help=True, rich_markup_mode=None
)


def _info(settings: StoreInfoSettings) -> None:
    import json

    from gistfast.evaluation.report import print_facts
    from gistfast.store.describe import describe_store

    described = describe_store(settings.store)
    if settings.json:
        typer.echo(json.dumps(described, indent=1, ensure_ascii=False))
        return
    print_facts(described["path"], list(_lines(described)))


def _verify(settings: StoreVerifySettings) -> None:
    from pathlib import Path

    from gistfast.store.verify import check_store

    found = check_store(Path(settings.store), deep=settings.deep)
    for line in [*found.problems, *found.notes]:
        typer.echo(line)
    if found.problems:
        raise typer.Exit(1)
    looked_at = "every byte" if settings.deep else "commits and sizes; --deep reads every byte"
    typer.echo(f"{settings.store} is sound: {found.num_shards} shards, {_size(found.num_bytes)} ({looked_at})")


def _repair(settings: StoreRepairSettings) -> None:
    from gistfast.stages.repair import repair

    done = repair(**to_dict(settings))
    for line in done.mended:
        typer.echo(f"mended: {line}")
    for line in done.left:
        typer.echo(f"still bad: {line}")
    if done.left:
        raise typer.Exit(1)
    typer.echo(f"{settings.store} is sound" + ("" if done.mended else ": nothing to mend"))


def _gc(settings: StoreGcSettings) -> None:
    from gistfast.store.garbage import collect_garbage

    collected = collect_garbage(**to_dict(settings))
    if settings.dry_run:
        for item in collected.garbage:
            typer.echo(f"{item.path} ({_size(item.num_bytes)})")
    counts = Counter(item.what for item in collected.garbage)
    of_what = ", ".join(f"{number} {what}" for what, number in counts.items()) or "nothing to remove"
    typer.echo(f"{'would free' if settings.dry_run else 'freed'} {_size(collected.num_bytes)}: {of_what}")
    if collected.num_young:
        typer.echo(f"{collected.num_young} files younger than an hour were kept: a process may be writing them (--now)")


app.command("info")(command(StoreInfoSettings, _info))
app.command("verify")(command(StoreVerifySettings, _verify))
app.command("repair")(command(StoreRepairSettings, _repair))
app.command("gc")(command(StoreGcSettings, _gc))


def _lines(store: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `gistfast store info` says, by line."""
    for guide in store["guides"]:
        yield "guide", f"{guide['name']}{_revision(guide['revision'])}, key {guide['key']}"
        limit = f"{guide['max_length']} tokens" if guide["max_length"] else "any length"
        stored = f"{guide['width']} wide, {guide['dtype']}, computed in {guide['compute_dtype']}"
        yield "", f"{stored}, pooling {guide['pooling']}, {limit}, weight {guide['weight']:g}"
        yield "", f"prompts {guide['query_prompt']!r} and {guide['document_prompt']!r}"
    if len(store["guides"]) > 1:
        yield "score", f"{store['guide_score']} of the guides"
    data = store["data"]
    yield "rows", f"{data['rows']:,}, {data['held_out']:,} held out; columns {', '.join(data['columns'])}"
    yield "texts", f"{data['texts']:,}"
    if data["tasks"]:
        yield "tasks", f"{len(data['tasks'])}: {', '.join(data['tasks'][:8])}{', ...' * (len(data['tasks']) > 8)}"
    for segment in data["segments"]:
        new = f"{segment['num_rows']:,} rows and {segment['num_texts']:,} texts were new"
        left_out = f"{segment['repeated']:,} rows repeated, {segment['skipped']:,} skipped"
        yield "from", f"{segment['description']}: {new}, {left_out}"
    yield "on disk", f"{_size(sum(store['bytes'].values()))} in all"
    for folder, size in store["bytes"].items():
        yield "", f"{_size(size)} {folder if folder != '.' else 'store.json'}"
    if index := store["index"]:
        yield "index", f"{index['kind']}, recall@10 {index['recall_at_10']:.3f}"
    if mined := store["mined"]:
        below = f"{mined['margin']:g} {mined['margin_strategy']}"
        yield "mined", f"{mined['negatives']} negatives a row, margin {below}"
    yield "fingerprint", store["fingerprint"]
    yield from _progress(store)


def _progress(store: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is under way, by line."""
    if folder := store["replacement"]:
        yield "to come", f"a store in its place, in {folder}: --overwrite goes on with it"
    if store["finished"] and store["to_come"] is None:
        return
    if not store["finished"]:
        yield "unfinished", "the command that began it goes on with --resume"
    if coming := store["to_come"]:
        guides = "".join(f", guide {name}" for name in coming["guides"])
        yield "to come", f"{coming['rows']:,} rows, {coming['texts']:,} texts{guides}"
    for kind, shards in store["shards"].items():
        if shards["done"] < shards["planned"]:
            yield "unfinished", f"{kind}: {shards['done']} of {shards['planned']} shards"


def _revision(revision: str | None) -> str:
    return f" at {revision[:8]}" if revision else ""


def _size(num_bytes: int) -> str:
    """The size as `1.2 GB`."""
    from rich.filesize import decimal

    return decimal(num_bytes)
