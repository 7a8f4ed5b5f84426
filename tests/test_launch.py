"""`explora launch` to SLURM: profiles, sbatch files, chains, sweeps, and what it refuses before a job is queued."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MODEL
from slurm_fakes import Fakes, slurm

import launch
from explora.errors import ConfigError, DataError, RunError
from launch import profiles

__all__ = ["slurm"]
Make = Callable[..., dict[str, Any]]
SITE = {
    "kind": "slurm",
    "partition": "gpu",
    "account": "mine",
    "qos": "high",
    "constraint": "a100",
    "nodes": 2,
    "gpus_per_node": 2,
    "cpus_per_task": 6,
    "mem_gb": 0.5,
    "minutes": 90,
    "signal_seconds": 300,
    "modules": ["cuda/13"],
    "environment": {"NAME": 'a "$USER" `x`'},
    "scratch": "/scratch/$SLURM_JOB_ID",
    "sbatch": {"exclusive": True, "reservation": "week 1"},
    "stages": {"pack": {"partition": "cpu", "minutes": 20}, "probe": {"cpus_per_task": 3}},
}
STAGES = ["pack", "pretrain", "finetune", "probe", "report"]


@pytest.fixture
def site(slurm: Fakes, tmp_path: Path) -> Fakes:
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"site": SITE}))
    return slurm


def flags(script: str) -> dict[str, str]:
    """The #SBATCH lines of a script."""
    lines = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    return {name: "".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)}


def by_stage(text: str) -> dict[str, str]:
    """The scripts of a dry run."""
    parts = re.split(r"^# ---- (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_dry_run_field_by_field(site: Fakes, tmp_path: Path, chaining: Make) -> None:
    scripts = by_stage(launch.submit(chaining("runs/x"), cluster="site", dry_run=True))
    assert list(scripts) == STAGES
    assert flags(scripts["pretrain"]) == {
        "partition": "gpu",
        "account": "mine",
        "qos": "high",
        "constraint": "a100",
        "nodes": "2",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "cpus-per-task": "6",
        "mem": "512M",
        "time": "90",
        "signal": "USR2@300",
        "requeue": "",
        "open-mode": "append",
        "exclusive": "",
        "reservation": "week 1",
        "job-name": "x-pretrain",
        "dependency": "afterok:ID_OF_PACK",
        "kill-on-invalid-dep": "yes",
        "output": f"{tmp_path}/runs/x/jobs/pretrain/%j_0_log.out",
    }
    assert "dependency" not in flags(scripts["pack"])
    one_task = {"nodes": "1", "ntasks-per-node": "1"}
    for stage, special in {
        "pack": {"partition": "cpu", "time": "20", "cpus-per-task": "6"},
        "probe": {"gpus-per-node": "1", "cpus-per-task": "3", "dependency": "afterok:ID_OF_FINETUNE"},
        "report": {"partition": "gpu", "time": "90"},
    }.items():
        assert {**one_task, **special}.items() <= flags(scripts[stage]).items()
        assert ("gpus-per-node" in flags(scripts[stage])) == (stage == "probe")
    step = scripts["pretrain"].split("# command")[1]
    assert "--kill-on-bad-exit=1 --open-mode=append --export=ALL --cpus-per-task=6" in step
    assert scripts["pretrain"].count("srun ") == scripts["pretrain"].count("--export=ALL") == 3
    assert f"{tmp_path}/runs/x/jobs/pretrain/%j_%t_log.out" in step
    for script in scripts.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    setup = scripts["pretrain"].split("# setup")[1].split("# command")[0].replace("module", ":")
    said = subprocess.run(
        ["bash", "-c", setup.replace("srun", ": srun") + 'echo "$NAME $TMPDIR"'],
        env={"USER": "me", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == 'a "me" `x` /scratch/7\n'
    assert 'rm -rf "/scratch/$SLURM_JOB_ID"' in scripts["pretrain"].split("# teardown")[1]
    assert not (tmp_path / "runs").exists()
    assert site.calls("sbatch") == []


@pytest.mark.usefixtures("site")
def test_nodes_and_gpus_of_the_command_line(chaining: Make) -> None:
    text = launch.submit(chaining("runs/x"), cluster="site", nodes=4, gpus=1, dry_run=True)
    assert {"nodes": "4", "gpus-per-node": "1", "ntasks-per-node": "1"}.items() <= flags(
        by_stage(text)["finetune"]
    ).items()


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
@pytest.mark.usefixtures("slurm")
def test_containers(tmp_path: Path, chaining: Make, kind: str) -> None:
    container = {"kind": kind, "image": "/images/a b.sif", "mounts": ["/data", "/a:/b"]}
    given = {"kind": "slurm", "gpus_per_node": 2, "scratch": "/s", "container": container}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"boxed": given}))
    config = {**chaining("runs/x"), "model": {**MODEL, "weights": "/only/inside.pth"}}
    scripts = by_stage(launch.submit(config, {"probe.pictures": 0}, cluster="boxed", dry_run=True))
    words = shlex.split(scripts["pretrain"].split("# command")[1].split("# teardown")[0])
    run = tmp_path / "runs/x"
    if kind == "apptainer":
        mounts = [word for path in (tmp_path, run, "/data", "/a:/b") for word in ("--bind", str(path))]
        box = ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), *mounts, "--bind", "$TMPDIR", "/images/a b.sif"]
        assert " ".join([*box, "python"]) in " ".join(words)
        assert "--nv" not in scripts["report"]
    else:
        assert "--container-image=/images/a b.sif" in words
        assert f"--container-mounts={tmp_path}:{tmp_path},{run}:{run},/data:/data,/a:/b,$TMPDIR:$TMPDIR" in words
        assert ',"$TMPDIR:$TMPDIR" sh' in scripts["pretrain"]  # for the shell to read
        assert f"--container-workdir={tmp_path}" in words
    launch.submit(config, cluster="boxed")  # what only the container sees does not count as missing


