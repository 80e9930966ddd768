"""`doctor`: it finds nothing where all is well, and each thing that is spoilt."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NoReturn

import pytest
from bundles import change_byte, edit_manifest

from nanochat_x import doctor, doctor_bundle
from nanochat_x.build import PROGRAMS, RunnerBuild
from nanochat_x.cli import main
from nanochat_x.doctor import Finding, examine_lowering, examine_packages, examine_running, examine_tools, lines_of
from nanochat_x.doctor_bundle import examine_bundle, findings_of_info
from nanochat_x.errors import BundleError, LoweringError, RunnerError
from nanochat_x.pins import Pin, parse_pins, read_pins, satisfies

# --- pins


@pytest.mark.parametrize(
    ("version", "pin", "good"),
    [
        ("2.13.0", "==2.13.0", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("1.23.2", "~=1.23.2", True),
        ("1.23.10", "~=1.23.2", True),
        ("1.23.1", "~=1.23.2", False),
        ("1.24.0", "~=1.23.2", False),
        ("4.9", "~=4.4", True),
        ("4.3.9", "~=4.4", False),
        ("5.0", "~=4.4", False),
        ("3.11.0", ">=3.11", True),
        ("3.9", ">=3.11", False),
        ("3.12", ">=3.11,~=3.12", True),
        ("4.0", ">=3.11,~=3.12", False),
        ("unknown", ">=0", False),
        ("1", "", True),
    ],
)
def test_pins(version: str, pin: str, good: bool) -> None:
    assert satisfies(version, pin) is good


@pytest.mark.parametrize("pin", ["!=1.0", "<2", "==1.*", "1.0"])
def test_another_form_of_pin_is_no_guess(pin: str) -> None:
    with pytest.raises(ValueError, match="not a pin"):
        satisfies("1.0", pin)


def test_every_dependency_of_ours_is_understood(root: Path) -> None:
    """By the form that setuptools gives them in the wheel's metadata."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = {name: project["optional-dependencies"][name] for name in ("onnx", "executorch")}
    wanted: list[tuple[str, str | None]] = [(line, None) for line in project["dependencies"]]
    wanted += [(line, extra) for extra, lines in extras.items() for line in lines]
    pins = read_pins()
    assert pins is not None
    assert [(pin.name + pin.versions, pin.extra) for pin in pins] == wanted
    for pin in pins:
        assert not satisfies("0.0.1", pin.versions)


def test_lines_of_metadata() -> None:
    lines = ["a==1.0", 'b~=2.1; extra == "onnx"', 'nanochat_x[onnx]; extra == "all"', 'c>=1; extra == "dev"']
    assert parse_pins(lines) == [Pin("a", "==1.0", None), Pin("b", "~=2.1", "onnx")]
    assert Pin("b", "~=2.1", "onnx").install == "pip install 'b~=2.1'"


# --- this machine


def by_name(findings: Any, section: str | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if section in (None, finding.section)}


