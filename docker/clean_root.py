"""Follow a Dockerfile in a clean root of debootstrap's, where no container engine runs; needs root and `debootstrap`.

    python docker/clean_root.py docker/Dockerfile.cpu bookworm http://deb.debian.org/debian ROOT -- explora --help

Every COPY, RUN, ENV, USER and WORKDIR is done as Docker would, then the health check and the command after `--`, as the
image's user. FROM is the suite given; what the base image adds to its distribution (CUDA's libraries) is not there.
`--build-arg`, `--bind` (what a local package index needs, read-only: packages' scripts run as root in there) and the
caller's PIP_* and SSL_* variables reach the root from outside. Mounts live in a namespace of their own and end with
each command.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Instruction(NamedTuple):
    """One line of a Dockerfile, continued lines joined."""

    name: str
    rest: str

    def words(self) -> list[str]:
        """Its arguments: JSON's where they are a list, a shell's otherwise."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


def parse(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile, without its comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        yield Instruction(name.upper(), rest.strip())


@dataclass
class Root:
    """A folder that stands for the image, and what its Dockerfile has set so far."""

    folder: Path
    project: Path
    given: Mapping[str, str]
    binds: list[str]
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    args: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    health: list[str] = field(default_factory=list)

    def run(self, command: list[str]) -> None:
        """A command in the root, as its user, with nothing of the caller's but what pip and TLS need."""
        binds = [("--rbind", "/dev"), ("--rbind", "/proc"), *(("-o bind,ro", path) for path in self.binds)]
        mounts = "".join(f"mount {how} {shlex.quote(b)} {shlex.quote(f'{self.folder}{b}')} && " for how, b in binds)
        inside = f"cd {shlex.quote(self.workdir)} && exec {shlex.join(command)}"
        outside = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        env = {**outside, **{k: v for k, v in self.args.items() if v}, **self.env, "HOME": self._home()}
        chroot = ["chroot", f"--userspec={self.user}", str(self.folder), "sh", "-c", inside]
        started = time.monotonic()
        print(f"==> {shlex.join(command)}", flush=True)
        subprocess.run(["unshare", "--mount", "sh", "-euc", f"{mounts}exec {shlex.join(chroot)}"], env=env, check=True)
        print(f"<== {time.monotonic() - started:.0f} s", flush=True)

    def _home(self) -> str:
        users = [line.split(":") for line in (self.folder / "etc/passwd").read_text().splitlines()]
        return next(user[5] for user in users if user[2] == self.user.partition(":")[0])

    def follow(self, step: Instruction) -> None:
        """Do one instruction."""
        match step.name:
            case "ARG":
                name, _, value = step.rest.partition("=")
                self.args[name] = self.given.get(name, value)
            case "ENV":
                for pair in step.words():
                    name, _, value = pair.partition("=")
                    self.env[name] = value.replace("${PATH}", self.env["PATH"])
            case "USER":
                self.user = step.rest
            case "WORKDIR":
                self.workdir = step.rest
                (self.folder / step.rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = step.words()
                for source in sources:
                    self._copy(self.project / source, self.folder / self.workdir.lstrip("/") / target)
            case "RUN":
                self.run(step.words())
            case "HEALTHCHECK":
                self.health = json.loads(step.rest.partition("CMD")[2])
            case "FROM" | "CMD":
                pass
            case other:
                sys.exit(f"{other}: not known here; teach it to docker/clean_root.py")

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def main() -> None:
    """Make the root, follow the Dockerfile, check its health, run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("suite", help="bookworm, noble, ...")
    parser.add_argument("mirror", help="the distribution's archive")
    parser.add_argument(
        "root", type=Path, help="new folder, yours to remove; one that debootstrap made is used as it is"
    )
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH", help="seen at the same place inside")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, command = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if not asked.root.exists():
        subprocess.run(["debootstrap", "--variant=minbase", asked.suite, asked.root, asked.mirror], check=True)
    for path in asked.bind:
        inside = Path(f"{asked.root}{path}")
        (inside if Path(path).is_dir() else inside.parent).mkdir(parents=True, exist_ok=True)
        if Path(path).is_file():
            inside.touch()
    given = dict(pair.split("=", 1) for pair in asked.build_arg)
    root = Root(asked.root, Path(__file__).parents[1], given, ["/etc/resolv.conf", *asked.bind])
    for step in parse(asked.dockerfile.read_text()):
        root.follow(step)
    root.run(root.health)
    if command:
        root.run(command)


if __name__ == "__main__":
    main()
