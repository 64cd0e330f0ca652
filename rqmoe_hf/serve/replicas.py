"""Shards that are searched in other processes and on other machines: Ray Serve keeps replicas of each."""

import logging
import os
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException
except ImportError as error:
    raise ImportError('Replicas need Ray Serve: pip install "rqmoe-hf[ray]".') from error

from ..bundled import load_quantizer
from ..data.jobs import check_quantizer
from ..data.ray_engine import connect_ray
from ..index import RQMoEIndex, RQMoEShards
from ..index.intake import Encoder
from ..index.scanning import Scanner
from ..index.shard import Facts, Shard
from ..index.storage import IndexFolder
from ..modeling_rqmoe import RQMoEModel

SECONDS = 30  # in which an answer is tried to be had, from whichever replica
ATTEMPT_SECONDS = 10  # after which a replica that says nothing is given up
PAUSE_SECONDS = 0.1
SEARCHES = 16  # at a time
METHODS = ("facts", "tables", "keys", "ids_of_keys", "find", "get", "codes_of_ids", "count", "candidates")


class ShardReplica(Shard):
    """A shard in a process of its own.

    Args:
        folder: Of the shard, on the machine of this process.
        quantizer: Name of the quantizer; None for the one that the shard names.
    """

    def __init__(self, folder: str, quantizer: str | None):
        super().__init__(RQMoEIndex.load(folder, quantizer))


class RemoteShard:
    """A shard that is asked wherever it has a replica, with the methods of [`Shard`] that only read.

    What a lost replica leaves unanswered is asked of another one: reading twice does no harm.

    Args:
        handle: Of its deployment.
        name: Names it in messages.
    """

    def __init__(self, handle: Any, name: str):
        self._handle, self._name = handle, name

    def __getattr__(self, method: str) -> Any:
        if method not in METHODS:
            raise AttributeError(method)
        return partial(self._ask, method)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """The answer of some replica.

        Raises:
            TimeoutError: If none answers in time.
        """
        end, failure = time.monotonic() + SECONDS, Exception()
        while (left := end - time.monotonic()) > 0:
            answer = getattr(self._handle, method).remote(*arguments)
            try:
                return answer.result(timeout_s=min(left, ATTEMPT_SECONDS))
            except RayTaskError as error:  # it was answered: the request was wrong
                raise error.cause from None
            except TimeoutError as error:
                failure = error
                answer.cancel()
            except (RayError, RayServeException) as error:
                failure = error
                time.sleep(PAUSE_SECONDS)
        raise TimeoutError(f"No replica of {self._name} answered within {SECONDS} seconds.") from failure


class ReplicatedShards(RQMoEShards):
    """Shards with replicas in processes of their own, searched as one index; see [`RQMoEShards`].

    Joins the Ray cluster that the environment variable `RAY_ADDRESS` names, over whose machines Ray Serve spreads the
    replicas; every machine must have the folders. Without one it starts Ray for this process. A replica that is lost
    is started again, and what it left unanswered is asked of another one.

    Args:
        folders: Of the shards, in their order, aligned by `rqmoe index align`.
        quantizer: Name of the quantizer; None for the one that the shards name.
        encoder: See `RQMoEIndex.load`.
        replicas: Of each shard.

    Raises:
        ValueError: As `RQMoEShards`; or because the shards are not aligned, or replicas do not start.
    """

    _threads = SEARCHES

    def __init__(
        self,
        folders: Sequence[str | os.PathLike],
        quantizer: str | None = None,
        encoder: Encoder | None = None,
        replicas: int = 2,
    ):
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}.")
        paths = self._checked_folders(folders)
        self._indexes = []
        self._applications: list[str] = []
        self._started = _start_ray()
        try:
            shards = [self._deployed(str(path), quantizer, replicas) for path in paths]
            self._join(shards, _quantizer_of(shards[0].facts(), quantizer), encoder, check=True)
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _deployed(self, folder: str, quantizer: str | None, replicas: int) -> RemoteShard:
        """A shard whose replicas are there."""
        if Path(folder).exists() or len(ray.nodes()) == 1:  # otherwise only the other machines can tell
            IndexFolder(folder).read()
        name = f"rqmoe-{uuid.uuid4().hex[:12]}"
        deployment: Any = serve.deployment(ShardReplica, name="shard")
        deployment = deployment.options(
            num_replicas=replicas,
            max_ongoing_requests=SEARCHES,
            health_check_period_s=2,
            graceful_shutdown_timeout_s=2,
            ray_actor_options={"num_cpus": 0},  # a replica waits most of the time, and must not wait for a processor
        )
        self._applications.append(name)
        try:
            handle = serve.run(deployment.bind(folder, quantizer), name=name, route_prefix=None)
        except RuntimeError as error:
            said = serve.status().applications[name].deployments["shard"].message.strip().splitlines()
            raise ValueError(f"Replicas of {folder} do not start: {said[-1] if said else error}") from error
        return RemoteShard(handle, folder)

    def _fitted(self, lists: int) -> Scanner:
        raise ValueError(
            "The shards are scored by different tables, or have outgrown them: run `rqmoe index align` with the same "
            "folders first."
        )

    def save(self) -> NoReturn:
        """Refused: replicas only read."""
        raise ValueError("Replicas only read: save with RQMoEShards, or `rqmoe index align`.")

    def merge(self, folder: str | os.PathLike) -> NoReturn:
        """Refused: replicas only read."""
        raise ValueError("Replicas only read: merge with RQMoEShards, or `rqmoe index merge`.")

    def close(self) -> None:
        """Ends the replicas, and Ray if it was started for them."""
        if hasattr(self, "_pool"):
            self._pool.shutdown()
        for name in self._applications:
            serve.delete(name)
        if self._started:
            serve.shutdown()
            ray.shutdown()


def _start_ray() -> bool:
    """Joins or starts Ray and its Serve, without its HTTP proxy; whether it was started for this process alone."""
    started = connect_ray(logging_level=logging.WARNING) and not os.environ.get("RAY_ADDRESS")
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return started


def _quantizer_of(facts: Facts, name: str | None) -> RQMoEModel:
    """The quantizer of a shard, here."""
    made_by = facts.settings["quantizer"]
    quantizer = load_quantizer(name) if name else load_quantizer(made_by["model"], revision=made_by["revision"])
    check_quantizer(made_by, quantizer, facts.name)
    return quantizer
