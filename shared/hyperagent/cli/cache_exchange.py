"""`hyperagent cache export | import | publish`: exchange rows with other tools, caches and object stores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from hyperagent.cli.cache_care import Json, Root, Tokens
from hyperagent.cli.display import add_bar, print_result, progress_bars


def export(
    root: Root,
    tokens: Tokens,
    out: Annotated[Path, typer.Option(help="Folder to write, with a file per trajectory.")],
    file_format: Annotated[
        Literal["npz", "parquet", "safetensors"], typer.Option("--format", help="Format of the files.")
    ] = "safetensors",
    as_json: Json = False,
) -> None:
    """Write the rows of a tokens file's trajectories for other tools; `import` reads them back."""
    from hyperagent.cache.local import LocalCache
    from hyperagent.export.transfer import export as export_files

    with progress_bars() as bars, LocalCache.open(root) as cache:
        report = export_files(
            cache,
            tokens,
            out,
            file_format=file_format,
            progress=add_bar(bars, "exporting", unit="trajectories"),
        )
    print_result({**asdict(report), "folder": str(out)}, as_json=as_json)


def import_(
    source: Annotated[Path, typer.Argument(help="Folder of another cache, or a folder written by `export`.")],
    root: Root,
    codec: Annotated[
        Literal["exact", "compact", "archive"] | None,
        typer.Option(help="Codec of a new cache; default: the source's, or compact."),
    ] = None,
    kept_mass: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Probability mass of the most likely ids to keep per row.")
    ] = None,
    min_k: Annotated[int | None, typer.Option(min=1, help="Minimum number of ids to keep per row.")] = None,
    as_json: Json = False,
) -> None:
    """Import the rows of another cache of the same teacher, or of exported files, into a cache."""
    from hyperagent.cache.format.manifest import CacheSettings, manifest_path
    from hyperagent.cache.local import LocalCache
    from hyperagent.cache.maintenance.merge import merge
    from hyperagent.export.transfer import import_files, read_description

    said = {"codec": codec, "kept_mass": kept_mass, "min_k": min_k}
    wanted = {name: value for name, value in said.items() if value is not None}
    with progress_bars() as bars:
        progress = add_bar(bars, "importing", unit="trajectories")
        if manifest_path(source).exists():
            with LocalCache.open(source) as other:
                # An existing cache keeps its storage settings, whatever those of the source are.
                inherited = {} if manifest_path(root).exists() else other.settings.model_dump()
                settings = CacheSettings(**{**inherited, **wanted})
                with LocalCache.create_or_open(root, other.identity, settings=settings) as cache:
                    result = asdict(merge(other, cache, progress))
        else:
            identity = read_description(source).identity
            with LocalCache.create_or_open(root, identity, settings=CacheSettings(**wanted)) as cache:
                result = asdict(import_files(source, cache, progress))
    print_result(result, as_json=as_json)


def publish(
    root: Root,
    url: Annotated[str, typer.Argument(help="Target as an fsspec URL: s3://bucket/cache, file:///mnt/cache.")],
    as_json: Json = False,
) -> None:
    """Copy a cache's sealed shards to an object store, from which trainers read it; a rerun copies only new shards."""
    from hyperagent.cache.local import LocalCache
    from hyperagent.cache.maintenance.publish import publish as publish_cache

    with progress_bars() as bars, LocalCache.open(root) as cache:
        copied = publish_cache(cache, url, add_bar(bars, "publishing", unit="bytes"))
    print_result({"url": url, "bytes_copied": copied}, as_json=as_json)