def test_where_all_is_well(capsys: pytest.CaptureFixture[str], runner_build: Path) -> None:
    """Here the tests run, so that nothing can be amiss: every target is lowered to and run."""
    code = main(["doctor", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    amiss = [finding for finding in report["findings"] if finding["state"] == "amiss"]
    assert (code, report["ok"]) == ((0, True) if not amiss else (1, False))
    # Another patch release of a package than is pinned may be installed here; a target that does not work may not.
    assert {finding["section"] for finding in amiss} <= {"packages"}
    assert {line for line in lines if line and not line.startswith(" ")} == {
        "packages", "tools", "lowering", "running", "all is well" if not amiss else f"to be mended: {len(amiss)}",
    }  # fmt: skip
    for section in ("lowering", "running"):
        found = {f["name"]: f["state"] for f in report["findings"] if f["section"] == section}
        assert found == dict.fromkeys(PROGRAMS, "ok")
    for name in (
        "python",
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "executorch",
        "C++ compiler",
        "cmake",
        "ninja",
    ):
        assert name in {finding["name"] for finding in report["findings"]}


def test_packages_missing_and_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.12.0+cpu", "onnx": "1.23.9"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    pins = [Pin("torch", "==2.13.0", None), Pin("numpy", "~=2.4", None), Pin("onnx", "~=1.23.2", "onnx"),
            Pin("executorch", "~=1.5.1", "executorch"), Pin("cmake", "~=4.4", None)]  # fmt: skip
    found = by_name(examine_packages(pins))
    assert found["python"].state == "ok"
    assert found["torch"] == Finding("packages", "torch", "amiss", "2.12.0+cpu (wanted: ==2.13.0)",
                                     "pip install 'torch==2.13.0'")  # fmt: skip
    assert (found["numpy"].state, found["numpy"].mend) == ("amiss", "pip install 'numpy~=2.4'")
    assert (found["onnx"].state, found["onnx"].mend) == ("ok", "")
    assert found["executorch"].state == "missing", "another target's package is no fault"
    assert found["executorch"].text == "not installed (wanted: ~=1.5.1, for the target executorch)"
    assert "cmake" not in found, "told among the tools"


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    found = by_name(examine_packages([]))["python"]
    assert (found.state, found.text) == ("amiss", "3.9.1 (wanted: >=3.11)")


def test_a_package_that_is_not_installed_itself() -> None:
    assert by_name(examine_packages(None))["nanochat_x"].state == "amiss"


def test_tools_that_are_missing_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_compiler() -> str:
        raise LoweringError("no C++ compiler found", remedy="install one")

    def tool(name: str) -> str:
        if name == "cmake":
            raise RunnerError("cmake was not found", remedy="pip install cmake")
        return str(broken)

    broken = tmp_path / "ninja"
    broken.write_text("#!/bin/sh\necho oh dear >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(doctor, "find_compiler", no_compiler)
    monkeypatch.setattr(doctor, "find_tool", tool)
    found = by_name(examine_tools([Pin("cmake", "~=4.4", None), Pin("ninja", "~=1.13", None)]))
    assert found["C++ compiler"] == Finding("tools", "C++ compiler", "amiss", "no C++ compiler found", "install one")
    assert (found["cmake"].state, found["cmake"].mend) == ("amiss", "pip install 'cmake~=4.4'")
    assert found["ninja"].state == "amiss"
    assert "does not start: oh dear" in found["ninja"].text


def test_targets_that_cannot_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Onnx:
        @staticmethod
        def make_target(*, will_run: bool) -> None:
            raise LoweringError("the target onnx needs onnxscript", remedy="pip install 'nanochat_x[onnx]'")

    def import_module(name: str) -> Any:
        if name.endswith("executorch"):
            raise ImportError("libfoo.so: cannot open shared object file")
        return Onnx if name.endswith("onnx") else real(name)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", import_module)
    found = by_name(examine_lowering())
    assert found["aoti"].state == found["torchscript"].state == "ok"
    assert (found["onnx"].state, found["onnx"].mend) == ("missing", "pip install 'nanochat_x[onnx]'")
    assert (found["executorch"].state, found["executorch"].mend) == (
        "amiss",
        "pip install --force-reinstall executorch",
    )


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (OSError("libtorch_cpu.so: cannot open shared object file"), "torch"),
        (ImportError("cannot import name '_C'", name="torch._C"), "torch"),
        (ModuleNotFoundError("No module named 'torchao'", name="torchao"), "executorch"),
    ],
)
def test_packages_that_are_broken(error: Exception, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> NoReturn:
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)
    found = by_name(examine_lowering())["executorch"]
    assert (found.state, found.mend) == ("amiss", f"pip install --force-reinstall {package}")
    assert str(error) in found.text


