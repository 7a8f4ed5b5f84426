"""A chain as SLURM jobs through submitit: one job a stage, one array a stage of a sweep."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from explora.errors import RunError
from launch import records
from launch.chain import Chain
from launch.profiles import Slurm, Stage
from launch.records import Job
from launch.states import ask
from launch.task import REQUEUE, Task

_DEAF = ["sh", "-c", 'trap "" TERM USR2; exec "$0" "$@"']
"""Starts Python deaf to what would kill it before submitit listens: a preempted job must not end by itself."""
_EXPORT = "--export=ALL"
"""For srun: under `sbatch --export=NONE`, which sites may set for all, it would pass no variable on."""
_EACH_NODE = f'srun {_EXPORT} --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'


class _Executor(submitit.SlurmExecutor):
    """submitit's, which can also say what it would submit, and that where there is no SLURM too."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, count: int) -> str:
        """The sbatch file of one job, or of an array of so many."""
        if count > 1:
            self.parameters["map_count"] = count  # submitit's own mark of an array
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def scripts(profile: Slurm, chain: Chain) -> str:
    """The sbatch files that `submit` would hand to SLURM, with ID_OF_... where it would know an id."""
    texts: list[str] = []
    before: Stage | None = None
    for stage in chain.stages:
        after = None if before is None else f"ID_OF_{before.upper()}"
        text = _executor(profile, chain, stage, after).script(len(chain.points))
        texts.append(f"# ---- {stage}\n{text}")
        before = stage
    return "\n".join(texts)