def test_a_container_requeues_through_the_batch_script(slurm: Fakes, tmp_path: Path, pretraining: Make) -> None:
    boxed = {"kind": "slurm", "container": {"kind": "pyxis", "image": "x"}}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"boxed": boxed}))
    launch.submit(pretraining("runs/x"), cluster="boxed")
    asked = tmp_path / "runs/x/jobs/pretrain/1001_requeue"
    for step, code, requeues in (f"touch {asked}; exit 140", 140, 1), ("exit 2", 2, 1), ("exit 0", 0, 1):
        (slurm.home / "srun").write_text(f"#!/bin/bash\n{step}\n")
        done = subprocess.run(
            ["bash", slurm.home / "1001.sh"], env={"PATH": f"{slurm.home}:/bin", "SLURM_JOB_ID": "1001"}
        )
        assert (done.returncode, len(slurm.calls("scontrol"))) == (code, requeues)
    assert slurm.calls("scontrol") == ["requeue 1001"]


@pytest.mark.parametrize(("scratch", "gone"), [("a $SLURM_JOB_ID", True), ("mine", False), ("$SLURM_JOB_ID_x", False)])
def test_scratch_of_a_job_goes_with_it(
    slurm: Fakes, tmp_path: Path, pretraining: Make, scratch: str, gone: bool
) -> None:
    given = {"kind": "slurm", "scratch": f"{tmp_path}/scratch/{scratch}"}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"site": given}))
    launch.submit(pretraining("runs/x"), cluster="site")
    (slurm.home / "srun").write_text(
        '#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done\n'
        '[ "$1" != sh ] && exec "$@"\ntouch "$TMPDIR/file"; exit 3\n'
    )
    environment = {"PATH": f"{slurm.home}:/bin", "SLURM_JOB_ID": "1001", "SLURM_JOB_NUM_NODES": "1"}
    assert subprocess.run(["bash", slurm.home / "1001.sh"], env=environment).returncode == 3
    assert ([path.name for path in (tmp_path / "scratch").rglob("*")] == []) == gone


def test_what_is_submitted_is_what_a_dry_run_shows(site: Fakes, tmp_path: Path, chaining: Make) -> None:
    config = chaining("runs/x", finetune=None)
    shown = by_stage(launch.submit(config, cluster="site", dry_run=True))
    said = launch.submit(config, cluster="site")
    before = None
    for number, (stage, script) in enumerate(shown.items(), start=1001):
        expected = script if before is None else script.replace(f"ID_OF_{before.upper()}", str(number - 1))
        assert site.script(number).strip() == expected.strip()
        record = json.loads((tmp_path / f"runs/x/jobs/{stage}.json").read_text())
        assert (record["id"], record["kind"], record["cluster"]) == (str(number), "slurm", "site")
        assert record["log"] == f"{tmp_path}/runs/x/jobs/{stage}/{number}_0_log.out"
        assert f"{number}" in said
        before = stage
    assert list(shown) == ["pack", "pretrain", "probe", "report"]


