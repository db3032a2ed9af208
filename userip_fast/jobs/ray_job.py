"""Bulk inference as a Ray Data job: shards of `userip_fast.jobs.shards`, spread over a Ray cluster.

    import ray
    from userip_fast.jobs.ray_job import infer_on_ray

    ray.init()  # or ray.init("auto") on a cluster
    infer_on_ray("RUN/model", "log/", "items.parquet", out="SHARDS", work="WORK", shards=64,
                 workers=8, gpus=1, rating="rating")
    # userip bank merge SHARDS BANK

Paths are on storage that all workers share. Needs the extra `ray`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from userip_fast.core.errors import ConfigError, UnavailableError


class ShardWorker:
    """A Ray actor: loads model and sorted log once, then infers shards."""

    def __init__(
        self,
        model: str,
        interactions: str,
        items: str | None,
        work: str,
        reading: dict[str, Any],
        out: str,
        shards: int,
        profiles: bool,
    ) -> None:
        from userip_fast.data import stream_interactions
        from userip_fast.model.fitted import Model

        self.model = Model.load(model)
        d = self.model.config.data
        names = ("user", "item", "rating", "time", "text", "filter", "on_bad", "min_history")
        settings = {**{n: getattr(d, n) for n in names}, "seed": self.model.config.em.seed}
        self.data = stream_interactions(interactions, items, work=work, **{**settings, **reading})
        self.out, self.shards, self.profiles = out, shards, profiles

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from userip_fast.jobs.shards import infer_shard

        index = int(row["shard"])
        path = infer_shard(
            self.model, self.data, index, self.shards, self.out, profiles=self.profiles
        )
        return {"shard": index, "file": str(path)}


def infer_on_ray(
    model: str | Path,
    interactions: str | Path,
    items: str | Path | None = None,
    *,
    out: str | Path,
    work: str | Path,
    shards: int,
    workers: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    profiles: bool = False,
    **reading: Any,
) -> list[Path]:
    """Infers all shards; those that are there already cost nothing.

    Args:
        model: Model folder that `fit` wrote.
        interactions, items, work: As for `stream_interactions`.
        out: Folder for the shards.
        shards: How many; some times the number of workers, so that none waits long at the end.
        workers: Actors, each with a model of its own.
        cpus, gpus: Of each actor.
        profiles: Whether to keep the probabilities of all codes; see `Model.infer`.
        reading: Other arguments of `stream_interactions`, where they are not the model's.

    Returns:
        The files, in order.

    Raises:
        UnavailableError: Ray is not installed.
        ConfigError: `shards` or `workers` is not positive.
    """
    try:
        import ray.data
    except ImportError as e:
        raise UnavailableError(f"a Ray job needs Ray: pip install 'ray[data]' ({e})") from e
    if shards < 1 or workers < 1:
        raise ConfigError(f"shards and workers must be positive, are {shards} and {workers}")
    paths = [str(model), str(interactions), None if items is None else str(items), str(work)]
    done = (
        ray.data.from_items([{"shard": i} for i in range(shards)], override_num_blocks=shards)
        .map(
            ShardWorker,
            fn_constructor_args=(*paths, reading, str(out), shards, profiles),
            concurrency=workers,
            num_cpus=cpus,
            num_gpus=gpus,
        )
        .take_all()
    )
    return [Path(row["file"]) for row in sorted(done, key=lambda row: int(row["shard"]))]