def submit(profile: Slurm, cluster: str, chain: Chain) -> list[Job]:
    """Submit every stage after the one before; all of them or none.

    Raises:
        RunError: there is no SLURM here, or it refuses a job.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise RunError("sbatch is not on the PATH; launch on a login node of the cluster, or see --dry-run from here")
    submitted: list[Job] = []
    known = _files(chain, chain.stages)
    after: str | None = None
    for stage in chain.stages:
        executor = _executor(profile, chain, stage, after)
        seconds = profile.of(stage).minutes * 60
        tasks = [Task(stage, chain.whole, point.config, seconds, profile.requeues) for point in chain.points]
        try:
            with redirect_stderr(io.StringIO()):  # submitit prints there what its error says too
                queued = executor.submit_array(tasks)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            left = _withdraw(submitted)
            for path in _files(chain, (stage,) if left else chain.stages) - known:
                path.unlink(missing_ok=True)
            raise RunError(f"SLURM refuses the job of stage '{stage}': {str(error).strip()}{left}") from None
        for point, job in zip(chain.points, queued, strict=True):
            log = str(job.paths.stdout)
            submitted.append(point.job(stage, id=job.job_id, kind="slurm", cluster=cluster, log=log))
            records.write(submitted[-1])
        after = queued[0].job_id.partition("_")[0]
    return submitted


def _withdraw(jobs: list[Job]) -> str:
    """Cancel half a chain; what to say where that fails, and the records stay for `explora cancel`."""
    if not jobs:
        return ""
    ids = [job.id for job in jobs]
    try:
        ask("scancel", *ids)
    except RunError as error:
        return (
            f"\nJobs {' '.join(ids)} of this launch could not be cancelled ({error}); cancel them by `explora cancel`"
        )
    for job in jobs:
        job.path.unlink(missing_ok=True)
    return ""


def _files(chain: Chain, stages: Iterable[Stage]) -> set[Path]:
    """What submitit has written to submit these stages."""
    folders = [records.folder_of(chain.root) / stage for stage in stages]
    return {path for folder in folders for path in folder.glob("*") if path.suffix in (".sh", ".pkl")}


def _executor(profile: Slurm, chain: Chain, stage: Stage, after: str | None) -> _Executor:
    """submitit's executor with all that a stage's sbatch file says."""
    need = profile.of(stage)
    folder = (records.folder_of(chain.root) / stage).absolute()
    executor = _Executor(folder, max_num_timeout=need.requeues, python=_python(need, chain.root))
    order = "aftercorr" if len(chain.points) > 1 else "afterok"
    flags: dict[str, Any] = {
        "job_name": f"{chain.root.name}-{stage}",
        "time": need.minutes,
        "signal_delay_s": need.signal_seconds,
        "partition": need.partition,
        "account": need.account,
        "qos": need.qos,
        "constraint": need.constraint,
        "nodes": need.nodes,
        "ntasks_per_node": need.tasks,
        "cpus_per_task": need.cpus_per_task,
        "gpus_per_node": need.gpus_per_node or None,
        "dependency": None if after is None else f"{order}:{after}",
        "array_parallelism": need.array_parallelism,
        "stderr_to_stdout": True,
        "setup": _setup(need),
        "teardown": _teardown(need, folder),
        "srun_args": _srun(need),
        # As further flags, because submitit cannot pass a memory on to an array.
        "additional_parameters": {
            "requeue": True,
            **({} if after is None else {"kill-on-invalid-dep": "yes"}),
            **({} if need.mem_gb is None else {"mem": f"{round(need.mem_gb * 1024)}M"}),
            **need.sbatch,
        },
    }
    executor.update_parameters(**{name: value for name, value in flags.items() if value is not None})
    executor.parameters["wckey"] = None  # submitit's own, which sites that count by them refuse
    return executor


def _setup(profile: Slurm) -> list[str] | None:
    """Shell lines before Python starts; values of variables are read on the node."""
    lines = [f"module load {shlex.quote(name)}" for name in profile.modules]
    variables = {**profile.environment, **({} if profile.scratch is None else {"TMPDIR": profile.scratch})}
    lines += [f'export {name}="{_in_quotes(value)}"' for name, value in variables.items()]
    if profile.scratch is not None:
        lines.append(f'{_EACH_NODE} mkdir -p "$TMPDIR"')
    return [*lines, *profile.setup] or None


def _in_quotes(value: str) -> str:
    """A text as it stands between double quotes in a shell, `$NAME` left to the shell."""
    for mark in ("\\", '"', "`"):
        value = value.replace(mark, "\\" + mark)
    return value


def _srun(profile: Slurm) -> list[str]:
    arguments = ["--kill-on-bad-exit=1", "--open-mode=append", _EXPORT]
    # Since SLURM 22.05 srun no longer takes this from sbatch.
    arguments.append(f"--cpus-per-task={profile.cpus_per_task}")
    if profile.container is not None and profile.container.kind == "pyxis":
        arguments += [f"--container-image={profile.container.image}", f"--container-workdir={os.getcwd()}"]
    return arguments


def _python(profile: Slurm, root: Path) -> str:
    """The shell words after srun's arguments, that start Python on a node."""
    container = profile.container
    if container is None:
        return shlex.join([*_DEAF, profile.python or sys.executable])
    if container.kind == "pyxis":
        mounts = ",".join(path if ":" in path else f"{path}:{path}" for path in _mounts(profile, root))
        # One more of srun's arguments: submitit would quote it among the others, and the shell must read $TMPDIR.
        scratch = ',"$TMPDIR:$TMPDIR"' if profile.scratch is not None else ""
        return f"--container-mounts={shlex.quote(mounts)}{scratch} {shlex.join([*_DEAF, container.python])}"
    words = [*_DEAF, "apptainer", "exec", *(["--nv"] if profile.gpus_per_node else []), "--pwd", os.getcwd()]
    words += [word for path in _mounts(profile, root) for word in ("--bind", path)]
    scratch = ' --bind "$TMPDIR"' if profile.scratch is not None else ""
    return f"{shlex.join(words)}{scratch} {shlex.join([container.image, container.python])}"


def _mounts(profile: Slurm, root: Path) -> list[str]:
    """What a container must see: where it is launched, the run's folder, and what the profile names."""
    named = () if profile.container is None else profile.container.mounts
    return list(dict.fromkeys([os.getcwd(), str(records.folder_of(root).parent.absolute()), *named]))


def _teardown(profile: Slurm, folder: Path) -> list[str] | None:
    """Remove scratch that is this job's alone, and requeue for a container: Python, without scontrol, leaves a file."""
    lines = []
    if profile.scratch is not None and re.search(r"\$SLURM_JOB_ID\b", profile.scratch):
        lines.append(f'{_EACH_NODE} rm -rf "{_in_quotes(profile.scratch)}"')
    if profile.container is not None:
        asked = f'{shlex.quote(str(folder))}/"$SLURM_JOB_ID"{REQUEUE}'
        failed = 'echo "error: the job cannot go back to the queue; launch again to go on"'
        lines.append(f'if rm {asked} 2>/dev/null; then scontrol requeue "$SLURM_JOB_ID" || {failed}; fi')
    return ["status=$?", *lines, "exit $status"] if lines else None
