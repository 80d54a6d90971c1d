"""The command `export`. Parsing and printing only."""

from typing import Annotated

import typer

from ray_retrieval.cli.options import ModelArgument, Root, check_root
from ray_retrieval.cli.printing import AsJson, print_json, short


def export(
    model: ModelArgument,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Where it goes; unless told, into the model's folder, for --engine."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="onnx (needs the extra `export`) or torch (torch.export).")
    ] = "onnx",
    images: Annotated[
        str | None,
        typer.Option(
            help="Images to compare on: a folder, list, CSV or Parquet; else those of the recipe beside the "
            "model."
        ),
    ] = None,
    root: Root = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Of onnx: the backbone in 8 bits, calibrated on the images; what it costs is measured where "
            "they have labels.",
        ),
    ] = False,
    max_loss: Annotated[
        float | None,
        typer.Option(help="How much of MAP or recall@1, from 0 to 1, 8 bits may cost; 0.02 unless told."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as one file for other programs, compared with the model on images."""
    from ray_retrieval.cli.tables import print_export
    from ray_retrieval.data.table import open_images
    from ray_retrieval.errors import RecipeError
    from ray_retrieval.export import default_folder
    from ray_retrieval.export import export as run_export
    from ray_retrieval.storage import Folder

    if root is not None and images is None:
        raise RecipeError("it is for the paths of --images", where="--root", mend="leave it out")
    if images is not None:
        check_root(root, [images])
    table = None if images is None else open_images(images, root=root)
    target = default_folder(Folder(model), form, int8) if out is None else Folder(out)
    made = run_export(model, target, form=form, images=table, int8=int8, max_loss=max_loss)
    if as_json:
        print_json({"folder": out if out is not None else short(target.uri), **made})
    else:
        print_export(made, target)
