"""nanochat_x.runner, with a script in place of the C++ program: what is asked of it and what is made of its answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_x import runner
from nanochat_x.build import RunnerBuild
from nanochat_x.bundle import write_manifest
from nanochat_x.errors import BundleError, RunnerError, UsageError
from nanochat_x.runner import Runner, bundle_target, failure, forward_arguments

#: Answers by what it was asked, as the C++ program would.
PROGRAM = """\
#!{python}
import json, os, signal, sys
verb, bundle, *rest = sys.argv[1:]
if verb == "fail":
    print("loading ...", file=sys.stderr)
    print("nanochat_x: error: weights.safetensors: one byte differs", file=sys.stderr)
    sys.exit(2)
if verb == "crash":
    os.kill(os.getpid(), signal.SIGILL)
if verb == "silent":
    sys.exit(3)
if verb == "chatter":
    print("no JSON here")
    sys.exit(0)
if verb == "nothing":
    sys.exit(0)
print("first a line for people")
print(json.dumps({{"verb": verb, "bundle": bundle, "rest": rest, "stdin": sys.stdin.read()}}))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "nanochat-aoti"
    file.write_text(PROGRAM.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setattr(runner, "ensure_built", lambda target, log=None: RunnerBuild(file, tmp_path))
    return file


MANIFEST = {
    "schema_version": 3, "target": "aoti", "dtype": "float32", "model": {}, "max_seq_len": 8, "checkpoint": {},
    "machine": {}, "programs": {}, "tokenizer": "tokenizer.json", "files": [],
}  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "a bundle"
    folder.mkdir()
    write_manifest(folder, MANIFEST)
    return folder


def test_the_target_of_a_bundle(bundle: Path) -> None:
    assert bundle_target(bundle) == "aoti"


@pytest.mark.parametrize("target", ["tpu", "../sh", ""])
def test_a_target_without_a_runner(bundle: Path, target: str) -> None:
    write_manifest(bundle, MANIFEST | {"target": target})
    with pytest.raises(BundleError, match=f"for the target '{target}', for which there is no runner"):
        Runner(bundle)


def test_a_path_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Runner(tmp_path)


def test_the_last_line_is_the_answer(program: Path, bundle: Path) -> None:
    answer = Runner(bundle).json("chat", "--temperature=0", stdin="Grüße")
    assert answer == {"verb": "chat", "bundle": str(bundle), "rest": ["--temperature=0"], "stdin": "Grüße"}


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("fail", "^weights.safetensors: one byte differs$"),
        ("crash", "^the runner was ended by SIGILL$"),
        ("silent", "code 3 and said nothing"),
        ("chatter", "ended without a line of JSON: 'no JSON here'"),
        ("nothing", "ended without a line of JSON: ''"),
    ],
)
def test_a_failure_is_an_error(program: Path, bundle: Path, verb: str, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        Runner(bundle).json(verb)


def test_a_program_that_cannot_be_started(program: Path, bundle: Path) -> None:
    program.chmod(0o644)
    program.write_text("no program")
    with pytest.raises(RunnerError, match="cannot start"):
        Runner(bundle).run("chat")
    with pytest.raises(RunnerError, match="cannot start"):
        runner.run_passthrough(Runner(bundle).command("chat"))


def test_a_bundle_that_looks_like_an_option(
    program: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.rename(tmp_path / "--help")
    monkeypatch.chdir(tmp_path)
    assert Runner(Path("--help")).json("info")["bundle"] == "./--help"


def test_forward_asks_for_the_mode(program: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(Runner, "run", lambda self, *arguments: asked.append(arguments))
    made = Runner(bundle)
    made.forward(Path("x"), Path("y"))
    made.forward(Path("x"), Path("y"), cache=False)
    made.forward(Path("x"), Path("y"), chunks=(3, 1, 16))
    both = ("forward", "--input=x", "--output=y")
    assert asked == [both, (*both, "--no-cache"), (*both, "--chunks=3,1,16")]
    with pytest.raises(UsageError, match="chunks go through the cache"):
        forward_arguments(Path("x"), Path("y"), cache=False, chunks=(1,))


def test_passthrough_is_the_program_itself(program: Path, bundle: Path) -> None:
    code = "import sys; from nanochat_x.runner import run_passthrough; print('before')\nrun_passthrough(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(program), "chat", str(bundle)], input="hello", capture_output=True, text=True
    )
    before, people, answer = done.stdout.splitlines()
    assert (before, people) == ("before", "first a line for people")
    assert json.loads(answer)["stdin"] == "hello"
    crashed = subprocess.run([sys.executable, "-c", code, str(program), "crash", str(bundle)], capture_output=True)
    assert crashed.returncode == -4, "the signal is the process's own: it became the program"


@pytest.mark.parametrize(
    ("code", "stderr", "line"),
    [
        (2, "nanochat_x: error: a: b\n", "a: b"),
        (2, "nanochat-aoti: a: b\n\n", "a: b"),
        (1, "plain words\n", "plain words"),
        (-9, "whatever", "the runner was ended by SIGKILL"),
        (-200, "", "the runner was ended by signal 200"),
    ],
)
def test_failure_lines(code: int, stderr: str, line: str) -> None:
    assert failure(code, stderr) == line
