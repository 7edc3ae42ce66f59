"""The search for the best options of torch.compile: its order, what is kept, children that fail, what a run makes."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

CPU = torch.device("cpu")
SETS = [{"set": name} for name in ("fine", "fast", "fails", "hangs")]

# The child of a test: what it does depends on its set of options.
CHILD = """
import json, sys, time
job, answer = sys.argv[1:]
told = json.load(open(job))
n, name = told["case"]["n"], told["options"]["set"]
print(f"child of {name}", flush=True)
if name == "fails":
    print("the compiler\\nran out of luck", file=sys.stderr)
    sys.exit(3)
if name == "hangs":
    time.sleep(60)
ms = {"fine": 2.0, "fast": 1.0, "missing": None}[name]
status = "missing" if name == "missing" else "ok"
outcome = {"key": {"n": n}, "options": told["options"], "status": status, "ms": ms, "error": 1e-3, "took_s": 0.1,
           "reason": "no package" if ms is None else "", "when": "2031-01-02"}
json.dump(outcome, open(answer, "w"))
"""


@pytest.fixture
def search(module, monkeypatch):
    """search.py with children that take no time to speak of."""
    made = module("gpu_check.search")
    monkeypatch.setattr(made, "command", lambda job, answer: [sys.executable, "-S", "-c", CHILD, str(job), str(answer)])
    monkeypatch.setattr(made, "key", lambda case, *_: {"n": case.n})
    monkeypatch.setattr(made, "SHORTEST", 0.1)
    return made


@pytest.fixture
def findings(module, tmp_path):
    """() -> the findings of a run that keeps its files in tmp_path."""

    def make():
        return module("gpu_check.findings").Findings(
            "search", tmp_path / "search.json", CPU, rehearsal=True, minutes=None
        )

    return make


def test_every_case_gets_its_first_set_before_any_gets_its_second(module, search, findings, tmp_path):
    cases = search.wanted("tutorial:64,ddpm-cifar10-32:1")
    store = module("compile_options").Store([tmp_path / "theirs.json", tmp_path / "baselines.json"])
    told = findings()
    search.search(told, cases, SETS[:3], store, 20.0, None)
    outcomes = json.loads((tmp_path / "baselines.json").read_text())["outcomes"]
    assert [(o["key"]["n"], o["options"]["set"], o["status"]) for o in outcomes] == [
        (64, "fine", "ok"), (1, "fine", "ok"), (64, "fast", "ok"), (1, "fast", "ok"), (64, "fails", "failed"),
        (1, "fails", "failed"),
    ]  # fmt: skip
    assert outcomes[-1]["reason"] == "exit code 3: ran out of luck"
    assert told.failures == []
    assert "child of fast" in (tmp_path / "search.children.log").read_text()
    assert json.loads((tmp_path / "search.json").read_text())["outcomes"] == outcomes
    lines = search.table(cases, SETS[:3], store, CPU)
    assert lines[1].split()[5] == "1.000"  # the fastest first
    assert lines[4].strip().endswith("3 of 3 sets tried")
    # A later call goes on where this one stopped, and finds nothing to do.
    again = module("compile_options").Store([tmp_path / "theirs.json", tmp_path / "baselines.json"])
    assert list(search.untried(cases, SETS[:3], again, CPU, 20.0)) == []
    assert [options["set"] for _, options in search.untried(cases, SETS, again, CPU, 20.0)] == ["hangs", "hangs"]


def test_a_set_that_hangs_is_ended_and_tried_again_only_with_more_time(module, search, findings, tmp_path):
    cases, store = search.wanted("tutorial:1"), module("compile_options").Store([tmp_path / "baselines.json"])
    search.search(findings(), cases, [SETS[3], SETS[0]], store, 0.5, None)
    hung, fine = store.outcomes({"n": 1})
    assert (hung["status"], hung["ms"]) == ("out of time", None)
    assert hung["reason"].startswith("out of time after ")
    assert fine["status"] == "ok"
    assert list(search.untried(cases, [SETS[3]], store, CPU, 1.2 * hung["took_s"])) == []
    assert len(list(search.untried(cases, [SETS[3]], store, CPU, 1.3 * hung["took_s"]))) == 1


def test_what_is_cut_off_by_the_end_of_the_run_is_not_held_against_it(module, search, findings, tmp_path):
    cases, store = search.wanted("tutorial:1"), module("compile_options").Store([tmp_path / "baselines.json"])
    told = findings()
    search.search(told, cases, [SETS[3], SETS[0]], store, 30.0, 0.01)
    assert store.outcomes({"n": 1}) == []
    assert "cut off after" in told.not_done[0]
    assert told.not_done[1].endswith("no time left")


def test_a_network_without_its_package_is_not_an_outcome(module, search, findings, tmp_path):
    cases, store = search.wanted("ddpm-cifar10-32:1"), module("compile_options").Store([tmp_path / "baselines.json"])
    told = findings()
    search.search(told, cases, [{"set": "missing"}, {"set": "fine"}], store, 20.0, None)
    assert store.outcomes({"n": 1}) == []
    assert told.not_done == ["ddpm-cifar10-32: no package"]  # said once, tried once


def test_the_childs_part(module, tiny, monkeypatch, tmp_path):
    search, inductor = module("gpu_check.search"), module("inductor")
    seen = []

    def compiled(step, options, problem):
        seen.append(options)
        if "bad" in options:
            raise RuntimeError("no such option\nat all")
        return step

    monkeypatch.setattr(inductor, "compiled", compiled)
    job, answer = tmp_path / "job.json", tmp_path / "outcome.json"
    case = tiny().case
    told = {"name": case.name, "n": 2, "shape": [3, 8, 8], "network": case.network, "options": dict(case.options)}
    job.write_text(json.dumps({"case": told, "options": {"good": True}, "device": "cpu"}))
    assert search.main(["--out", str(answer), "--job", str(job)]) == 0
    outcome = json.loads(answer.read_text())
    assert (outcome["status"], outcome["options"]) == ("ok", {"good": True})
    assert outcome["ms"] > 0
    assert outcome["error"] < 3e-2
    assert outcome["key"] == module("compile_options").key(case, torch.bfloat16, CPU)
    failed = search.attempt(case, {"bad": 1}, CPU)
    assert (failed["status"], failed["ms"]) == ("failed", None)
    assert failed["reason"] == "bad=1: RuntimeError: no such option"
    assert seen == [{"good": True}, {"bad": 1}]
    monkeypatch.setattr(module("plain").PlainUNet, "__init__", missing(module))
    assert search.attempt(case, {"good": True}, CPU)["status"] == "missing"


def missing(module):
    def fail(*_):
        raise module("packages").Missing("not installed; pip install it")

    return fail


def test_an_outcome_holds_for_one_network_one_batch_and_one_software(module, tiny, monkeypatch):
    options, candidate = module("compile_options"), module("candidate")
    case = tiny().case
    first = options.key(case, torch.bfloat16, CPU)
    assert first == options.key(case, torch.bfloat16, CPU) == json.loads(json.dumps(first))
    others = [
        options.key(case, torch.float32, CPU),
        options.key(candidate.Case("tiny", 3, case.shape, options=case.options), torch.bfloat16, CPU),
        options.key(candidate.Case("tiny", 2, case.shape, options={"width": 8}), torch.bfloat16, CPU),
        options.key(candidate.Case("tiny", 2, (3, 8, 16), options=case.options), torch.bfloat16, CPU),
    ]
    monkeypatch.setattr(options, "_source", lambda: "another")
    others.append(options.key(case, torch.bfloat16, CPU))
    assert first not in others


def test_the_options_are_inductors(module):
    import torch._inductor.config as config

    sets = module("compile_options").for_gpu()
    assert len(sets) == len({json.dumps(options) for options in sets}) == 8
    for options in sets:
        with config.patch(**options):  # raises for a name that is none
            assert config.max_autotune
    assert [set_["freezing"] for set_ in sets[:4]] == [False, False, False, True]
    assert sets[0]["max_autotune_conv_backends"] == "ATEN"
    assert all(name in sets[0] for name in module("gpu_check.search").DIFFERENT)


@pytest.fixture
def on_gpu(module, monkeypatch):
    """(outcomes, *which cannot be built) -> C16 made as on a GPU, and the sets that were built in turn."""
    inductor, options = module("inductor"), module("compile_options")
    monkeypatch.setattr(inductor, "key", lambda *_: {"n": 1})
    monkeypatch.setattr(inductor, "for_gpu", lambda: SETS)
    monkeypatch.setattr(inductor, "check", lambda *_: (1e-3, "ok"))
    monkeypatch.setattr(inductor.Compiled, "_once", lambda self: 1e-3)

    def make(tmp_path, outcomes, *broken):
        built = []

        def build(self, network, chosen):
            built.append(chosen["set"])
            if chosen["set"] in broken:
                raise RuntimeError("no")
            self.step, self.captured = chosen["set"], None

        monkeypatch.setattr(inductor.Compiled, "build", build)
        store = options.Store([tmp_path / "baselines.json"])
        for name, status, ms in outcomes:
            store.add({"key": {"n": 1}, "options": {"set": name}, "status": status, "ms": ms, "error": 1e-3,
                       "took_s": 9.0, "reason": "", "when": "2031-01-02"})  # fmt: skip
        monkeypatch.setattr(inductor.Compiled, "found", store)
        made = inductor.Compiled()
        made.problem = types.SimpleNamespace(device=torch.device("cuda"), case=types.SimpleNamespace(n=1))
        network = types.SimpleNamespace(folds="", what="a network")
        made.step = made.make(network)
        return made, built

    return make


def test_a_run_builds_the_best_set_known_and_times_it_itself(on_gpu, tmp_path):
    known = [("fine", "ok", 2.0), ("fast", "inaccurate", 1.0), ("hangs", "out of time", None)]
    made, built = on_gpu(tmp_path, known)
    assert (made.step, built) == ("fine", ["fine"])  # an inaccurate one is the last resort
    assert "in a torch.cuda.CUDAGraph; torch._inductor.config: set=fine" in made.flags
    assert made.notes.startswith(
        "3 of 4 option sets, 2031-01-02, the best of which was compiled and timed anew: set=fine"
    )
    assert "set=hangs: out of time, no time" in made.notes


def test_without_a_search_the_first_set_is_built(on_gpu, tmp_path):
    made, built = on_gpu(tmp_path, [])
    assert (made.step, built) == ("fine", ["fine"])
    assert made.notes == "no search for the best of 4 option sets was made; the first that worked"


def test_what_does_not_build_gives_way_to_the_next(module, on_gpu, tmp_path):
    made, built = on_gpu(tmp_path, [("fast", "ok", 1.0), ("fine", "failed", None)], "fast", "fails")
    assert (made.step, built) == ("hangs", ["fast", "fails", "hangs"])  # what failed in the search is not built again
    assert "set=fast: RuntimeError: no" in made.notes
    with pytest.raises(module("packages").Missing, match=r"torch\.compile failed: set=fine: RuntimeError: no"):
        on_gpu(tmp_path / "b", [], "fine", "fast", "fails", "hangs")


def test_arguments_and_files_that_are_wrong(module, tmp_path, capsys):
    search, options = module("gpu_check.search"), module("compile_options")
    with pytest.raises(SystemExit):
        search.main(["--out", str(tmp_path / "a.json"), "--cases", "letters:1"])
    assert "NETWORK:N with NETWORK tutorial or ddpm-cifar10-32" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert search.main(["--out", str(tmp_path / "a.json")]) == 2
        assert "finds no NVIDIA GPU here; --rehearse" in capsys.readouterr().err
    assert [(case.network, case.n) for case in search.wanted(search.CASES)][:2] == [("tutorial", 64), ("tutorial", 1)]
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(options.Unreadable, match=r"b.json is no file of outcomes .* remove it"):
        options.Store([tmp_path / "b.json"])