def test_a_sweep_is_an_array_a_stage(site: Fakes, tmp_path: Path, chaining: Make) -> None:
    sweep = ["pretrain.optim.lr=1e-4,3e-4", "pretrain.optim.betas=[0.9, 0.95],[0.9, 0.99]"]
    shown = by_stage(launch.submit(chaining("runs/x"), cluster="site", sweep=sweep, dry_run=True))
    launch.submit(chaining("runs/x"), cluster="site", sweep=sweep)
    assert len(site.calls("sbatch")) == len(STAGES)
    for number, (stage, script) in enumerate(shown.items(), start=1001):
        found = flags(site.script(number))
        assert found["array"] == "0-3%4"
        assert found.get("dependency") == (None if stage == "pack" else f"aftercorr:{number - 1}")
        assert found.keys() == flags(script).keys()
        assert found["mem"] == "512M"
    names = sorted(path.name for path in (tmp_path / "runs/x").iterdir() if path.name != "jobs")
    assert names == [
        f"pretrain.optim.lr={lr},pretrain.optim.betas=_0.9,_{beta}_" for lr in ("1e-4", "3e-4") for beta in (0.95, 0.99)
    ]
    ids = [json.loads((tmp_path / f"runs/x/{name}/jobs/probe.json").read_text())["id"] for name in names]
    assert ids == [f"1004_{number}" for number in range(4)]


def test_only_what_has_not_finished_is_submitted(site: Fakes, tmp_path: Path, chaining: Make) -> None:
    for folder in *(f"shards/{role}" for role in chaining("x")["data"]), "pretrain":
        (tmp_path / "runs/x" / folder).mkdir(parents=True)
        (tmp_path / "runs/x" / folder / "manifest.json").touch()
        (tmp_path / "runs/x" / folder / "summary.json").touch()
    launch.submit(chaining("runs/x"), cluster="site")
    assert [flags(site.script(number))["job-name"] for number in (1001, 1002, 1003)] == [
        *("x-finetune", "x-probe", "x-report")
    ]
    assert "dependency" not in flags(site.script(1001))
    for name in "finetune/summary.json", "probe/summary.json", "report.html":
        (tmp_path / "runs/x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "runs/x" / name).touch()
    site.queue(_1001="COMPLETED|0|x1|None", _1002="COMPLETED|0|x1|None", _1003="COMPLETED|0|x1|None")
    assert "nothing to submit" in launch.submit(chaining("runs/x"), cluster="site")


@pytest.mark.usefixtures("site")
def test_a_stage_alone_is_one_job(pretraining: Make, probing: Make) -> None:
    assert list(by_stage(launch.submit(pretraining("runs/a"), cluster="site", dry_run=True))) == ["pretrain"]
    assert list(by_stage(launch.submit(probing("runs/b"), cluster="site", dry_run=True))) == ["probe"]


def test_a_run_is_launched_once_at_a_time(site: Fakes, pretraining: Make) -> None:
    launch.submit(pretraining("runs/x"), cluster="site")
    for state in "PENDING|0||Priority", "RUNNING|0|x1|None", "COMPLETING|0|x1|None", "REQUEUED|1||None":
        site.queue(_1001=state)
        with pytest.raises(RunError, match=r"queued or running: 1001 \(pretrain\); wait for them, or `explora cancel"):
            launch.submit(pretraining("runs/x"), cluster="site")
    (site.home / "down").touch()
    with pytest.raises(RunError, match="Unable to contact slurm controller"):
        launch.submit(pretraining("runs/x"), cluster="site")
    (site.home / "down").unlink()
    site.queue(_1001="FAILED|0|x1|NonZeroExitCode")
    launch.submit(pretraining("runs/x"), cluster="site")
    assert len(site.calls("sbatch")) == 2


def left_of(run: Path) -> list[str]:
    """Files of a run's jobs that submitting has written."""
    return sorted(str(path.relative_to(run / "jobs")) for path in (run / "jobs").rglob("*.*") if not path.is_dir())


def test_half_a_chain_is_none(site: Fakes, tmp_path: Path, chaining: Make, capfd: pytest.CaptureFixture[str]) -> None:
    (site.home / "refuse").write_text("1003")
    with pytest.raises(RunError, match="SLURM refuses the job of stage 'finetune': sbatch: error: invalid partition"):
        launch.submit(chaining("runs/x"), cluster="site")
    assert site.calls("scancel") == ["1001 1002"]
    assert left_of(tmp_path / "runs/x") == [".launching"]
    assert capfd.readouterr() == ("", "")  # the error says it all


def test_what_cannot_be_cancelled_is_named(site: Fakes, tmp_path: Path, chaining: Make) -> None:
    (site.home / "refuse").write_text("1002")
    (site.home / "scancel").write_text("#!/bin/bash\necho down >&2; exit 1\n")
    with pytest.raises(RunError, match=r"(?s)'pretrain'.*invalid partition\nJobs 1001 of this .* \(scancel: down\)"):
        launch.submit(chaining("runs/x"), cluster="site")
    left = left_of(tmp_path / "runs/x")
    assert {"pack.json", "pack/1001_submitted.pkl", "pack/1001_submission.sh"} <= set(left)
    assert [name for name in left if name.startswith("pretrain")] == []


def test_mistakes_cost_no_wait_in_the_queue(
    site: Fakes, chaining: Make, pretraining: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[Exception], match: str, config: dict[str, Any], **given: Any) -> None:
        with pytest.raises(kind, match=match):
            launch.submit(config, **{"cluster": "site", **given})

    good = chaining("runs/x")
    refused(ConfigError, r"no cluster is called 'sit'; did you mean 'site'\?.*Known: local, site", good, cluster="sit")
    refused(ConfigError, "pretrain.batch_sze: no such key", chaining("runs/x", pretrain={"batch_sze": 1}))
    refused(ConfigError, "pretrain.optim.rl: no such key", good, sweep=["pretrain.optim.rl=1,2"])
    refused(ConfigError, "expected key=a,b,c", good, sweep=["seed"])
    refused(ConfigError, "expected key=a,b,c", good, sweep=["seed=1,,2"])
    refused(ConfigError, "--sweep out", good, sweep=["out=a,b"])
    refused(ConfigError, "same folder", good, sweep=["seed=1,1"])
    refused(
        ConfigError, r"pretrain.batch_size: 8 cannot be cut .* each of 6 ranks; choose a multiple of 6", good, nodes=3
    )
    refused(ConfigError, "local_size 15 is not a multiple", pretraining("runs/x", views={"local_size": 15}))
    refused(DataError, "shards: /nowhere does not exist", pretraining("runs/x", shards="/nowhere"))
    refused(ConfigError, "--nodes: cluster 'local' is this machine alone", good, cluster="local", nodes=2)
    monkeypatch.setenv("PATH", "/nowhere")
    refused(RunError, "sbatch is not on the PATH.*--dry-run", good)
    assert site.calls("sbatch") == []
    launch.submit(pretraining("runs/x", shards="/nowhere"), cluster="site", dry_run=True)  # a laptop has not the data


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"partitoin": "x"}, r"cluster 'site': 1 problem\n  partitoin: no such key; did you mean 'partition'\?"),
        ({"kind": "pbs"}, "kind: expected slurm or local, got 'pbs'"),
        ({"minutes": 5}, "leaves no time to work: signal_seconds is 300.*allow at least 7 minutes"),
        ({"stages": {"probe": {"minutes": 6}}}, "minutes: 6 leaves no time to work"),
        ({"stages": {"prob": {}}}, "stages.prob"),
        ({"stages": {"pretrain": {"gpu": True}}}, "training takes the profile's gpus_per_node"),
        ({"container": {"kind": "docker", "image": "x"}}, "container.kind: expected 'apptainer' or 'pyxis'"),
        ({"environment": {"A B": "x"}}, "environment"),
        ({"kind": "local"}, "no such key"),
        ({"sbatch": {"requeue": False}}, "sbatch.requeue: launching sets --requeue itself; give requeues instead"),
        ({"sbatch": {"ntasks_per_node": 2}}, "--ntasks-per-node itself; give tasks_per_node instead"),
        ({"sbatch": {"output": "x"}}, "--output itself; leave it out"),
        ({"sbatch": {"exclusive": False}}, "sbatch.exclusive: a flag of sbatch cannot be false; leave it out"),
    ],
)
@pytest.mark.usefixtures("site")
def test_mistakes_in_a_profile(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"site": {**SITE, **changes}}))
    with pytest.raises(ConfigError, match=match):
        profiles.choose("site", tmp_path / "mine.yaml")


