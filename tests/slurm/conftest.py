"""One cluster for all tests of this folder, and what happens on it: scenes, played at the same time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from emulated import Cluster

EXPLORA = Path(sys.executable).with_name("explora")
GROUPS = {"calm": 2, "preempted": 2, "dying": 3, "failing": 3, "cut": 3, "headless": 3}
"""Hosts of each group; a scene that takes a host away leaves enough of its group to go on."""
AT_ONCE = 4
"""Scenes at the same time; with more the machine is busy with imports alone."""
STEPS, SAVE_EVERY, DISTURBED = 80, 10, 25
"""Of the run that all scenes repeat, and the step from which on it is disturbed."""
PRETRAIN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "adapt": {"name": "explora", "rank": 4},
    "views": {"local_crops": 2, "local_size": 16},
    "objective": {"head": {"prototypes": 64, "hidden": 32, "bottleneck": 16}},
    "loop": {"log_every": 1, "save_every": SAVE_EVERY, "precision": "fp32", "device": "cpu"},
}
FINETUNE: dict[str, Any] = {
    "steps": 10,
    "batch_size": 8,
    "adapt": {"name": "lora", "rank": 2},
    "loop": {"log_every": 1, "precision": "fp32", "device": "cpu"},
}
PROBE: dict[str, Any] = {"evaluators": [{"name": "knn", "k": [3]}], "pictures": 2}
MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "image_size": 32,
}


class Launched:
    """One `explora launch`: its folder and its jobs."""

    def __init__(self, cluster: Cluster, out: Path, said: str) -> None:
        self.cluster, self.out, self.said = cluster, out, said

    def job(self, stage: str = "pretrain") -> str:
        """The id of a stage's job."""
        return json.loads((self.out / "jobs" / f"{stage}.json").read_text())["id"]

    def rows(self) -> list[dict[str, Any]]:
        """What was logged of every step, without the time it took."""
        path = self.out / "metrics.jsonl"
        rows = (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    def hold(self) -> list[int]:
        """Let the job begin, and stop its ranks in the middle of their run; returns them."""
        self.cluster.run("scontrol", "release", self.job())
        self._wait(lambda: any(row["step"] >= DISTURBED for row in self.rows()), "pretrain", "a step to disturb")
        return self.cluster.hold(self.job())

    def ended(self, stage: str = "pretrain", state: str = "COMPLETED") -> Launched:
        """Wait for a job's end, which must be this one."""
        number = self.job(stage)
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._wait(lambda: self.cluster.job(number)["JobState"] in over, stage, "the job's end")
        found = self.cluster.job(number)["JobState"]
        assert found == state, f"{found}: {self.log(stage)}"
        return self

    def restarts(self) -> int:
        """How often the job went back to the queue."""
        return int(self.cluster.job(self.job())["Restarts"])

    def log(self, stage: str = "pretrain") -> str:
        """What the job's first rank printed, all sessions one after another."""
        path = Path(json.loads((self.out / "jobs" / f"{stage}.json").read_text())["log"])
        return f"{path}:\n{path.read_text() if path.exists() else 'nothing'}"

    def _wait(self, true: Callable[[], bool], stage: str, what: str) -> None:
        try:
            self.cluster.wait(true, 240, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; {self.log(stage)}") from None

    def adapter(self) -> bytes:
        """What was learnt."""
        return (self.out / "adapter.safetensors").read_bytes()


class Site:
    """The login node: launches configs, knows where the data is."""

    def __init__(self, cluster: Cluster, shards: dict[str, Path], images: dict[str, Path], folder: Path) -> None:
        self.cluster, self.shards, self.images, self.folder = cluster, shards, images, folder
        profiles = {
            group: {
                "kind": "slurm",
                "partition": "debug",
                "nodes": 2,
                "minutes": 10,
                "signal_seconds": 10,
                "constraint": group,
                "environment": {"OMP_NUM_THREADS": "1"},
            }
            for group in GROUPS
        }
        for group in GROUPS:  # a run that something happens to begins when its scene is there to see it
            profiles[f"{group}_held"] = {**profiles[group], "sbatch": {"hold": True}}
        profiles["limited"] = {**profiles["calm_held"], "minutes": 2}
        profiles["alone"] = {**profiles["calm"], "nodes": 1}
        profiles["four"] = {**profiles["calm"], "tasks_per_node": 2}
        self.clusters = folder / "clusters.yaml"
        self.clusters.write_text(yaml.safe_dump(profiles))

    def pretraining(self, name: str, **changes: Any) -> dict[str, Any]:
        """The config that all scenes run."""
        out = str(self.folder / name)
        return {"out": out, "shards": str(self.shards["train"]), "model": MODEL, **PRETRAIN, **changes}

    def launch(self, config: dict[str, Any], profile: str, *words: str) -> Launched:
        """`explora launch` of a config to a profile."""
        out = Path(config["out"])
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        said = self.cluster.run(EXPLORA, "launch", path, "--cluster", profile, "--clusters", self.clusters, *words)
        return Launched(self.cluster, out, said.stdout)


Scene = Callable[[Site], Any]
SCENES: dict[str, Scene] = {}


def scene(played: Scene) -> Any:
    """Make a scene: a session's fixture of that name is what it returns."""
    name = played.__name__
    SCENES[name] = played

    @pytest.fixture(scope="session", name=name)
    def result(scenes: dict[str, Future[Any]]) -> Any:
        return scenes[name].result()

    return result


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM."""
    with Cluster.start(**GROUPS) as running:
        yield running


@pytest.fixture(scope="session")
def scenes(
    request: pytest.FixtureRequest,
    cluster: Cluster,
    shards: dict[str, Path],
    images: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Any]]]:
    """Begin every scene that the tests of this session ask for, the longest first."""
    site = Site(cluster, shards, images, tmp_path_factory.mktemp("runs"))
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    pool = ThreadPoolExecutor(AT_ONCE)
    yield {name: pool.submit(played, site) for name, played in SCENES.items() if name in wanted}
    pool.shutdown(wait=False, cancel_futures=True)


@scene
def stopped_by_limit(site: Site) -> Launched:
    """The run that comes to the end of its time; SLURM may signal 60 s before the 10 that are asked for."""
    run = site.launch(site.pretraining("stopped_by_limit"), "limited")
    run.hold()
    return run.ended()


@scene
def undisturbed(site: Site) -> Launched:
    """The run on two hosts that nothing happens to."""
    return site.launch(site.pretraining("undisturbed"), "calm").ended()


@scene
def batch_host_dead(site: Site) -> Launched:
    """The run that loses the host of its batch script."""
    return _bereaved(site, "dying", 0)


@scene
def other_host_dead(site: Site) -> Launched:
    """The run that loses its other host, which the survivor notices before SLURM does."""
    return _bereaved(site, "failing", 1)


def _bereaved(site: Site, group: str, number: int) -> Launched:
    run = site.launch(site.pretraining(group), f"{group}_held")
    ranks = run.hold()
    site.cluster.kill(site.cluster.hosts(run.job())[number])
    site.cluster.wake(ranks)
    return run.ended()


@scene
def other_host_cut_off(site: Site) -> Launched:
    """The run that loses the network of its other host, whose processes live on and know nothing."""
    with _cut(site, "cut", 1) as run:
        return run.ended()


@scene
def batch_host_cut_off(site: Site) -> tuple[Launched, str]:
    """The same with the host of the first rank, which holds the run folder's lock; launched again when it is back."""
    with _cut(site, "headless", 0) as run:
        said = run.ended(state="FAILED").log()
    job = run.job()
    site.cluster.wait(lambda: not site.cluster.tasks(job), 90, "SLURM ends what is left on the host that is back")
    return site.launch(site.pretraining("headless"), "headless").ended(), said


@contextmanager
def _cut(site: Site, group: str, number: int) -> Iterator[Launched]:
    if not site.cluster.network:
        pytest.skip("no network namespaces here, so a host cannot be cut off")
    run = site.launch(site.pretraining(group), f"{group}_held")
    ranks = run.hold()
    host = site.cluster.hosts(run.job())[number]
    site.cluster.link(host, "down")
    site.cluster.wake(ranks)
    try:
        yield run
    finally:
        site.cluster.link(host, "up")


@scene
def preempted(site: Site) -> Launched:
    """The run whose hosts an urgent job takes."""
    run = site.launch(site.pretraining("preempted"), "preempted_held")
    run.hold()
    words = "sbatch --partition=urgent --constraint=preempted --nodes=2 --exclusive --time=1 --output=/dev/null"
    site.cluster.run(*words.split(), "--wrap=sleep 2")
    return run.ended()


@scene
def signalled(site: Site) -> Launched:
    """The run that a person sends back to the queue."""
    run = site.launch(site.pretraining("signalled"), "calm_held")
    ranks = run.hold()
    site.cluster.run("scancel", "--signal=USR2", run.job())
    site.cluster.wake(ranks)
    return run.ended()


@scene
def chained(site: Site) -> Launched:
    """All stages from raw images to the report."""
    data = {role: str(site.images[role]) for role in ("train", "test")}
    pretrain = {**PRETRAIN, "steps": 10}
    out = str(site.folder / "chained")
    config = {"out": out, "model": MODEL, "data": data, "pretrain": pretrain, "finetune": FINETUNE, "probe": PROBE}
    return site.launch(config, "calm").ended("report")


@scene
def swept(site: Site) -> list[Launched]:
    """Two seeds, as one array."""
    both = site.launch(site.pretraining("swept", steps=10), "alone", "--sweep", "seed=1,2")
    points = [Launched(site.cluster, both.out / f"seed={seed}", both.said) for seed in (1, 2)]
    return [point.ended() for point in points]


@scene
def cancelled(site: Site) -> tuple[Launched, str, str]:
    """A long run: the table while it runs, a second launch of it, and its end by `explora cancel`."""
    config = site.pretraining("cancelled", steps=100_000)
    run = site.launch(config, "calm_held")
    site.cluster.wake(run.hold())
    table = site.cluster.run(EXPLORA, "jobs", run.out).stdout
    words = ("launch", run.out.with_suffix(".yaml"), "--cluster", "calm", "--clusters", site.clusters)
    again = site.cluster.run(EXPLORA, *words, check=False)
    assert again.returncode, "a run was launched twice"
    site.cluster.run(EXPLORA, "cancel", run.out)
    return run.ended(state="CANCELLED"), table, again.stderr


@scene
def four_ranks(site: Site) -> Launched:
    """Two tasks on each of two hosts."""
    return site.launch(site.pretraining("four_ranks"), "four").ended()


@scene
def alone(site: Site) -> Launched:
    """The same in one process, without a launcher."""
    config = site.pretraining("alone")
    path = Path(config["out"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    site.cluster.run(EXPLORA, "pretrain", path)
    return Launched(site.cluster, Path(config["out"]), "")