def test_runners_that_are_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CMake itself is asked whether they could be; nothing is built, nothing is left behind."""
    monkeypatch.setenv("NANOCHAT_X_BUILD_DIR", str(tmp_path / "build"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    found = by_name(examine_running())
    assert list(found) == list(PROGRAMS)
    for finding in found.values():
        assert (finding.state, finding.mend) == ("missing", "nanochat_x build-runners")
    assert list(tmp_path.iterdir()) == [scratch]
    assert list(scratch.iterdir()) == []


def test_runners_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_built", lambda target: None)
    reason = "OnnxRuntime was not found: run scripts/system-deps.sh"
    monkeypatch.setattr(doctor, "why_not_buildable", lambda: {"onnx": reason, "executorch": "not found: pip install"})
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "executorch" else "1.0")
    found = by_name(examine_running())
    assert found["onnx"] == Finding("running", "onnx", "amiss", "its runner cannot be built", reason)
    assert found["executorch"].state == "missing"

    def fail() -> dict[str, str]:
        raise RunnerError("PCRE2 is missing: apt-get install libpcre2-dev", remedy="see a log that is gone")

    monkeypatch.setattr(doctor, "why_not_buildable", fail)
    (finding,) = examine_running()
    assert (finding.state, finding.text) == ("amiss", "cannot be built: PCRE2 is missing: apt-get install libpcre2-dev")
    assert "gone" not in finding.mend


def test_a_runner_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nanochat-aoti"
    program.write_text("#!/bin/sh\necho 'error while loading shared libraries: libtorch_cpu.so' >&2\nexit 127\n")
    program.chmod(0o755)
    monkeypatch.setattr(doctor, "find_built", lambda target: RunnerBuild(program, tmp_path))
    for finding in examine_running():
        assert finding.state == "amiss"
        assert "libtorch_cpu.so" in finding.text
        assert finding.mend == "nanochat_x build-runners"


def site_without(tmp_path: Path, *left_out: str) -> list[str]:
    """A Python whose packages are this one's dependencies but those: the interpreter without its site folder."""
    site = tmp_path / "site"
    site.mkdir()
    root = Path(doctor.__file__).parent
    (site / "nanochat_x").symlink_to(root)
    for name in ("click", "filelock", "rich"):
        package = Path(str(distribution(name).locate_file(name)))
        (site / name).symlink_to(package)
    (site / "nanochat_x.dist-info").mkdir()
    # Run from the repository, Python may find the egg-info that a build left there.
    metadata = distribution("nanochat_x").read_text("METADATA") or distribution("nanochat_x").read_text("PKG-INFO")
    assert metadata
    (site / "nanochat_x.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from nanochat_x.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-S", "-c", code]


def test_without_torch(tmp_path: Path) -> None:
    """Said, with the command that brings it; nothing of it is imported."""
    done = subprocess.run([*site_without(tmp_path), "doctor"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    at = lines.index("amiss   torch         not installed (wanted: ==2.13.0)")
    assert lines[at + 1] == "-> pip install 'torch==2.13.0'"
    assert "missing aoti          needs torch" in lines
    assert any(line.startswith("amiss   runners       cannot be built: the runner needs torch") for line in lines)


# --- a bundle


def test_a_good_bundle(demo_bundle: Path) -> None:
    found = list(examine_bundle(demo_bundle))
    assert [(finding.name, finding.state) for finding in found] == [
        (name, "ok") for name in ("manifest", "files", "runner", "platform", "architecture", "CPU", "torch", "machine")
    ]
    assert all(finding.mend == "" for finding in found)


@pytest.mark.parametrize("target", [target for target in PROGRAMS if target != "aoti"])
def test_a_good_bundle_of_another_target(target: str, lowered: Callable[..., Path]) -> None:
    found = list(examine_bundle(lowered("2026-07-smear", target)))
    assert {finding.state for finding in found} == {"ok"}
    assert found[-1].text == "this machine can run it"


def spoilt(bundle: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Finding]:
    """What is amiss after a change of the manifest."""
    edit_manifest(bundle, change)
    return {finding.name: finding for finding in examine_bundle(bundle) if finding.state == "amiss"}


@pytest.mark.parametrize(
    ("key", "value", "name", "text", "mend"),
    [
        ("platform", "beos", "platform", 'was lowered for "beos"', "nanochat_x lower"),
        ("architecture", "riscv64", "architecture", 'was lowered for "riscv64"', "nanochat_x lower"),
        ("cpu_features", ["avx2", "avx1024f"], "CPU", "with avx1024f, which this machine lacks", "lower"),
        ("torch_version", "2.1.0", "torch", "was lowered with torch 2.1.0", "lower it again with that torch"),
        ("runtime_version", "99.0", "runtime", "needs version 99.0 or newer", "update the runtime"),
    ],
)
def test_what_does_not_fit_this_machine(
    key: str, value: object, name: str, text: str, mend: str, copied_bundle: Path
) -> None:
    found = spoilt(copied_bundle, lambda manifest: manifest["machine"].update({key: value}))
    assert list(found) == [name]
    assert text in found[name].text
    assert mend in found[name].mend


def test_all_that_does_not_fit_is_told(copied_bundle: Path) -> None:
    found = spoilt(copied_bundle, lambda m: m["machine"].update(architecture="riscv64", cpu_features=["zvfh"]))
    assert list(found) == ["architecture", "CPU"]


def test_files_that_were_changed_or_lost(copied_bundle: Path) -> None:
    change_byte(copied_bundle / "weights.safetensors")
    (copied_bundle / "full.so").unlink()
    amiss = [finding for finding in examine_bundle(copied_bundle) if finding.state == "amiss"]
    assert {finding.text for finding in amiss if finding.name == "files"} == {
        "weights.safetensors: changed since it was written (SHA-256 differs)", "full.so: missing",
    }  # fmt: skip
    assert amiss[-1].name == "machine"
    assert "the runner refuses it" in amiss[-1].text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(schema_version=4), "has schema 4, this program reads 3"),
        (lambda m: m.pop("machine"), "machine is missing or mistyped"),
    ],
)
def test_a_manifest_that_cannot_be_read(
    change: Callable[[dict[str, Any]], object], text: str, copied_bundle: Path
) -> None:
    found = spoilt(copied_bundle, change)
    assert list(found) == ["manifest"]
    assert text in found["manifest"].text
    assert found["manifest"].mend


