"""The benchmark: its baselines are right, a wrong one is caught, what does not fit is said, and the table is one."""

import importlib
import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import bench_fused_lens
import fused_lens
import gpu_goals
import pytest
import scaling
import torch
from harness import goal_table

from refinelens.bench import bench, measure
from refinelens.bench.bench import Setup, run_bench
from refinelens.bench.competitors import COMPETITORS, ROW_CHUNK, VOCAB_CHUNK
from refinelens.bench.measure import DoesNotRun, Fp64Check, extra_memory
from refinelens.bench.problem import can_measure_growth, make_problem, random_problem
from refinelens.bench.table import CheckResult, Report, Result, text_table
from refinelens.cli import main
from refinelens.errors import InputError
from refinelens.kernels.reference import LayerNorm, RMSNorm
from refinelens.view_config import BenchConfig

# One row and one token more than a chunk of the baselines; a prime d_model.
SHAPE = {"rows": ROW_CHUNK + 1, "d_model": 37, "vocab": VOCAB_CHUNK + 1}
TINY = ["--device", "cpu", "--rows", "33", "--d-model", "17", "--vocab", "301", "--rounds", "2"]
WEIGHT = torch.linspace(0.5, 1.5, 37)
NORMS = {
    "layer": LayerNorm(WEIGHT, WEIGHT - 1),
    "rms-offset": RMSNorm(WEIGHT, offset=1.0),
    "none": None,
}


def make_small(norm="layer"):
    """A problem in which some tokens are equal, so that ranks have ties."""
    problem = random_problem(**SHAPE, dtype=torch.float32, device="cpu")
    problem.unembedding[1000:1010] = problem.unembedding[0]
    problem.targets[:20] = torch.arange(995, 1015)
    return replace(problem, norm=NORMS[norm])


IN_PROCESS = Setup(extra_memory=None)  # a fresh process takes seconds


def run_tiny(baselines="none", replaced=None, **setup):
    """A report on the sizes of `TINY`; ``replaced`` are runs in place of competitors' own."""
    competitors = {n: replace(c, run=(replaced or {}).get(n, c.run)) for n, c in COMPETITORS.items()}
    setup = replace(IN_PROCESS, competitors=competitors, **setup)
    return run_bench(BenchConfig("cpu", 33, 17, 301, baselines=baselines, rounds=2), setup=setup)


@pytest.mark.medium
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [n for n, c in COMPETITORS.items() if c.group != "product"])
def test_every_competitor_agrees_with_fp64(name, norm, monkeypatch):
    compile_ = torch.compile  # inductor would take half a minute
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", **options))
    problem, competitor = make_small(norm), COMPETITORS[name]
    if competitor.obstacle(problem):
        pytest.skip(competitor.obstacle(problem))
    found = competitor.run(problem)
    verdict = Fp64Check(problem).judge(found, len(problem.hidden))
    assert verdict.wrong is None and verdict.rows == SHAPE["rows"] and verdict.argmax_off == 0
    assert {"target_rank", "entropy"} <= set(found)


def add(amount, rows=slice(None)):
    def change(values):
        values = values.clone()
        values[rows] += amount
        return values

    return change


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("entropy", add(1e-3), "entropy differs by 0.001"),
        ("logsumexp", add(float("nan"), rows=7), "logsumexp differs by nan"),
        ("target_logit", add(1.0, rows=-1), "target_logit differs by 1"),
        ("argmax", add(1, rows=3), "an argmax lies"),
        ("argmax", add(-(10**6), rows=3), "argmax lies outside the vocabulary"),
        ("target_rank", add(1, rows=30), "a rank differs by 1, near ties explain 0"),
        ("target_rank", add(30, rows=0), "a rank differs by 30, near ties explain"),
    ],
)
def test_a_wrong_statistic_is_caught(name, change, message):
    problem = make_small()
    found = COMPETITORS["naive"].run(problem)
    truth = Fp64Check(problem)
    assert truth.judge(found, len(problem.hidden)).wrong is None
    assert message in truth.judge(found | {name: change(found[name])}, len(problem.hidden)).wrong


def test_a_bound_that_is_returned_is_allowed_and_no_more():
    problem = make_small()
    found = COMPETITORS["naive"].run(problem)
    found["logsumexp"] = found["logsumexp"] + 1e-3
    bound = torch.full_like(found["logsumexp"], 1.1e-3)
    truth, rows = Fp64Check(problem), len(problem.hidden)
    assert truth.judge(found | {"logsumexp_bound": bound}, rows).wrong is None
    assert "logsumexp" in truth.judge(found | {"logsumexp_bound": bound / 2}, rows).wrong


def wrong_run(problem):
    found = COMPETITORS["naive"].run(problem)
    return found | {"target_rank": found["target_rank"] + 100}


