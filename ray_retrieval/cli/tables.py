"""What commands print of results, as tables for a terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ray_retrieval.cli.printing import console, print_json, short
from ray_retrieval.descriptors import Form
from ray_retrieval.storage import Folder
from ray_retrieval.words import counted


def number(value: float | None) -> str:
    """Four places, or a dash where there is no value."""
    return "–" if value is None else f"{value:.4f}"


def print_metrics(metrics: dict[str, Any]) -> None:
    """A short table of the models measured, and the policy of its main number."""
    models = metrics["models"]
    table = _table("metric", *(f"{name} (epoch {model['epoch']})" for name, model in models.items()))
    validated = dict.fromkeys(name for model in models.values() for name in model["validation"])
    for name in validated:
        table.add_row(f"validation {name}", *(number(m["validation"].get(name)) for m in models.values()))
    first = next(iter(models.values()))["test"]
    for row, entry in enumerate(first):
        table.add_row(entry["name"], *(number(model["test"][row]["value"]) for model in models.values()))
    out = console(highlight=False)
    out.print(table)
    print_published(metrics["published"], out)
    out.print(f"{first[0]['name']}: {escape(first[0]['policy'])}.", style="dim")
    for note in next(iter(models.values()))["notes"]:
        out.print(f"note: {escape(note)}.", style="dim")


def print_comparison(comparison: dict[str, Any]) -> None:
    """The main metrics of each run, those over seeds, the published results, and notes."""
    from ray_retrieval.compare_page import policies_of  # with torch, which other tables need not

    runs = comparison["runs"]
    names = _main_metrics(runs)
    table = _table("run", "size", "seed", *names)
    told_apart = len({(run["name"], run["size"], run["seed"]) for run in runs}) == len(runs)
    for run in runs:
        values = {metric["name"]: metric["value"] for metric in run["metrics"]}
        cells = (run["name" if told_apart else "label"], _size(run), str(run["seed"]))
        table.add_row(*map(escape, cells), *(number(values.get(name)) for name in names))
    out = console(highlight=False)
    out.print(table)
    if comparison["seeds"]:
        table = _table("over seeds: mean ± deviation", "size", "seeds", *names)
        for group in comparison["seeds"]:
            found = {metric["name"]: metric for metric in group["metrics"]}
            means = [
                _with_deviation(found[n]["mean"], found[n]["deviation"]) if n in found else "–" for n in names
            ]
            table.add_row(escape(group["label"]), _size(group), str(len(group["seeds"])), *means)
        out.print(table)
    print_published(comparison["published"], out, by_run=len(runs) > 1)
    for name in names[:1]:
        out.print(f"{name}: {escape(policies_of(name, runs)[0])}.", style="dim")
    for note in comparison["notes"]:
        out.print(f"note: {escape(note)}.", style="yellow")


def print_published(rows: list[dict[str, Any]], out: Console, *, by_run: bool = False) -> None:
    """Results against published ones, `by_run` with whose they are; nothing where there are none."""
    if not rows:
        return
    table = _table(
        "published",
        *(["run"] if by_run else []),
        "metric",
        "size",
        "value",
        "measured",
        "difference",
        "reached",
    )
    for row in rows:
        difference = "–" if row["difference"] is None else f"{row['difference']:+.4f}"
        reached = {None: "–", True: "yes", False: "no"}[row["reached"]]
        table.add_row(
            escape(row["source"]),
            *([escape(row["run"])] if by_run else []),
            escape(row["metric"]),
            str(row["size"]),
            number(row["published"]),
            _with_deviation(row["measured"], row.get("deviation")),
            difference,
            reached,
        )
    out.print(table)


def print_models(models: list[dict[str, Any]]) -> None:
    """Trained models with what selected them."""
    table = _table("model", "size", "seed", "epoch", "validation")
    for model in models:
        training = model["training"]
        table.add_row(
            escape(model["folder"]),
            str(Form.from_json(model).size),
            str(training["seed"]),
            str(training["epoch"]),
            ", ".join(f"{name} {number(value)}" for name, value in model["metrics"]["validation"].items()),
        )
    console(highlight=False).print(table)


def print_trials(tuned: dict[str, Any]) -> None:
    """The trials of a search, the best ones marked, and what its model reaches on the test queries."""
    objectives, fields = list(tuned["objectives"]), list(tuned["trials"][0]["parameters"])
    table = _table("trial", *fields, *objectives, "epochs", "state")
    best = [trial["number"] for trial in tuned["best"]]
    for trial in tuned["trials"]:
        values = [number((trial["values"] or {}).get(name)) for name in objectives]
        chosen = [
            escape(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in trial["parameters"].values()
        ]
        mark = " *" if trial["number"] in best else ""
        state = "failed: " + escape(trial["error"]) if trial["state"] == "failed" else trial["state"]
        table.add_row(f"{trial['number']:04d}{mark}", *chosen, *values, str(trial["epochs"]), state)
    out = console(highlight=False)
    out.print(table)
    metrics = tuned["metrics"]
    for metric in metrics["models"][metrics["selected"]]["test"][:1] if metrics else ():
        out.print(f"{metric['name']} {number(metric['value'])} on the test queries, by trial {best[0]:04d}")
        out.print(f"{metric['name']}: {escape(metric['policy'])}.", style="dim")


def print_answers(kind: str, queries: list[str], answers: list[Any], form: Form, as_json: bool) -> None:
    """The hits of each query.

    Args:
        kind: what queries are, `image` or `vector`.
        queries: what they are called.
        answers: `answers.Answer` of each.
        form: of the index.
        as_json: print one object.
    """
    pairs = list(zip(queries, answers, strict=True))
    if as_json:
        found = [
            {kind: query, "hits": [hit.as_json() for hit in answer.hits], "notes": answer.notes}
            for query, answer in pairs
        ]
        print_json({"queries": found})
        return
    for query, answer in pairs:
        # What verification has found is told in the place of its score.
        scored = any(hit.score is not None for hit in answer.hits) and answer.hits[0].inliers is None
        columns = ("rank", *(["score"] if scored else []), "distance", "label", "id", "path")
        table = Table(title=escape(query), title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for hit in answer.hits:
            first = [str(hit.rank), f"{hit.score:.4f}"] if scored else [str(hit.rank)]
            far = hit.in_words(form)
            table.add_row(*map(escape, (*first, far, ", ".join(hit.labels), hit.id, hit.path or "")))
        console().print(table)
        for note in answer.notes:
            print(f"note: {note}")


def print_prediction(prediction: dict[str, Any], far: str) -> None:
    """The nearest image, and the likeliest classes where the model has a class head."""
    nearest, classes = prediction["nearest"], prediction["classes"]
    out = console(highlight=False, soft_wrap=True)
    lines = {
        "nearest": nearest["id"],
        "distance": far,
        "label": ", ".join(nearest["labels"]) or "–",
        "path": nearest["path"] or "– (the image is in the index)",
    }
    for key, value in lines.items():
        out.print(f"{key:<8} {escape(value)}")
    if classes:
        table = _table("class", "number", "probability")
        for guess in classes:
            table.add_row(escape(guess["name"]), str(guess["number"]), number(guess["probability"]))
        out.print(table)
    for note in prediction["notes"]:
        out.print(f"note: {escape(note)}.")


def print_datasets(surveys: list[dict[str, Any]]) -> None:
    """Every benchmark on a line."""
    table = _table("benchmark", "classes", "MAP@", "queries", "database", "train", "files")
    for found in surveys:
        counts = [_count(found["counts"].get(part)) for part in ("queries", "database", "train")]
        missing = sum(not entry["found"] for entry in found["files"])
        images = "there" if found["complete"] else "no images"
        state = images if not missing else f"{missing} missing"
        table.add_row(found["name"], _count(found["classes"]), _count(found["k"], "all"), *counts, state)
    out = console(highlight=False)
    out.print(table)
    out.print(
        escape("one of them: ray-retrieval datasets NAME [root=FOLDER]; your own: data.name=images or lists")
    )


def print_survey(found: dict[str, Any]) -> None:
    """One benchmark: its sources, its files, and what its lists say."""
    out = console(highlight=False, soft_wrap=True)
    counts = {part: found["counts"].get(part) for part in ("train", "queries", "database")}
    counts = {part: count for part, count in counts.items() if count is not None}
    published = ", ".join(f"{part} {count:,}" for part, count in counts.items()) or "–"
    lines = {
        "benchmark": found["name"],
        "published": published,
        "classes": _count(found["classes"]),
        "measured": _measured(found),
        "images": found["images"],
        "lists": found["lists"] or "none needed",
    }
    for key, value in lines.items():
        out.print(f"{key:<10} {escape(value)}")
    for entry in found["files"]:
        out.print(f"{'found' if entry['found'] else 'missing':<10} {escape(entry['file'])}")
    sampled = found["sampled"]
    if sampled["missing"]:
        missing, first = len(sampled["missing"]), sampled["missing"][0]
        out.print(
            f"missing    {missing} of {sampled['images']} images looked for, the first is {escape(first)}"
        )
    if found["parts"]:
        columns = ("images", "published", "twice", "no label", "labels", "similar", "weight")
        table = _table("list", *columns)
        for part, facts in found["parts"].items():
            weight = facts["positive_weight"]
            table.add_row(
                part,
                _count(facts["images"]),
                _count(found["counts"].get(part)),
                _count(facts["duplicates"]),
                _count(facts["without_label"]),
                f"{facts['labels_an_image']:.2f}",
                f"{facts['positive_pair_rate']:.4f}",
                "–" if weight is None else f"{weight:.2f}",
            )
        out.print(table)
        out.print(
            "labels: mean number an image; similar: share of pairs that share a label; weight: 1/similar",
            style="dim",
        )
    for overlap in found["overlaps"]:
        first, second = overlap["parts"]
        out.print(f"{counted(overlap['images'], 'image')} of {first} in {second} too")


def print_export(made: dict[str, Any], folder: Folder) -> None:
    """Where an export is, how it compares with the model, and what its 8 bits cost."""
    file, int8 = made["file"], made.get("int8")
    parity = made["parity"] if int8 is None else made["parity_before_int8"]
    graph, about = short(folder.uri_of(file["file"])), short(folder.uri_of("export.json"))
    print(f"export  {graph}, {file['bytes'] / 1e6:,.1f} MB; see {about}")
    values = ", ".join(
        f"{name} by {output['max_absolute_error']:.2g} (allowed {output['allowed_error']:.2g})"
        for name, output in parity["outputs"].items()
    )
    if "bits" in parity:
        bits = f"{parity['differing_bits']:,} of {parity['bits']:,} bits differ, "
        values = f"{bits}{values}"
    else:
        values = f"at most, {values} differ"
    before = " before the rounding to 8 bits" if int8 else ""
    print(f"parity  {values}{before}: {parity['source']}")
    if parity["trained_in"] != "float32":
        own = f"note    the model describes images in {parity['trained_in']}, the export in float32"
        if "bits" in parity:
            own += f": {parity['differing_from_trained']:,} of {parity['bits']:,} bits differ"
        elif "cosine_to_trained" in parity:
            own += f": cosines of the two are {parity['cosine_to_trained']:.4f} or more"
        print(own)
    if int8 is None:
        return
    print(f"int8    {int8['layers']} operations, calibrated on {int8['calibrated_on']}")
    print(f"agrees  by {int8['agreement']:.4f} with float32, on {int8['compared_on']}")
    if int8["metric"] is None:
        print("loss    not measured: the images have too few labels")
        return
    print(
        f"loss    {int8['loss']:.4f} of {int8['metric']} (allowed {int8['max_loss']:g}): {int8['model']:.4f} "
        f"by the model, {int8['int8']:.4f} by the file, {int8['int8_queries']:.4f} with the queries by the "
        "file alone"
    )
    print(f"        {int8['policy']}; {int8['measured_on']}")


def _measured(found: dict[str, Any]) -> str:
    """What papers report of a benchmark."""
    if found["protocols"]:
        names = ["MAP", *(f"mP@{k}" for k in found["ks"])]
        return f"{', '.join(names)}: {', '.join(found['protocols'])}"
    return ", ".join([f"MAP@{_count(found['k'], 'all')}", *(f"recall@{k:,}" for k in found["ks"])])


def _count(value: int | None, unknown: str = "–") -> str:
    return unknown if value is None else f"{value:,}"


def _size(run: dict[str, Any]) -> str:
    return f"{run['size']} {run['unit']}"


def _main_metrics(runs: list[dict[str, Any]]) -> list[str]:
    """Few enough for a terminal: of codes the MAP and precision within a radius, of vectors also the MAPs."""
    names = list(dict.fromkeys(metric["name"] for run in runs for metric in run["metrics"]))
    shown = [name for name in names[1:] if name in ("map", "map@r") or name.startswith("precision@radius")]
    return [*names[:1], *shown]


def _with_deviation(mean: float | None, deviation: float | None) -> str:
    return (
        number(mean)
        if deviation is None
        else f"{number(mean)}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(deviation)}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(
            column,
            justify="left" if place == 0 else "right",
            overflow="fold",
            min_width=10 if place == 0 else None,
        )
    return table
