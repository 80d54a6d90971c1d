"""A command of this package as a job of a cluster: what travels with it, and how it is followed.

The package itself and the recipe that the command names are uploaded, so that the cluster runs the code at
hand; the packages it depends on have to be installed there. Images, models and results do not travel: they
lie where every node can read them.
"""

import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray_retrieval.config import Config
from ray_retrieval.errors import ClusterError, RecipeError
from ray_retrieval.recipe import load_study, template
from ray_retrieval.storage import is_uri, refuse_password
from ray_retrieval.tuning.trials import check

TAKES_RECIPE = ("run", "train", "tune", "evaluate")
"""The verbs whose first argument is a recipe."""

_PACKAGE = Path(__file__).parent
_RECIPES = "recipes"  # where recipes lie in the job's working directory
_NOT_SENT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_MOST_BYTES = 32 << 20
_NO_PATHS = {"name", "source", "metric", "benchmark", "published"}  # keys of a recipe whose text is no path
_OUTPUTS = {"output", "--out", "--embeddings", "--picture", "--figure"}  # what names a place to write to
_STOPPED = 130  # as a command that was interrupted
_LOST_S = 300.0


class Follows(Protocol):
    """What following a job asks of a server: `ray_retrieval.cluster.jobs.JobServer`."""

    def job(self, name: str) -> Any: ...

    def follow(self, name: str, show: Callable[[str], None], *, seen: int = 0) -> int: ...

    def logs(self, name: str) -> str: ...


