"""The images: what they copy exists, their pins agree, they are one recipe, and nobody is root at the end."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
SPEC = importlib.util.spec_from_file_location("clean_root", DOCKER / "clean_root.py")
assert SPEC
assert SPEC.loader
clean_root = sys.modules["clean_root"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(clean_root)
FILES = {"gpu": DOCKER / "Dockerfile", "cpu": DOCKER / "Dockerfile.cpu"}


def steps(variant: str, name: str) -> list[str]:
    """The arguments of every instruction of this name."""
    return [step.rest for step in clean_root.parse(FILES[variant].read_text()) if step.name == name]


def copied(variant: str) -> set[str]:
    return {source for rest in steps(variant, "COPY") for source in rest.split()[:-1]}


def base(variant: str) -> str:
    return next(rest.removeprefix("BASE=") for rest in steps(variant, "ARG") if rest.startswith("BASE="))


def pins(path: Path) -> dict[str, str]:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), "every line is one exact version"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


LOCK, CUDA = pins(ROOT / "constraints.txt"), pins(DOCKER / "constraints-cuda.txt")


def required(name: str, extra: str, found: set[str]) -> set[str]:
    """All packages that an installed one asks for here, with what those ask for."""
    for text in metadata.requires(name) or ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        known = canonicalize_name(need.name)
        if known not in found:
            found.add(known)
            for inner in need.extras or {""}:
                required(known, inner, found)
    return found


@pytest.mark.parametrize("variant", FILES)
def test_sources_exist(variant: str) -> None:
    assert all((ROOT / source).exists() for source in copied(variant))
    checked = clean_root.json.loads(steps(variant, "HEALTHCHECK")[0].partition("CMD")[2])
    assert checked[:2] == ["explora", "check"]
    assert (ROOT / checked[2].removeprefix("/opt/explora/")).is_file()


@pytest.mark.parametrize("variant", FILES)
def test_nobody_is_root_at_the_end(variant: str) -> None:
    user = steps(variant, "USER")[-1].partition(":")[0]
    assert f"--uid {user} explora" in (DOCKER / "install.sh").read_text()
    assert int(user) > 0


@pytest.mark.parametrize("variant", FILES)
def test_an_image_is_its_three_steps(variant: str) -> None:
    runs = [clean_root.json.loads(rest) for rest in steps(variant, "RUN")]
    script = ["sh", "docker/install.sh"]
    assert runs == [[*script, "system", variant], [*script, "requirements", variant], [*script, "project"]]


def test_the_variants_differ_in_nothing_else() -> None:
    def rest(variant: str) -> list[tuple[str, str]]:
        found = clean_root.parse(FILES[variant].read_text())
        return [(name, rest.replace(f'"{variant}"', "")) for name, rest in found if name not in ("ARG", "FROM")]

    assert rest("cpu") == rest("gpu")


def test_apptainer_and_enroot_are_the_gpu_image() -> None:
    definition = (DOCKER / "explora.def").read_text()
    assert f"From: {base('gpu')}\n" in definition
    listed = re.findall(r"^ +(\S+) /opt/explora/(\S+)$", definition, re.MULTILINE)
    assert all(source == target for source, target in listed)
    assert {source for source, _ in listed} == copied("gpu")
    enroot = (DOCKER / "enroot.sh").read_text()
    sent = re.search(r"cp -r (.*) /opt/explora\n", enroot)
    assert sent
    assert {source.partition("/")[0] for source in copied("gpu")} == set(sent[1].split())
    for rest in steps("gpu", "RUN"):
        step = " ".join(clean_root.json.loads(rest)[1:])
        assert f"sh /opt/explora/{step}\n" in definition
        assert f"sh /opt/explora/{step}\n" in enroot


def test_bases_are_pinned_and_fit_torch() -> None:
    assert re.fullmatch(r"debian:bookworm-\d{8}-slim", base("cpu"))
    image = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-runtime-ubuntu24\.04", base("gpu"))
    assert image
    assert CUDA["nvidia-cuda-runtime"].startswith(f"{image[1]}.")


def test_locks_agree() -> None:
    assert all(LOCK.get(name, version) == version for name, version in CUDA.items())
    script = (DOCKER / "install.sh").read_text()
    assert "-c constraints.txt -c docker/constraints-cuda.txt" in script
    wanted = [Requirement(text) for text in metadata.requires("explora") or ()]
    assert all({**CUDA, **LOCK}[canonicalize_name(need.name)] in need.specifier for need in wanted if need.specifier)


def test_nothing_that_explora_needs_is_unlocked() -> None:
    assert required("explora", "", set()) <= {*LOCK, *CUDA}


@pytest.mark.parametrize("wrong", [[], ["system"], ["requirements", "tpu"], ["project", "cpu"], ["rm", "-rf"]])
def test_the_script_does_only_what_it_knows(wrong: list[str]) -> None:
    done = subprocess.run(["sh", DOCKER / "install.sh", *wrong], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is none of" in done.stderr


def test_scripts_parse() -> None:
    scripts = sorted(DOCKER.glob("*.sh"))
    assert scripts
    for script in scripts:
        done = subprocess.run(["sh", "-n", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("linter", "pattern"), [("shellcheck", "*.sh"), ("hadolint", "Dockerfile*")])
def test_linters_find_nothing(linter: str, pattern: str) -> None:
    if shutil.which(linter) is None:
        pytest.skip(f"{linter} is not installed")
    subprocess.run([linter, *DOCKER.glob(pattern)], check=True)


def test_a_dockerfile_is_read_as_docker_does() -> None:
    text = '# comment\nARG A=1\nFROM x\nRUN ["a b", "c"]\n\nENV X=1 \\\n    # within\n    Y="2 3"\nCOPY a b c/\n'
    found = list(clean_root.parse(text))
    assert [step.name for step in found] == ["ARG", "FROM", "RUN", "ENV", "COPY"]
    assert [step.words() for step in found[2:]] == [["a b", "c"], ["X=1", "Y=2 3"], ["a", "b", "c/"]]


def test_a_root_is_filled_as_docker_does(tmp_path: Path) -> None:
    (tmp_path / "project/room").mkdir(parents=True)
    (tmp_path / "project/room/a.py").write_text("1")
    (tmp_path / "project/b.txt").write_text("2")
    root = clean_root.Root(tmp_path / "root", tmp_path / "project", {"ASKED": "given"}, [])
    text = "ARG ASKED\nARG OTHER=5\nWORKDIR /opt/x\nCOPY room room\nCOPY b.txt docker/\nENV PATH=/v:${PATH}\nUSER 7:7\n"
    for step in clean_root.parse(text):
        root.follow(step)
    assert (tmp_path / "root/opt/x/room/a.py").read_text() == "1"
    assert (tmp_path / "root/opt/x/docker/b.txt").read_text() == "2"
    assert root.env["PATH"] == f"/v:{clean_root.PATH}"
    assert root.args == {"ASKED": "given", "OTHER": "5"}
    assert root.user == "7:7"
