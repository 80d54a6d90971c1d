"""A server under load that loses processes and changes its index: no wrong answer, and how many are lost.

    python benchmarks/serving_faults.py --minutes 10        rounds of a minute, each with a fresh index
    python benchmarks/serving_faults.py --minutes 1

Clients search one after another through HTTP, while an encoder is killed (SIGKILL), then a process of one of
two groups of shards, and three versions are published: an image is added by the endpoint, one removed as by
the command line, and the index compacted. Then come other models: one with its index in the same folders, as
of a run that is made anew, and one of other folders, by deploying the server once more. Each answer is
compared with what its version finds in this process, all shards searched at once. `lost` are searches that
began within a second of the event or after it, and got no answer or another status than 200; `recovered` is
when the last such search, or one that took more than 5 s, ended. What encodes is a stand-in without a
network: it is the server that is looked at.

The rounds are those of tests/serve/fault_parts.py, which the tests run once.
"""

import dataclasses
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import ray
import ray.cloudpickle
from book import arguments, claim, measuring

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serve"))

import serving_parts
from fault_parts import Outcome, faults
from ray import serve
from serving_parts import NotedHash, Served, make_index

from ray_retrieval.serve.app import run
from ray_retrieval.serve.application import build
from ray_retrieval.serve.config import ServeConfig, ServedIndex
from ray_retrieval.serve.front import NAME

_ROUND_S = 30.0  # and what the new models take
RECOVERED_S = 30  # at most, after an event


def main() -> None:
    parser = arguments(__doc__, "one round")
    parser.add_argument("--minutes", type=float, help="10 unless told")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    minutes = options.minutes or (0 if options.short else 10)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.cloudpickle.register_pickle_by_value(serving_parts)  # type: ignore[no-untyped-call]
    ray.init(
        num_cpus=4, num_gpus=0, object_store_memory=256 << 20, log_to_driver=False, logging_level="ERROR"
    )
    outcomes: list[Outcome] = []
    with measuring(f"clients: {options.clients}"):
        begun = time.monotonic()
        while not outcomes or time.monotonic() - begun < 60 * minutes:
            outcomes.append(_round(options.clients))
            print(f"{(time.monotonic() - begun) / 60:.1f} min: {_in_words(outcomes)}", flush=True)
        _print(outcomes)
    _claim(outcomes)
    if any(outcome.wrong for outcome in outcomes):
        sys.exit("wrong answers")


def _round(clients: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "more").mkdir()
        made = make_index(Path(folder), encoder=NotedHash)
        config = ServeConfig(
            port=_free_port(),
            shard_groups=2,
            encoder_replicas=2,
            encoder_cpus=0.25,
            writable=True,
            poll_s=0.5,
        )

        def deploy(other: Served) -> None:
            # Its shards are divided otherwise, too: three groups instead of two.
            divided = config.model_copy(update={"shard_groups": 3})
            application = build(_given(other), divided, encoder=NotedHash)
            serve.run_many([serve.RunTarget(application, name=NAME, route_prefix="/")])

        with run(_given(made), config, encoder=NotedHash) as url:
            return faults(
                dataclasses.replace(made, url=url),
                Path(folder) / "more",
                seconds=_ROUND_S,
                clients=clients,
                deploy=deploy,
                say=lambda _: None,
            )


def _given(served: Served) -> dict[str, ServedIndex]:
    return {"x": ServedIndex(index=served.index, model=served.model)}


def _claim(outcomes: list[Outcome]) -> None:
    searches = sum(sum(outcome.statuses.values()) for outcome in outcomes)
    wrong = sum(len(outcome.wrong) for outcome in outcomes)
    longest = max(event.recovered_s for outcome in outcomes for event in outcome.events)
    lost = sum(event.lost for outcome in outcomes for event in outcome.events)
    said = f"{searches:,} searches, {wrong} wrong, {lost} lost"
    claim(
        f"a server that loses processes and changes its index: longest time to recover over {RECOVERED_S} s",
        peer=f"{RECOVERED_S} s",
        ratio=longest / RECOVERED_S,
        goal="<= 1",
        detail=f"{longest:.1f} s; {said}",
        headline=True,
    )


def _print(outcomes: list[Outcome]) -> None:
    print("\n| event | times | searches lost, in all | recovered after: median, longest |\n|---|---|---|---|")
    for number, event in enumerate(outcomes[0].events):
        all_of_it = [outcome.events[number] for outcome in outcomes]
        seconds = [one.recovered_s for one in all_of_it]
        print(
            f"| {event.name} | {len(all_of_it)} | {sum(one.lost for one in all_of_it)} "
            f"| {np.median(seconds):.1f} s, {max(seconds):.1f} s |"
        )
    print(f"\n{_in_words(outcomes)}")


def _in_words(outcomes: list[Outcome]) -> str:
    statuses: Counter[int] = sum((outcome.statuses for outcome in outcomes), Counter())
    wrong = sum(len(outcome.wrong) for outcome in outcomes)
    slow = max(one.seconds for outcome in outcomes for one in outcome.asked)
    others = {status: count for status, count in statuses.items() if status != 200}
    return (
        f"{statuses.total():,} searches, {wrong} wrong answers, {statuses[200]:,} with status 200, "
        f"others {others or 'none'}, the slowest {slow:.1f} s"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{(time.monotonic() - started) / 60:.1f} min with starting and stopping")
