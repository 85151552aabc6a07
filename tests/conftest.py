"""Set-up shared by all tests; the environment comes before the first import of torch and Triton.

What is slow to make has session scope also where one file alone needs it: a process that gave tests of a file away may
come back to it.
"""

import json
import os
import signal
from contextlib import contextmanager

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
from browser import browser

from lanes import pytest_runtest_call, pytest_terminal_summary  # noqa: F401 - what is measured of every test

# A shell starts what it runs in the background deaf to Ctrl-C, and processes that tests start would be so too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """What must be so before a test is read. A process that hands tests out to others reads none: it needs no torch."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if not is_worker and config.getoption("dist", "no") != "no":
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    config.cores = torch.get_num_threads()
    # There may be such a process per core, and forked ones, which have one thread, are held to this one bit for bit.
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Files whose tests need the fork_server come first: one process has them all, as others take over from the end.

    Such tests are medium: what they take is that of processes that they do not wait for.
    """
    for item in items:
        if "fork_server" in item.fixturenames:
            item.add_marker("medium")
    forking = {item.path for item in items if "fork_server" in item.fixturenames}
    items.sort(key=lambda item: item.path not in forking)


@pytest.fixture(scope="session")
def chromium():
    """A browser; there can be one in a process."""
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def every_core(pytestconfig):
    """For what is about the op, which starts as many threads as torch has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(pytestconfig.cores)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """Sets how many threads torch has, for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random GPT-2 with a word-level tokenizer that knows the words of `questions`."""
    from tiny import save_tiny_model  # needs transformers, which the tests of the kernels alone do without

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def question_file(tmp_path_factory):
    """Six questions in the Lost in the Middle format; answers of one, two and three words."""
    places = ["arven", "brosk", "calmi", "dorra", "elska", "fenta"]
    answers = ["red", "blue stone", "green", "black iron gate", "white", "brown"]
    path = tmp_path_factory.mktemp("task") / "questions.jsonl"
    with path.open("w") as file:
        for place, answer in zip(places, answers, strict=True):
            gold = {"title": place, "text": f"the door of {place} is {answer} .", "hasanswer": True, "isgold": True}
            record = {"question": f"what is the door of {place} ?", "answers": [answer], "ctxs": [gold]}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def many_questions(question_file, tmp_path_factory):
    """18 questions: those of `question_file` about three kinds of doors."""
    path = tmp_path_factory.mktemp("many") / "task.jsonl"
    lines = question_file.read_text().splitlines()
    words = ("given", "high", "quality")
    path.write_text("\n".join(line.replace(" door", f" {word} door") for word in words for line in lines))
    return path


@pytest.fixture(scope="session")
def fork_server(tiny_model, question_file, tmp_path_factory):
    """Runs sweeps of the tiny model, or of any GPT-2, in processes that may be killed."""
    from faults import ForkServer

    sweep = ["sweep", "--model", tiny_model, "--task", question_file, "--documents", "2", "--device", "cpu"]
    with ForkServer(*sweep, "--out", tmp_path_factory.mktemp("fork_server") / "run") as fork_server:
        yield fork_server


@pytest.fixture(scope="session", autouse=True)
def drawing():
    """Reports' figures get no panels, none is drawn, which takes longer than all else, but for ``with drawing():``."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # the tests of the kernels alone do without
        yield None
        return
    from faults import panels_stand_in, save_stand_in

    own = Figure.savefig, Figure.subplots
    stand_ins = save_stand_in, panels_stand_in(Figure.subplots)

    def use(functions):
        Figure.savefig, Figure.subplots = functions

    @contextmanager
    def draw():
        use(own)
        try:
            yield
        finally:
            use(stand_ins)

    use(stand_ins)
    yield draw
    use(own)


@pytest.fixture
def drawn(drawing):
    """For a test that is about figures."""
    with drawing():
        yield


@pytest.fixture
def refused_sweep(question_file, tmp_path, capfd):
    """Runs a sweep with a lens and returns the line it ends in, which must be one, with exit code 2 and no run."""
    from refinelens.cli import main

    def run(lens, model):
        arguments = ["--model", str(model), "--task", str(question_file), "--documents", "2", "--device", "cpu"]
        assert main(["sweep", *arguments, "--lens", str(lens), "--out", str(tmp_path / "run")]) == 2
        captured = capfd.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("refinelens: --lens") and not captured.out, captured
        assert not (tmp_path / "run").exists()
        return lines[0]

    return run


@pytest.fixture
def no_model():
    """Fails the test if a model is loaded: torch tells of every module that becomes part of another."""
    from torch.nn.modules.module import register_module_module_registration_hook

    hook = register_module_module_registration_hook(lambda *_: pytest.fail("a model was loaded"))
    yield
    hook.remove()