def test_a_wrong_baseline_is_named_and_not_timed():
    report = run_tiny("row-chunks", {"row-chunks": wrong_run})
    lines = [line for line in text_table(report).splitlines() if "256 rows at a time" in line]
    assert len(lines) == 1 and lines[0].startswith("Left out: torch, 256 rows at a time: wrong: a rank differs by 100")
    assert report.failed == []


def test_a_wrong_op_has_failed():
    report = run_tiny(replaced={"reference": wrong_run})
    assert report.failed == ["refinelens, plain torch"]
    assert "Left out: refinelens, plain torch: wrong" in text_table(report)


def test_an_op_that_failed_is_exit_code_1(monkeypatch, capsys):
    report = run_tiny(replaced={"reference": wrong_run})
    monkeypatch.setattr(bench, "run_bench", lambda options, progress: report)
    assert main(["bench", *TINY, "--baselines", "none"]) == 1
    assert capsys.readouterr().out == text_table(report) + "\n"


def test_the_old_name_of_baselines_is_taken(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(bench, "run_bench", lambda options, progress: given.append(options) or run_tiny())
    assert main(["bench", *TINY, "--peers", "row-chunks"]) == 0
    assert given[0].baselines == "row-chunks" and capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "--baselines" in (text := capsys.readouterr().out) and "peers" not in text


def test_an_op_that_is_killed_has_failed():
    def killed(problem_file, name, rows, threads):
        raise DoesNotRun("does not fit into memory")

    report = run_tiny(extra_memory=killed)
    assert "refinelens, plain torch" in report.failed
    assert "Left out: refinelens, plain torch: does not fit into memory." in text_table(report)


def test_a_baseline_that_fails_is_left_out():
    def fail(problem):
        raise RuntimeError("no compiler\nand a long story")

    report = run_tiny("compiled", {"compiled": fail})
    assert report.failed == []
    assert "Left out: torch.compile of naive: RuntimeError: no compiler.\n" in text_table(report) + "\n"


def read_json(path):
    values = json.loads(path.read_text())
    for result in values["results"]:
        result["verdict"] = result["verdict"] and CheckResult(**result["verdict"])
    return Report(**values | {"results": [Result(**result) for result in values["results"]]})


def test_bench_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "Setup", lambda: IN_PROCESS)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["bench", *TINY, "--baselines", "row-chunks,argsort", "--json", str(tmp_path / "bench.json")]) == 0
        assert torch.get_num_threads() == 2, "what was set is restored"
    finally:
        torch.set_num_threads(threads)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("33 rows x 17 dimensions x 301 tokens, float32, random states.\n")
    report = read_json(tmp_path / "bench.json")
    assert text_table(report) + "\n" == captured.out
    names = {"reference", "naive", "row-chunks", "argsort", "mm"}
    assert names <= {result.name for result in report.results} <= names | {"fp32", "certified", "product"}
    for result in report.results:
        assert result.seconds > 0 and result.measured_rows == 33 and result.ratio > 0
        assert (result.verdict is None) == (result.group == "product")
    assert report.threads == 1 and report.rounds == 2 and report.failed == []


