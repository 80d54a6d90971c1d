"""The command `serve`: indices over HTTP, the keys that open it, and the file for a cluster."""

from typing import Annotated

import typer

from ray_retrieval.cli.options import EngineOption, with_engine

IndexesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INDEX...",
        help="Index directories. Each is called as its run, or as you say: NAME=INDEX. Searches that name "
        "none ask the first.",
    ),
]


def serve(
    indexes: IndexesArgument = None,
    model: Annotated[
        str | None,
        typer.Option(help="The directory of the model that made them; looked for beside each index."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting, e.g. shard_groups=2, writable=true, api_keys=FILE."
        ),
    ] = None,
    engine: EngineOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 unless told.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 unless told.")] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the file for `serve deploy` on a cluster, and end."),
    ] = False,
    new_key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add a key to the file of --set api_keys=FILE, print it, and end."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="Of the new key: read, which it is unless told, or write for changes as well."),
    ] = None,
) -> None:
    """Answer queries over HTTP, with a web page, until interrupted."""
    import yaml

    from ray_retrieval.errors import RecipeError
    from ray_retrieval.progress import Display
    from ray_retrieval.recipe import from_settings
    from ray_retrieval.serve.config import ServeConfig

    chosen = [f"{key}={value}" for key, value in (("host", host), ("port", port)) if value is not None]
    config = from_settings(ServeConfig, [*with_engine(settings, engine), *chosen])
    if new_key is not None:
        options = {"--model": model, "--engine": engine, "--host": host, "--port": port}
        for option, value in {"INDEX": indexes, **options, "--print-config": print_config}.items():
            if value:
                raise RecipeError(
                    "it is for a server, and --new-key only adds to a file of keys",
                    where=option,
                    mend="leave one of them out",
                )
        typer.echo(_key(config, new_key, scope or "read"))
        return
    if scope is not None:
        raise RecipeError("it is for --new-key", where="--scope", mend="leave it out")
    if not indexes:
        raise RecipeError("no index is named", mend="name one: ray-retrieval serve runs/quickstart/index")

    from ray_retrieval.serve.app import run
    from ray_retrieval.serve.application import check, named, serve_config

    served = named(indexes, model)
    if print_config:
        check(served, config)  # What is wrong is told before anything is deployed.
        typer.echo(yaml.safe_dump(serve_config(served, config), sort_keys=False), nl=False)
        return
    display = Display()
    with run(served, config, blocking=True, starting=lambda: display.say("starting the server …")) as url:
        display.say(f"serving {', '.join(served)}: page {url}, API {url}/docs; Ctrl-C stops it")


def _key(config: object, name: str, scope: str) -> str:
    """A new key; its hash is in the file by then."""
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.serve.config import ServeConfig
    from ray_retrieval.serve.keys import new_key

    assert isinstance(config, ServeConfig)
    if scope not in ("read", "write"):
        raise RecipeError(f"a key is for read or write, got '{scope}'", where="--scope")
    if config.api_keys is None:
        raise RecipeError("no file of keys is named", mend="name one: --set api_keys=keys.txt")
    return new_key(config.api_keys, name, "write" if scope == "write" else "read")