@pytest.mark.usefixtures("site")
def test_where_profiles_come_from(tmp_path: Path) -> None:
    home = tmp_path / ".config/explora/clusters.yaml"
    home.parent.mkdir(parents=True)
    home.write_text("local: {tasks_per_node: 3, environment: {A: '${EXPLORA_A:-b}'}}\nother: {kind: slurm}")
    assert profiles.choose("site") == profiles.Slurm.model_validate(SITE)
    with pytest.raises(ConfigError, match=r"Describe yours in clusters.yaml"):
        profiles.choose("other")
    (tmp_path / "clusters.yaml").unlink()
    assert profiles.choose("other") == profiles.Slurm()
    assert profiles.choose("local") == profiles.Local(tasks_per_node=3, environment={"A": "b"})
    with pytest.raises(ConfigError, match="no such file"):
        profiles.choose("other", "nowhere.yaml")
    home.write_text("local: 3")
    with pytest.raises(ConfigError, match="expected the name of a cluster and below it its keys"):
        profiles.choose("local")


@pytest.mark.usefixtures("site")
def test_the_examples_in_the_shipped_file_are_valid(tmp_path: Path) -> None:
    lines = profiles.SHIPPED.read_text().split("local:\n  kind: local\n")[1].splitlines()
    examples = [line.removeprefix("# ") for line in lines if re.match(r"# (\S+:$|  )", line)]
    (tmp_path / "examples.yaml").write_text("\n".join(examples))
    for name in "site", "site_container":
        assert profiles.choose(name, tmp_path / "examples.yaml").ranks == 8
