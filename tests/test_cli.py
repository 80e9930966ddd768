"""The command line: what it says, what it refuses, and what it hands to the C++ program."""

from __future__ import annotations

import errno
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from nanochat_x import cli
from nanochat_x.cli import main
from nanochat_x.errors import RunnerError
from nanochat_x.interrupts import ending_at_once

VERBS = ("lower", "init", "inspect", "build-runners", "forward", "generate", "chat", "eval", "compare",
         "bench", "doctor")  # fmt: skip


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


# --- help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^  {verb}  +\S", out, re.MULTILINE), verb
    assert "nanochat_x lower -i demo" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: nanochat_x {verb}")
    if verb != "build-runners":
        assert re.search(rf"^  nanochat_x {verb} ", out, re.MULTILINE), "an example"


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_in_the_help_parse(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example is parsed by click, with the verb itself replaced."""
    main([verb, "--help"])
    examples = re.findall(rf"^  nanochat_x ({verb}\b.*?)(?:  .*)?$", capsys.readouterr().out, re.MULTILINE)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(cli.cli.commands[verb], "callback", lambda **options: seen.append(options))
    for example in examples:
        assert main(shlex.split(example)) == 0, (example, capsys.readouterr().err)
    assert len(seen) == len(examples)
    assert examples or verb == "build-runners"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from nanochat_x import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanochat_x {__version__}\n"


def test_help_and_mistakes_import_no_torch() -> None:
    code = (
        "import sys; from nanochat_x.cli import main; main(['lower', '--help']); main(['lower', '--bogus']); "
        "main(['chat', '/nowhere']); print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "False False"


def test_the_module_and_the_console_scripts(tmp_path: Path) -> None:
    expected = python("-m", "nanochat_x", "--help", cwd=tmp_path)
    assert expected.returncode == 0
    for name in ("nanochat_x", "nanochat-x"):
        script = Path(sys.executable).with_name(name)
        done = subprocess.run([script, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout) == (0, expected.stdout)


# --- mistakes: one line, exit code 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bogus", "No such command 'bogus'"),
        ("--bogus", "No such option: --bogus|No such option '--bogus'"),
        ("lower --bogus", "No such option.*--bogus.*`nanochat_x lower --help`"),
        ("lower extra", "unexpected extra argument"),
        ("lower -i foo", "'foo' is not one of 'base', 'mid', 'sft', 'rl', 'demo'"),
        ("lower -s -1", "'-1' is not an integer of at least 0"),
        ("lower -s 1.5", "'1.5' is not an integer"),
        ("lower --dtype int8", "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        ("lower --target tpu", "'tpu' is not"),
        ("lower --max-seq-len 0", "'0' is not an integer of at least 1"),
        ("lower --override softcap", "override 'softcap' is not KEY=VALUE"),
        ("lower --override nope=1", "nope"),
        ("init", "Missing option '--depth'"),
        ("init --depth 0", "'0' is not an integer of at least 1"),
        ("inspect a --source base", "both given"),
        ("inspect a --override softcap=20", "both given"),
        ("inspect /nowhere", "/nowhere"),
        ("forward b", "Missing option '--input'"),
        ("forward b --input x --output y --chunks 1,0", "'0' is not an integer of at least 1"),
        ("forward b --input x --output y --chunks 1,,2", "'' is not an integer"),
        ("forward b --input x --output y --chunks ²", "'²' is not an integer"),
        ("forward b --input x --output y --chunks 1 --no-cache", "chunks go through the cache"),
        ("generate b", "one of --prompt and --prompt-ids"),
        ("generate b --prompt x --prompt-ids 1", "one of --prompt and --prompt-ids"),
        ("generate b --prompt-ids 1,-2", "'-2' is not an integer of at least 0"),
        ("generate b --prompt-ids 99999999999999999999", "is not an integer"),
        ("generate b --prompt x --temperature -0.1", "'-0.1' is not a number of at least 0"),
        ("generate b --prompt x --temperature nan", "'nan' is not a number"),
        ("generate b --prompt x --temperature inf", "'inf' is not a number"),
        ("generate b --prompt x --top-p 0", "'0' is not a number above 0 and at most 1"),
        ("generate b --prompt x --top-p 1.01", "'1.01' is not a number above 0 and at most 1"),
        ("generate b --prompt x --top-k -1", "'-1' is not an integer of at least 0"),
        ("generate b --prompt x --max-tokens 0", "'0' is not an integer of at least 1"),
        ("generate b --prompt x --num-samples 0", "'0' is not an integer of at least 1"),
        ("generate b --prompt x --seed 18446744073709551616", "at most 18446744073709551615"),
        ("generate b --prompt x --threads 0", "'0' is not an integer of at least 1"),
        ("generate b --prompt \udcff", "--prompt is not UTF-8"),
        ("chat b --prompt x --script y", "one of --prompt and --script"),
        ("chat b --prompt ", "--prompt is empty"),
        ("chat b --json", "--json reports on a script"),
        ("chat /nowhere", "no bundle at /nowhere"),
        ("eval b", "one of --text and --docs"),
        ("eval b --text x --docs y", "one of --text and --docs"),
        ("eval b --text x --context 0", "'0' is not an integer of at least 1"),
        ("eval /nowhere --text x", "no bundle at /nowhere"),
        ("compare a --text x", "takes a second bundle"),
        ("doctor /nowhere", "no bundle at /nowhere"),
        ("doctor a b", "unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split(" ")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"nanochat_x: error: [^\n]*\n", err), err
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == [], "nothing left behind"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunnerError("this broke", remedy="do\nthat"), 2, "nanochat_x: error: this broke; do that\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2,
         "nanochat_x: error: /x/y: No space left on device; free some space and try again\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2,
         "nanochat_x: error: /x/y: Permission denied\n"),
        (OSError("odd"), 2, "nanochat_x: error: odd\n"),
        (MemoryError(), 2, "nanochat_x: error: this machine has not enough free memory for that\n"),
        (KeyboardInterrupt(), 130, "nanochat_x: interrupted\n"),
    ],
)  # fmt: skip
def test_what_a_verb_may_meet_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(cli, "build_all", fail)
    assert main(["build-runners"]) == code
    assert capsys.readouterr().err == line


def test_a_mistake_of_ours_is_no_such_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "build_all", fail)
    with pytest.raises(ZeroDivisionError):
        main(["build-runners"])


@pytest.mark.parametrize(
    ("number", "code", "stderr"), [(signal.SIGINT, 130, "nanochat_x: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_lets_a_verb_clean_up(number: int, code: int, stderr: str, tmp_path: Path) -> None:
    program = f"""
import pathlib, sys, time
from nanochat_x import cli, __main__
def slow(*_, **__):
    half = pathlib.Path({str(tmp_path / "half-written")!r})
    try:
        half.write_text("")
        time.sleep(30)
    finally:
        half.unlink()
cli.build_all = slow
sys.argv = ["nanochat_x", "build-runners"]
__main__.run()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "half-written").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "stderr"),
    [(signal.SIGINT, 130, "nanochat_x: interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
@pytest.mark.parametrize("swallow", ["pass", "raise ImportError('numpy is broken')"])
def test_a_signal_while_modules_are_imported(swallow: str, number: int, code: int, stderr: str, tmp_path: Path) -> None:
    """A module may do as it likes with an exception that comes while it is imported; some do."""
    (tmp_path / "torch.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'importing')!r}).touch()\n"
        f"try:\n    time.sleep(60)\nexcept BaseException:\n    {swallow}\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['nanochat_x', 'inspect'];"
        "from nanochat_x.__main__ import run; run()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "importing").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "", stderr)


def test_handlers_are_put_back_after_an_import() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with ending_at_once():
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_at_once():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


# --- standard streams that are closed


@pytest.mark.parametrize(
    ("line", "closed", "code", "said"),
    [
        ("init --depth 1 -o model", ">&-", 0, ""),
        ("init --depth 1 -o model", ">&- 2>&-", 0, ""),
        ("init --depth 1 -o model", "2>&-", 0, "model:"),
        ("inspect -i demo", ">&-", 2, "nanochat_x: error: standard output is closed\n"),
        ("inspect -i demo", "2>&-", 0, "source demo"),
        ("inspect -i demo", "<&-", 0, "source demo"),
        ("inspect -i demo", ">/dev/full", 2, "nanochat_x: error: No space left on device; free some space"),
        ("inspect -i nope", "2>&-", 2, ""),
        ("inspect -i nope", ">&-", 2, "nanochat_x: error: "),
        ("lower --bogus", ">&- 2>&-", 2, ""),
        ("chat nowhere", "2>&-", 2, ""),
        ("chat nowhere", "<&- >&-", 2, "nanochat_x: error: no bundle at nowhere"),
    ],
)
def test_exit_codes_with_closed_streams(line: str, closed: str, code: int, said: str, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m nanochat_x {line} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    if not said:
        assert done.stdout + done.stderr == ""


def test_a_closed_stream_leaves_no_number_to_files(tmp_path: Path) -> None:
    """What is printed must not land in a file that was opened in the stream's place."""
    program = (
        "import sys; from nanochat_x import __main__, cli\n"
        f"cli.main = lambda arguments: print(open({str(tmp_path / 'file')!r}, 'w').fileno(), file=sys.stderr) or 0\n"
        "__main__.run()"
    )
    done = subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- >&-"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stderr) > 2


# --- what is handed over


def test_forward_is_handed_over(handed_over: list[list[str]]) -> None:
    base = ["forward", "b", "--input", "x", "--output", "y"]
    assert main(base) == 5, "the program's exit code is ours"
    main([*base, "--no-cache", "--threads", "3"])
    main([*base, "--chunks", "3,1, 16", "--device", "cuda"])
    same = ["forward", "b", "--input=x", "--output=y"]
    assert handed_over == [same, [*same, "--no-cache", "--threads=3"], [*same, "--chunks=3,1,16", "--device=cuda"]]


DEFAULTS = ["--max-tokens=256", "--temperature=0.6", "--top-k=50", "--top-p=1.0", "--seed=42"]


def test_generate_is_handed_over(handed_over: list[list[str]]) -> None:
    main(["generate", "b", "--prompt", ""])
    main(["generate", "b", "--prompt", "--odd text"])
    main([
        *("generate", "b", "--prompt-ids", "1,0,3", "--max-tokens", "9", "--temperature", "0", "--top-k", "0"),
        *("--top-p", "0.1", "--seed", str(2**64 - 1), "--num-samples", "4", "--raw", "--json"),
    ])  # fmt: skip
    assert handed_over[0] == ["generate", "b", *DEFAULTS, "--prompt=", "--num-samples=1"]
    assert handed_over[1] == ["generate", "b", *DEFAULTS, "--prompt=--odd text", "--num-samples=1"]
    assert handed_over[2] == [
        *("generate", "b", "--max-tokens=9", "--temperature=0.0", "--top-k=0", "--top-p=0.1", f"--seed={2**64 - 1}"),
        *("--prompt-ids=1,0,3", "--num-samples=4", "--raw", "--json"),
    ]  # fmt: skip


def test_chat_is_handed_over(handed_over: list[list[str]]) -> None:
    main(["chat", "b"])
    main(["chat", "b", "--prompt", "-h"])
    main(["chat", "b", "--script", "f.json", "--json", "--threads", "1"])
    same = ["chat", "b", *DEFAULTS]
    assert handed_over == [same, [*same, "--prompt=-h"], [*same, "--script=f.json", "--json", "--threads=1"]]


def test_eval_is_handed_over(handed_over: list[list[str]]) -> None:
    assert main(["eval", "b", "--text", "-x"]) == 5
    main(["eval", "b", "--docs", "d", "--context", "9", "--json", "--threads", "2", "--device", "cpu"])
    options = ["--docs=d", "--context=9", "--json", "--threads=2", "--device=cpu"]
    assert handed_over == [["eval", "b", "--text=-x"], ["eval", "b", *options]]


def test_build_runners_says_where_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []

    def built(**options: Any) -> tuple[Path, dict[str, str]]:
        asked.append({"tests": options["tests"], "werror": options["werror"]})
        return tmp_path, {"aoti": "libtorch was not found: pip install it"} if options["werror"] else {}

    monkeypatch.setattr(cli, "build_all", built)
    assert main(["build-runners", "--tests"]) == 0
    assert asked == [{"tests": True, "werror": False}]
    assert f"aoti: {tmp_path / 'nanochat-aoti'}" in capsys.readouterr().out
    assert main(["build-runners", "--werror"]) == 0
    assert "aoti: not built: libtorch was not found: pip install it" in capsys.readouterr().out


# --- the command that is proposed next


def test_the_next_command_is_one_that_works_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = tmp_path / "env with space" / "bin"
    environment.mkdir(parents=True)
    for name in ("python", "nanochat_x"):
        (environment / name).write_text("#!/bin/sh\n")
        (environment / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    monkeypatch.setattr(sys, "argv", ["/somewhere/nanochat_x/__main__.py"])
    monkeypatch.chdir("/usr")
    assert cli.invocation() == f"'{environment}/python' -m nanochat_x"
    monkeypatch.chdir(tmp_path)
    assert cli.invocation() == "'env with space/bin/python' -m nanochat_x"
    monkeypatch.setattr(sys, "argv", [str(environment / "nanochat_x")])
    assert cli.invocation() == f"'{environment}/nanochat_x'"

    monkeypatch.setenv("PATH", str(environment))  # an activated environment
    assert cli.invocation() == "nanochat_x"
    monkeypatch.setattr(sys, "argv", ["/somewhere/nanochat_x/__main__.py"])
    assert cli.invocation() == "python -m nanochat_x"