def test_triton_from_another_package(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("refinelens.machine.version", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert bench._versions("cuda")["Triton"] == "of a package of another name"


def test_two_threads_are_timed_by_wall_clock():
    report = run_bench(BenchConfig("cpu", 5, 8, 40, baselines="none", rounds=1, threads=2), setup=IN_PROCESS)
    assert (report.threads, report.clock) == (2, "wall clock")


def test_what_does_not_fit_is_measured_on_fewer_rows():
    there = 10 * 2 * COMPETITORS["naive"].logit_bytes * 301
    out = " ".join(text_table(run_tiny(available_memory=lambda device: there)).split())
    assert "torch, all logits (naive): measured on 10 of 33 rows" in out and "0 of 10" in out
    assert "plain torch: measured on" not in out, "what holds no logits of all rows needs no limit"
    report = run_tiny(available_memory=lambda device: 100)
    assert report.failed == [] and "Left out: torch, all logits (naive): does not fit" in text_table(report)


def test_what_takes_too_long_is_measured_on_fewer_rows():
    options = BenchConfig("cpu", 5, 8, 40, baselines="none", rounds=1)
    report = run_bench(options, setup=replace(IN_PROCESS, longest=0.0))
    assert {result.measured_rows for result in report.results} == {1}
    naive = report.result("naive")
    assert naive.seconds == pytest.approx(2 * 5 * 8 * 40 / naive.flops), "scaled to all rows"


@pytest.fixture
def problem_file(tmp_path):
    """Of 200 rows, whose logits are 24 MB."""
    torch.save(random_problem(200, 8, 30_000, torch.float32, "cpu"), tmp_path / "problem.pt")
    return tmp_path / "problem.pt"


@pytest.mark.skipif(not can_measure_growth(), reason="the system does not tell a process its peak memory")
def test_extra_memory_is_that_of_the_logits(problem_file, capsys):
    """Naive holds them several times; what the process of `extra_memory` does, in this one."""
    threads = torch.get_num_threads()
    try:
        measure._main(str(problem_file), "naive", "200", "1")
    finally:
        torch.set_num_threads(threads)
    assert 2 < int(capsys.readouterr().out) / (200 * 30_000 * 4) < 8


@pytest.mark.slow
@pytest.mark.skipif(not can_measure_growth(), reason="the system does not tell a process its peak memory")
def test_extra_memory_is_that_of_the_rows(problem_file):
    """In fresh processes; of a tenth of the rows it is less than a quarter; a process that fails says why."""
    naive = extra_memory(problem_file, "naive", 200, threads=1)
    assert 2 < naive / (200 * 30_000 * 4) < 8
    assert extra_memory(problem_file, "naive", 20, threads=1) < naive / 4
    with pytest.raises(DoesNotRun, match="KeyError: 'nobody'"):
        extra_memory(problem_file, "nobody", 20, threads=1)


def test_states_of_a_model(tiny_model):
    """Position by position with all layers of each, so that any first rows hold all layers."""
    problem = make_problem(BenchConfig("cpu", rows=4 * 150 + 1, model=str(tiny_model)))
    assert problem.hidden.shape == (601, 32) and problem.states == tiny_model.name
    targets = problem.targets[:600].view(150, 4)
    assert (targets == targets[:, :1]).all(), "one target for all layers of a position"
    found = COMPETITORS["naive"].run(problem)
    assert Fp64Check(problem).judge(found, 601).wrong is None
    with pytest.raises(InputError, match=r"``rows``: expected at most \d+ with ``model``"):
        make_problem(BenchConfig("cpu", rows=10**7, model=str(tiny_model)))


@pytest.mark.parametrize(
    "change, message",
    [
        (["--rows", "0"], "--rows: expected at least 1, got 0"),
        (["--threads", "-1"], "--threads: expected at least 1, got -1"),
        (["--baselines", "row-chunks,other"], "got 'other'"),
        (["--vocab", "9" * 12], "expected states and unembedding that fit into"),
        (["--model", "smollm2"], "--d-model: expected none beside --model"),
        (["--json", "no/such/folder/x.json"], "--json: expected a file in a folder that is there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(change, message, capsys):
    assert main(["bench", *TINY, *change]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("refinelens: ") and message in captured.err


def test_an_instruction_set_that_is_not_there_is_one_line(monkeypatch, capsys):
    pytest.importorskip("refinelens._C")
    monkeypatch.setenv("REFINELENS_ISA", "v9")
    for command in (["bench", *TINY], ["doctor"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("refinelens: REFINELENS_ISA: expected one of") and error.count("\n") == 1


@pytest.fixture(scope="module")
def report():
    return run_bench(BenchConfig("cpu", 5, 8, 40, baselines="none", rounds=1), setup=IN_PROCESS)


def test_one_table_with_aligned_columns(report):
    naive = replace(report.result("naive"), seconds=1.5, ratio=1.0, peak_share=None, extra_bytes=2_340_000)
    report = replace(report, results=[naive], peak=None, peak_flops=None, left_out={"Somebody": "not installed"})
    lines = text_table(report).splitlines()
    head, rule, row = lines[4:7]
    assert lines[2].endswith("peak not measured.") and set(rule) == {"-"} and len(head) == len(rule) == len(row)
    assert row.split()[-9:-7] == ["-", "2"] and " 1500 " in row
    assert lines[-1] == "Left out: Somebody: not installed."


def test_goals_are_met_not_met_or_not_measured(report):
    fast = replace(report.result("naive"), name="fp32", ratio=2.3, peak_share=0.5, extra_bytes=20_000_001)
    product = replace(fast, name="product", group="product", seconds=fast.seconds / 2, verdict=None, extra_bytes=None)
    found = fused_lens.numbers({"gpt2-13x256": replace(report, results=[fast, product], device="AMD")})
    goals = goal_table(fused_lens.GOALS, found)
    assert "| fp32: times faster than naive, 3328 rows | >= 2.3 | - | 2.3  | yes |" in goals
    assert "| fp32: share of the FMA peak, 3328 rows | >= 0.85 | - | 0.5  | no |" in goals
    assert "| fp32: extra memory, 3328 rows | <= 20 MB | - | 20 MB | no |" in goals
    assert "| fp32: times faster than naive, 416 rows | >= 2.3 | - | not measured | - |" in goals
    assert "| fp32: time over our own matrix product, 3328 rows | <= 1.05 | - | 2  | no |" in goals
    assert "| fp32: time over torch.mm on AMD, 3328 rows | <= 0.75 | - | not measured | - |" in goals
    mm = fused_lens.numbers({"a": replace(report, results=[fast, replace(product, name="mm")], device="AMD")})
    assert mm["a/fp32/over mm on AMD"] == 2 and mm["a/fp32/off"] == 0 and mm["a/mm/MB"] is None
    mm = fused_lens.numbers({"a": replace(report, results=[fast, replace(product, name="mm")], device="Intel")})
    assert "a/fp32/over mm on AMD" not in mm


def test_every_case_has_its_table(monkeypatch, capsys):
    """And one that cannot run here, the reason; a path of our own that is wrong is exit code 1."""
    cases = {"small": BenchConfig("cpu", 5, 8, 40, baselines="none", rounds=1), "other": BenchConfig("cpu", 5, 8, 40)}
    reports = {options: run_bench(cases["small"], setup=IN_PROCESS) for options in cases.values()}
    monkeypatch.setattr(fused_lens, "CASES", cases)
    monkeypatch.setattr(fused_lens, "ISA", {"other": "v9"})
    monkeypatch.setattr(fused_lens, "run_bench", reports.get)
    assert fused_lens.main() == 0
    out = capsys.readouterr().out
    assert out.startswith(f"small\n\n{text_table(reports[cases['small']])}\n\nother\n\nnot measured: ")
    reports[cases["small"]] = replace(reports[cases["small"]], failed=["refinelens, fused kernel"])
    assert fused_lens.main() == 1


class Timed:
    """A stand-in for the fixture of pytest-benchmark."""

    calls = 0

    def pedantic(self, call, rounds):
        self.calls = rounds
        call()


def test_what_is_wrong_is_not_timed():
    problem, benchmark, naive = make_small(), Timed(), COMPETITORS["naive"]
    check = Fp64Check(problem)
    with pytest.raises(pytest.fail.Exception, match="a rank differs by 100"):
        bench_fused_lens.time_if_right(benchmark, replace(naive, run=wrong_run), problem, check, rounds=3)
    assert benchmark.calls == 0
    for competitor in (naive, COMPETITORS["mm"]):  # which has nothing to check
        bench_fused_lens.time_if_right(benchmark, competitor, problem, check, rounds=3)
        assert benchmark.calls == 3


def test_every_competitor_of_every_case_is_a_test():
    assert ("gpt2-13x32-avx2", "fp32") in bench_fused_lens.TESTS or torch.cuda.is_available()
    assert {case for case, _ in bench_fused_lens.TESTS} == set(fused_lens.CASES)
    assert {name for _, name in bench_fused_lens.TESTS} == set(COMPETITORS)


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", ["batching", "certify", "layers", "long_sweep", "prefix", "ranks", "shares", "translators"]
)
def test_a_benchmark_names_what_is_there(name):
    """Too long to run here, it can still be imported: everything that it takes from the package has this name."""
    assert importlib.import_module(name).main


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert gpu_goals.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no CUDA device: not measured"
    assert lines.count("| GPT-2 13x8, graphed | <= 27 us | <= 22 us | not measured | - |") == 1
    assert all("| not measured | - |" in line for line in lines[5:]) and len(lines) == 5 + len(gpu_goals.GOALS)


def test_what_a_gpu_would_measure_names_what_is_there():
    pytest.importorskip("triton")
    steps = importlib.import_module("gpu_steps")
    measured = {f"{case.name}/{kind}" for case in steps.LARGE for kind in ("B", "chunked", "naive", "statistics")}
    measured |= {case.name for case in steps.FEW} | {f"{case.name}/graphed" for case in steps.FEW}
    beside = ("KL", "KL, capped", "JSD", "list", "with list", "8 targets")
    measured |= {f"{case.name}/{kind}" for case in steps.LARGE for kind in beside}
    measured |= {"memory", "argmax", "rank0", "bits", "places"}
    assert {goal.key for goal in gpu_goals.GOALS} <= measured


@pytest.mark.medium
@pytest.mark.usefixtures("drawn")
def test_scaling_writes_its_figure_and_numbers(tmp_path, monkeypatch, capsys):
    small = {"ROWS": 4, "D_MODEL": 8, "VOCAB": 50, "ROUNDS": 1, "ODD_ROUNDS": 1, "NAMES": ("fp32", "naive")}
    small["AXES"] = {"rows": (2, 4), "d_model": (8, 16), "vocab": (32, 64)}
    for name, value in small.items():
        monkeypatch.setattr(scaling, name, value)
    scaling.main(tmp_path)
    out = capsys.readouterr().out
    assert "vocab 50257 against 50304: " in out and "2 threads: " in out and out.count("\n") == 7
    lines = (tmp_path / "scaling.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 2 + 3 * 2 + 2
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
