"""The command line: exit codes, one-line errors, what reaches the demo."""

import importlib
import sys
import types
import warnings
from pathlib import Path

import pytest

from ddpm_fast import cli, demo
from ddpm_fast.commands import bench


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert all(f"\n    {command}" in text for command in cli.COMMANDS)
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "ddpm-fast demo --out here --device cuda" in text
    assert all(option in text for option in ("--out", "--seed", "--device", "--seconds", "--train-steps", "--quiet"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: {train,sample,eval,info,bench,demo}"),
        ("fly", "invalid choice: 'fly'"),
        ("demo --seed x", "argument --seed: invalid int value: 'x'"),
        ("demo --wat", "unrecognized arguments: --wat"),
        ("demo --seed -1 --out {out}", "--seed must be in 0..2^63-1, got -1"),
        ("demo --seconds -1 --out {out}", "--seconds must be a positive number of seconds, got -1.0"),
        ("demo --device cuda:99 --out {out}", "sees"),
        ("demo --device tpu --out {out}", "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("demo --out {file}/below", "cannot be written to"),
    ],
)
def test_bad_lines_are_one_line_and_exit_2(tmp_path, capsys, line, message):
    if "--out" in line:  # what the demo lacks it says first
        for package in ("sklearn", "safetensors"):
            pytest.importorskip(package, reason="pip install 'ddpm_fast[demo]'")
    file = tmp_path / "file"
    file.write_text("")
    assert cli.main(line.format(out=tmp_path / "out", file=file).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddpm-fast")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "missed", "code", "stream"),
    [
        ([], [], 0, None),
        ([], ["recognised 94.0 %"], 1, "err"),
        (["--seconds", "500"], ["recognised 94.0 %"], 1, "err"),
        (["--seconds", "3"], ["recognised 94.0 %"], 0, "out"),
        (["--train-steps", "3"], ["recognised 94.0 %"], 0, "out"),
    ],
)
def test_exit_code_of_a_missed_bar(monkeypatch, capsys, tmp_path, options, missed, code, stream):
    seen = []

    def run(settings):
        seen.append(settings)
        return {"missed": missed}

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo", "--out", str(tmp_path), "--seed", "5", "--device", "cpu", "--quiet", *options]) == code
    assert (seen[0].out, seen[0].seed, seen[0].device, seen[0].progress) == (tmp_path, 5, "cpu", False)
    captured = capsys.readouterr()
    if stream is not None:
        assert "recognised 94.0 %" in getattr(captured, stream)


def test_the_default_line_is_the_default_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda settings: seen.append(settings) or {"missed": []})
    assert cli.main(["demo"]) == 0
    assert seen == [demo.Settings(out=seen[0].out)]
    assert str(seen[0].out) == "demo"


def lines(text):
    """The command lines in a help text or on a page, without the comments behind two spaces or a #."""
    found = [line.strip() for line in text.splitlines()]
    found = [line[line.index("ddpm-fast) ") + 11 :] if "ddpm-fast) " in line else line for line in found]
    found = [line.removeprefix("ddpm-fast ") for line in found if line.startswith(("ddpm-fast ", *cli.COMMANDS))]
    return [line.split("  ")[0].split(" #")[0] for line in found if line.split()[0] in cli.COMMANDS]


def examples():
    found = lines(cli.EXAMPLES)
    for name in cli.COMMANDS:
        module = importlib.import_module(f"ddpm_fast.commands.{cli._module(name)}")
        found += lines(getattr(module, "EXAMPLES", ""))
    page = Path(__file__).parents[1] / "docs" / "command_line.md"
    return sorted({*found, *(line for line in lines(page.read_text(encoding="utf-8")) if "|" not in line)})


@pytest.mark.parametrize("line", examples())
def test_printed_examples_are_lines_that_are_understood(line):
    arguments = cli._parser(line.split()).parse_args(line.split())
    assert callable(arguments.run)


def test_every_command_has_examples():
    assert {line.split()[0] for line in examples()} == cli.COMMANDS.keys()


def test_info_is_python_m_ddpm_fast(monkeypatch):
    module = types.ModuleType("ddpm_fast.__main__")
    module.main = lambda: 0
    monkeypatch.setitem(sys.modules, "ddpm_fast.__main__", module)
    assert cli.main(["info"]) == 0
    module.main = lambda: 3
    assert cli.main(["info"]) == 3


def test_warnings_and_errors_of_a_command_are_lines(monkeypatch, capsys):
    def run(arguments):
        warnings.warn("one\n  two", stacklevel=1)
        raise ValueError("three\nfour")

    monkeypatch.setattr("ddpm_fast.commands.info.run", run)
    shown = warnings.showwarning
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "ddpm-fast info: warning: one two\nddpm-fast info: error: three four\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "ddpm-fast info: error: three four [process 1]\n"
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="three"):
        cli.main(["info"])
    assert warnings.showwarning is shown


def test_ctrl_c_is_one_line(monkeypatch, capfd):
    def run(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_fast.commands.info.run", run)
    assert cli.main(["info"]) == 130
    assert capfd.readouterr().err == "ddpm-fast info: interrupted\n"


def test_bench_runs_the_script_of_the_checkout(capfd):
    assert cli.main(["bench", "--help"]) == 0
    shown = capfd.readouterr().out
    assert "--only {ops,sampler,paper,lucidrains,variants,drift,training,host}" in shown
    assert cli.main(["bench", "--n", "many"]) == 2


def test_bench_without_a_checkout_says_where_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "ddpm_fast" / "commands" / "bench.py"))
    assert cli.main(["bench"]) == 2
    assert "clone the repository" in capsys.readouterr().err
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").write_text("import sys; sys.exit(len(sys.argv))")
    assert cli.main(["bench", "--quick", "--variants"]) == 3
