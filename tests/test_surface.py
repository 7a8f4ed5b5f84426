"""The public surface: names, verbs, and that asking for help does not wait for torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import explora
from explora import cli

VERBS = [
    *("check", "compare", "continual", "demo", "export", "finetune", "index", "pack"),
    *("pretrain", "probe", "report", "run", "stats", "verify"),
]
LAUNCHED = ["cancel", "jobs", "launch"]
"""Verbs of the package `launch`, found through its entry points."""


def test_names_are_pinned() -> None:
    methods = [
        "APT",
        "Bias",
        "DiffPruning",
        "ExPLoRA",
        "Expansion",
        "Frozen",
        "Full",
        "IA3",
        "Last",
        "LoRA",
        "Norms",
        "Selective",
        "SynQT",
    ]
    classes = [*methods, "DINOv2", "FewShot", "KNN", "Linear", "LogisticRegression", "Supervised"]
    assert sorted(explora.__all__) == sorted([*VERBS, *classes, "load_backbone"])
    for name in explora.__all__:
        assert getattr(explora, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'explora' has no attribute 'pretrane'"):
        explora.pretrane  # noqa: B018


def test_each_verb_is_the_function_of_that_name() -> None:
    callbacks = [command.callback for command in cli.app.registered_commands if command.callback]
    commands = {callback.__name__: callback for callback in callbacks}
    own = {name: callback for name, callback in commands.items() if callback.__module__ == cli.__name__}
    assert sorted(own) == VERBS
    assert sorted(commands.keys() - own.keys()) == LAUNCHED
    for name, command in own.items():
        function = getattr(explora, name)
        theirs, ours = (inspect.signature(one).parameters for one in (command, function))
        assert function.__doc__
        assert command.__doc__
        if name == "compare":  # many files, then overrides: one list on the command line, two arguments in Python
            continue
        assert len(theirs) == len(ours), name
        # `config` of the command line may be a mapping in Python, and is called `source` there
        assert list(theirs)[1:] == list(ours)[1:], name
        assert [one.default for one in theirs.values()] == [one.default for one in ours.values()], name


def test_help_lists_the_verbs_without_torch() -> None:
    code = (
        "import sys, explora.cli\n"
        "sys.argv = ['explora', '--help']\n"
        "try: explora.cli.main()\n"
        "finally: print('torch' in sys.modules, 'timm' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False False")
    assert all(f" {verb} " in done.stdout for verb in [*VERBS, *LAUNCHED])
    module = subprocess.run([sys.executable, "-m", "explora.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(f" {verb} " in module.stdout for verb in VERBS)