def test_other_manifests(copied_bundle: Path) -> None:
    assert "none for the target 'tpu'" in spoilt(copied_bundle, lambda m: m.update(target="tpu"))["runner"].text
    assert "list is malformed" in spoilt(copied_bundle, lambda m: m.update(target="aoti", files=[1]))["files"].text
    (copied_bundle / "manifest.json").write_text("{")
    (finding,) = examine_bundle(copied_bundle)
    assert "is not readable JSON" in finding.text


def test_a_target_whose_runner_is_not_built(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_X_BUILD_DIR", str(tmp_path))
    found = by_name(examine_bundle(demo_bundle))
    assert (found["runner"].state, found["runner"].mend) == ("amiss", "nanochat_x build-runners")
    assert "machine" not in found
    assert list(tmp_path.iterdir()) == []


def test_a_runner_that_does_not_start_is_not_asked(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor_bundle, "find_built", lambda target: RunnerBuild(tmp_path / "nanochat-aoti", tmp_path))
    found = by_name(examine_bundle(demo_bundle))
    assert "does not start: No such file" in found["runner"].text
    assert "machine" not in found


def test_an_obstacle_that_no_check_tells() -> None:
    info = {"checks": [], "runs_here": False, "obstacle": "the moon"}
    (finding,) = findings_of_info(info)
    assert (finding.state, finding.text) == ("amiss", "cannot run it: the moon")


def test_the_command_line_on_a_bundle(copied_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(copied_bundle, lambda m: m["machine"].update(cpu_features=["avx1024f"], march="future"))
    assert main(["doctor", str(copied_bundle), "--json"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["ok"] is False
    at = next(i for i, line in enumerate(lines) if "avx1024f" in line)
    assert lines[at].split()[:2] == ["amiss", "CPU"]
    assert "-> " in lines[at + 1]


@pytest.mark.parametrize("what", ["nothing", "folder", "file"])
def test_a_path_that_is_no_bundle(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    if what == "folder":
        path.mkdir()
    if what == "file":
        path.write_text("x")
    assert main(["doctor", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    with pytest.raises(BundleError):
        list(examine_bundle(path))


def test_what_a_manifest_says_does_not_reach_the_terminal_raw(copied_bundle: Path) -> None:
    edit_manifest(copied_bundle, lambda m: m.update(dtype="\x1b[31mred", nanochat_x_version="\x07"))
    text = "\n".join(lines_of(examine_bundle(copied_bundle)))
    assert "\x1b" not in text
    assert "\x07" not in text


def test_headings() -> None:
    findings = [Finding("a", "x", "ok", "fine"), Finding("a", "y", "amiss", "bad", "mend it"),
                Finding("b", "z", "missing", "none")]  # fmt: skip
    assert list(lines_of(findings)) == [
        "a", "  ok      x             fine", "  amiss   y             bad", "                        -> mend it",
        "b", "  missing z             none",
    ]  # fmt: skip
    assert shutil.which("sh"), "the fake programs above are scripts"
