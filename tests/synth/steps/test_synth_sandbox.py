"""Code that models wrote: what it is worth, and that it can do nothing else."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError, SynthError
from posttrain.synth import Drop, Verify
from posttrain.synth.steps import sandbox
from posttrain.synth.steps.sandbox import run

pytestmark = pytest.mark.skipif(sandbox.unavailable() is not None, reason=str(sandbox.unavailable()))


def score(answer: str, tests: Any, **options: Any) -> Any:
    row = {"prompt": "p", "response": answer, "tests": tests}
    (made,) = Verify(function="code", options={"seconds": 20, **options}).fold(row, [])
    return (made.reason, made.detail) if isinstance(made, Drop) else made["score"]


def test_code_is_worth_the_tests_that_it_passes() -> None:
    right = "Here:\n```python\ndef double(x):\n    return 2 * x\n```\nThat is all."
    wrong = right.replace("2 * x", "x + 2")
    tests = ["assert double(2) == 4", "assert double(5) == 10", "assert double(0) == 0"]
    assert score(right, tests) == score(right, "\n".join(tests)) == 1
    assert score(wrong, tests) == score("no code", tests) == 0
    assert score(wrong, tests, partial=True) == pytest.approx(1 / 3)
    assert score("```python\nimport numpy\n```", "assert numpy.ones(3).sum() == 3") == 1


def test_programs_that_read_and_print_are_compared_with_what_is_expected() -> None:
    cases = [{"input": "3 4\n", "output": "7\n"}, {"input": "1 1", "output": "2"}]
    adds = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    assert score(adds, cases) == 1
    assert score(adds.replace("a + b", "7"), cases) == 0
    assert score(adds.replace("a + b", "7"), cases, partial=True) == 0.5


@pytest.mark.parametrize("trick", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()"])
def test_an_answer_that_ends_before_its_tests_has_passed_none(trick: str) -> None:
    assert score(f"```python\n{trick}\n```", "assert False") == 0
    assert not run(("answer.py", trick), seconds=20).ended


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-in-the-environment")
    (tmp_path / "secret").write_text("sk-in-a-file")
    return tmp_path / "secret"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', {port}))", "PermissionError"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')", "not permitted"),
        ("print(open({path!r}).read())", "PermissionError"),
        ("print(open('/proc/{pid}/environ').read())", "PermissionError"),
        ("print(open('/etc/passwd').read())", "PermissionError"),
        ("open({path!r}, 'w')", "PermissionError"),
        ("open('here', 'w')", "PermissionError"),
        ("import os; os.unlink({path!r})", "PermissionError"),
        ("import os; os.mkdir('/tmp/made-by-an-answer')", "PermissionError"),
        ("import os; os.listdir('/')", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['/bin/ls'])", "PermissionError"),
        ("import os; os.kill({pid}, 9)", "PermissionError"),
        ("import os; os.setsid()", "PermissionError"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("while True: print('x' * 10000)", "File too large"),
    ],
)
def test_code_can_do_nothing_but_compute(source: str, said: str, secret: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        given = {"port": listening.getsockname()[1], "path": str(secret), "pid": os.getpid()}
        ran = run(("answer.py", source.format(**given)), seconds=20)
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert not ran.ended
    assert said in ran.error
    assert "sk-in" not in ran.out
    assert secret.read_text() == "sk-in-a-file"
    assert not Path("/tmp/made-by-an-answer").exists()


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(600)", "input()\nwhile True: pass"])
def test_code_that_does_not_end_is_ended(source: str) -> None:
    assert run(("answer.py", source), stdin="x", seconds=1).error == "timeout"


def test_code_sees_no_keys_and_is_the_same_each_time(secret: Path) -> None:
    ran = run(("answer.py", "import os; print(sorted(os.environ), hash('x'))"), seconds=20)
    assert "OPENAI_API_KEY" not in ran.out
    assert run(("answer.py", "import os; print(sorted(os.environ), hash('x'))"), seconds=20) == ran
    threads = "import threading\nt = threading.Thread(target=print, args=('t',)); t.start(); t.join()"
    assert run(("answer.py", threads), seconds=20).out == "t\n"


def test_nothing_runs_where_it_cannot_be_locked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_readable", lambda: [3])  # what the process cannot make a rule of
    with pytest.raises(SynthError, match=r"cannot be run in a sandbox here.*Nothing was run"):
        run(("answer.py", "print('ran')"), seconds=20)
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    sandbox.unavailable.cache_clear()
    ((name, message),) = Verify(function="code").check()
    assert (name, "needs Linux" in message) == ("function", True)
    monkeypatch.undo()
    sandbox.unavailable.cache_clear()


def test_tests_that_are_none_and_options_that_are_unknown_are_said() -> None:
    with pytest.raises(DataError, match="'tests' holds no tests"):
        score("x", [])
    ((name, message),) = Verify(function="code", options={"second": 3}).check()
    assert (name, "did you mean 'seconds'" in message) == ("options", True)


@pytest.mark.parametrize(
    ("right", "answer", "wanted"),
    [
        ("1/2", r"so it is \boxed{\frac{1}{2}}", 1), ("0.5", "1/2", 1), ("#### 1200", "It is $1,200.", 1),
        (r"\frac{\pi}{2}", r"\boxed{\pi/2}", 1), ("x^2+1", "$1+x^2$", 1), ("12", "The answer is 13", 0),
        (r"$\{1,2\}$", r"$\{2,1\}$", 1), ("7", "nothing", 0),
    ],
)  # fmt: skip
def test_mathematics_is_the_same_however_it_is_written(right: str, answer: str, wanted: int) -> None:
    pytest.importorskip("math_verify")
    (made,) = Verify(function="math").fold({"prompt": "p", "response": answer, "answer": right}, [])
    assert isinstance(made, dict)
    assert made["score"] == wanted


def test_a_right_answer_that_is_no_mathematics_drops_its_row() -> None:
    pytest.importorskip("math_verify")
    (made,) = Verify(function="math").fold({"prompt": "p", "response": "1", "answer": ""}, [])
    assert isinstance(made, Drop)
    assert "is no mathematics" in made.detail
