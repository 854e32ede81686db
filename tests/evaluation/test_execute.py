"""Tests of pass_at_1, which runs generated code and its tests within limits.

Code is correct only if it and its tests run to the end. It cannot use up the machine's resources.
The expected outcomes follow from reading the code.
"""

import os
import time

import pytest

from minilora.evaluation import code_execution
from minilora.evaluation.code_execution import pass_at_1

TESTS = "assert add(2, 3) == 5\nassert add('a', 'b') == 'ab'"
RIGHT = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    "code", [RIGHT, f"Here:\n```python\n{RIGHT}\n```\nDone.", f"```\n{RIGHT}\n```"]
)
def test_correct_answers_pass(code):
    assert pass_at_1(code, TESTS) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b):\n    return a - b",
        "def add(a, b):\n    return",
        "def add(a, b)\n    return a + b",  # syntax error
        "I do not know.",
        "",
        f"{RIGHT}\nraise SystemExit(0)",  # exits before the tests
        f"{RIGHT}\nimport os; os._exit(0)",
        f"{RIGHT}\nimport torch",  # installed packages are not available
    ],
)
def test_wrong_answers_fail(code):
    assert pass_at_1(code, TESTS) == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(2 << 30)",
        "open('f', 'wb').write(bytes(2 << 20))",
        "import subprocess; subprocess.run(['true'], check=True)",
        "import os; assert 'HOME' not in os.environ; assert os.listdir() == []; 1 / 0",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_limits_of_resources_are_enforced(code):
    if os.geteuid() == 0 and "resource.setrlimit" in code:
        # root may raise limits again, so the code must fail without them
        code += "\nx = bytearray(2 << 30)\n1 / 0"
    if os.geteuid() == 0 and "subprocess" in code:
        code += "\n1 / 0"  # RLIMIT_NPROC does not apply to root
    assert pass_at_1(code, "") == 0.0


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(60)", "while True: print('x' * 99999)"]
)
def test_an_endless_answer_is_stopped(code, monkeypatch):
    monkeypatch.setattr(code_execution, "SECONDS", 1)
    monkeypatch.setattr(
        code_execution, "_CHILD", code_execution._CHILD.replace('"CPU", 5', '"CPU", 1')
    )
    begun = time.monotonic()
    assert pass_at_1(code, "") == 0.0 and time.monotonic() - begun < 20