@dataclass(frozen=True)
class Submission:
    """A command made ready for a cluster."""

    arguments: tuple[str, ...]
    """The command line there, from the verb on."""
    command: str
    """The command line as it was given."""
    name: str
    """What the job is called."""
    recipes: dict[str, Path] = field(default_factory=dict)
    """Files to upload, by their place in the job's working directory."""
    warnings: tuple[str, ...] = ()
    """Paths that the cluster may not see, each in a sentence."""

    def entrypoint(self, python: str = "python") -> str:
        """The shell command that the cluster runs."""
        return f"{python} -m ray_retrieval.cli {shlex.join(self.arguments)}"

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A temporary folder of all that is uploaded: the job's working directory.

        Raises:
            ClusterError: if it is too large to upload.
        """
        with tempfile.TemporaryDirectory(prefix="ray_retrieval-") as made:
            folder = Path(made)
            shutil.copytree(_PACKAGE, folder / _PACKAGE.name, ignore=_NOT_SENT)
            for place, file in self.recipes.items():
                (folder / place).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / place)
            _check_size(folder)
            yield folder


def prepare(arguments: Sequence[str], *, name: str | None = None) -> Submission:
    """A command made ready for a cluster, checked as far as can be from here.

    Args:
        arguments: a verb and what follows it.
        name: what the job is called, made unlike any other by a suffix; by default from verb and recipe.

    Raises:
        RecipeError: if there is no verb, if the recipe is wrong or missing, if the name has other characters
            than letters, digits, `-` and `_`, or if results would be written to a relative path, and so
            into the job's own folder, which is deleted after it.
        ArtefactError: if a URI holds a password.
    """
    if not arguments or arguments[0].startswith("-"):
        raise RecipeError("no verb to submit", mend="e.g. ray-retrieval submit -- run RECIPE output=s3://…")
    sent, recipes = [arguments[0]], dict[str, Path]()
    named = _recipe_in(arguments)
    for argument in arguments[1:]:
        file = Path(os.path.expandvars(os.path.expanduser(argument)))
        # os.path's takes a filter that is too long for a path, which Path's does not.
        if (argument == named or file.suffix in (".yaml", ".yml")) and os.path.isfile(file):
            place = f"{_RECIPES}/{file.name}"
            if recipes.get(place, file) != file:
                raise RecipeError("two files of that name would be uploaded", where=file.name)
            recipes[place] = file
            sent.append(place)
        else:
            sent.append(argument)
    found = list(_settings_of(arguments))
    for _, value in found:
        refuse_password(value)
    _refuse_relative_outputs(arguments, found)
    return Submission(
        arguments=tuple(sent),
        command=shlex.join(arguments),
        name=_unique(name or "-".join([arguments[0], *(file.stem for file in recipes.values())]), name),
        recipes=recipes,
        warnings=tuple(_warnings(found)),
    )


def follow(server: Follows, name: str, show: Callable[[str], None], *, pause_s: float = 1.0) -> int:
    """Show what a job writes until it ends.

    Returns:
        Its exit code; 130 if it was stopped.

    Raises:
        ClusterError: if the cluster has not answered for five minutes, or Ray lost the job's process.
    """
    seen, answered = 0, time.monotonic()
    while True:
        seen = server.follow(name, show, seen=seen)
        try:
            job = server.job(name)
        except ClusterError as error:
            if time.monotonic() - answered > _LOST_S:
                raise ClusterError(
                    f"the cluster answers no more ({error.problem}); the job may go on",
                    where=name,
                    mend=f"ray-retrieval submit logs {name} --follow",
                ) from error
        else:
            answered = time.monotonic()
            if job.ended:
                with suppress(ClusterError):  # the connection may have broken just before
                    if rest := server.logs(name)[seen:]:
                        show(rest)
                return _exit_code(job)
        time.sleep(pause_s)


def variables(settings: Sequence[str]) -> dict[str, str]:
    """Environment variables for a job, each `KEY=VALUE`, or `KEY` for the value it has here.

    Raises:
        RecipeError: if a variable is not set here.
    """
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals and key not in os.environ:
            raise RecipeError("this variable is not set here", where=key, mend=f"give its value: {key}=VALUE")
        found[key] = value if equals else os.environ[key]
    return found


def _exit_code(job: Any) -> int:
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return _STOPPED
    if job.exit_code:
        # As a shell says it: 128 and the signal that ended it.
        return int(job.exit_code) if job.exit_code > 0 else 128 - int(job.exit_code)
    line = next((line for line in job.message.splitlines() if line.strip()), "Ray does not say why")
    raise ClusterError(f"the job did not run to its end: {line.strip()}", where=job.name)


def _unique(stem: str, given: str | None) -> str:
    if given is not None and not re.fullmatch("[A-Za-z0-9_-]+", given):
        raise RecipeError(f"a job's name is of letters, digits, '-' and '_', got '{given}'", where="`name`")
    return f"{re.sub('[^A-Za-z0-9_-]+', '-', stem)}-{uuid.uuid4().hex[:8]}"


def _recipe_in(arguments: Sequence[str]) -> str | None:
    """The recipe that a command line names; None where its verb takes none."""
    given = (text for text in arguments[1:] if not text.startswith("-"))
    return next(given, None) if arguments[0] in TAKES_RECIPE else None


def _settings_of(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a command line says, as pairs of where it says so and the text there.

    Of a recipe these are all its fields, with the settings that follow it; a recipe that is wrong is refused.
    """
    verb, *rest = arguments
    recipe = _recipe_in(arguments)
    if recipe is not None:
        settings = [text for text in rest if not text.startswith("-")][1:]
        if verb == "tune":
            made = template(recipe, settings)
            check(made({}), made)
        for member in load_study(recipe, settings):
            yield from _texts(member, "")
        return
    option = ""
    for argument in rest:
        if argument.startswith("-"):
            option, _, value = argument.partition("=")
            if value:
                yield option, value
        else:
            yield option or argument, argument
            option = ""


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of a recipe, with its dotted key."""
    if isinstance(value, Config):
        value = value.model_dump(mode="json")
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _NO_PATHS:
                yield from _texts(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)


def _refuse_relative_outputs(arguments: Sequence[str], found: list[tuple[str, str]]) -> None:
    outputs = [(key, value) for key, value in found if key in _OUTPUTS]
    shared = "an absolute path that all nodes share"
    # What is fetched and built there lies on a disk.
    mend = f"give {shared}" if arguments[0] == "gldv2" else f"give a URI (s3://…), or {shared}"
    if list(arguments[:2]) == ["gldv2", "download"]:
        # The one verb that writes into its first argument.
        outputs += [("FOLDER", value) for key, value in found[1:] if key != "--tars"]
    for key, value in outputs:
        if not is_uri(value) and not _is_rooted(value):
            raise RecipeError(
                "a relative path would lie in the job's own folder, which is deleted after it",
                where=f"{key}={value}",
                mend=mend,
            )


def _warnings(found: list[tuple[str, str]]) -> Iterator[str]:
    # The members of a study say the same again.
    for key, value in dict.fromkeys(found):
        if is_uri(value):
            continue
        named = value if key == value else f"{key}: {value}"
        if _is_rooted(value):
            yield f"{named} has to be there on every node, or be a URI (s3://…)"
        elif os.path.exists(value):
            yield f"{named} is here, but does not travel with the job: give a URI (s3://…)"


def _is_rooted(value: str) -> bool:
    """Whether a text is a path that begins at the root, at home or at a variable."""
    return value.startswith(("/", "~", "$"))


def _check_size(folder: Path) -> None:
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if sum(sizes.values()) > _MOST_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        raise ClusterError(
            f"{sum(sizes.values()) / 1e6:,.0f} MB to upload, {_MOST_BYTES / 1e6:.0f} MB at most; the largest "
            f"file has {sizes[largest] / 1e6:,.0f} MB",
            where=largest.relative_to(folder),
            mend="keep data out of the package's folder",
        )
