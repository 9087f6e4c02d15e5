"""The inside of the sandbox: a program and its tests, each in a jail of its own. `runner.py` starts this script.

    evaluator -> this supervisor -> keeper -> candidate   (the program, process 1 of its own namespaces)
                                 -> keeper -> judge       (the trusted prompt and tests, likewise)

The candidate answers calls over a pipe with plain data; the judge compares and alone decides. The candidate never holds
the tests, the judge's pipe to the supervisor, or any object that the judge would compare: an object that is equal to
everything, a patched builtin or an early ``sys.exit(0)`` changes nothing outside the candidate.

Only the standard library, and nothing of this package: it runs as ``python -I -S jail.py``.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import decimal
import errno
import fractions
import gc
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

GUARANTEES = {
    "files": "a program can read, and change, every file that you can",
    "processes": "a program can see and signal your processes, and what it starts may outlive it for a moment",
    "network": "a program can open connections",
    "system_calls": "a program may use every system call, among them those that attack the kernel",
    "limits": "a program can use all memory, disk and processes of this machine",
}
"""What the jail promises, and what is so where the platform does not let it."""

NOBODY = 65534
BOX = "/box"
MESSAGE = 8 << 20
"""Bytes of the longest message between the two; a longer answer is a wrong one."""

CLONE = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000, "uts": 0x4000000}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVS, SUBREAPER, CAPBSET_DROP = 1, 4, 22, 38, 36, 24

# Denied with EPERM: starting other programs, sockets, more namespaces, memory outside RLIMIT_AS (System V), keys,
# other processes' memory, and the large doors into the kernel. (x86_64, aarch64), from the kernel's syscall tables.
DENIED = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),
    "open_by_handle_at": (304, 265),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "quotactl": (179, 60),
}
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


class Missing(Exception):
    """A guarantee that this platform does not give: its name, and why."""


# --- building a jail -----------------------------------------------------------------------------------------


def libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int, argument: Any = 0) -> int:
    third = argument if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    return libc().prctl(option, ctypes.c_ulong(value), third, ctypes.c_ulong(0), ctypes.c_ulong(0))


def checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def spare_user() -> int:
    """The user that a jail is to run as: for root one of its own: each jail's processes are counted apart."""
    if os.geteuid() != 0:
        return os.geteuid()
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    own = (1 << 30) + os.getpid()
    return own if any(start <= own < start + count for start, _, count in ranges) else NOBODY


def become(user: int) -> None:
    """Root is exempt from the limit on processes and owns the machine's files: go on as somebody else."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def own_processes(user: int) -> None:
    """Process and IPC namespaces, as root directly, else (or where root may not) in a user namespace."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            unshare("pid", "ipc")
            return
    become(user)
    own_user()
    unshare("pid", "ipc")


def unshare(*kinds: str) -> None:
    if not hasattr(libc(), "unshare"):
        raise OSError(errno.ENOSYS, f"{platform.system()} has no namespaces")
    checked(libc().unshare(sum(CLONE[kind] for kind in kinds)), f"unshare({', '.join(kinds)})")


def own_user() -> None:
    """A user namespace in which this process may build the others; outside it is the user it was."""
    uid, gid = os.geteuid(), os.getegid()
    unshare("user")
    prctl(DUMPABLE, 1)  # cleared by setuid; without it /proc/self belongs to root
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def libraries() -> list[str]:
    """Where Python and the shared libraries lie: all that a program sees of this machine."""
    found = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    found += [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    found += [path for path in sys.path if os.path.isdir(path)]
    kept: list[str] = []
    for path in sorted({os.path.abspath(path) for path in found if os.path.isdir(path)}):
        if not any(path.startswith(f"{parent}/") and not os.path.islink(parent) for parent in kept):
            kept.append(path)
    return kept


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    args = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    checked(libc().mount(*args), f"mount {target}")


def own_files(user: int, box_bytes: int) -> None:
    """A root of its own: libraries, read-only, and an empty private directory of ``box_bytes``. No /proc, no /dev."""
    shown = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in libraries() if not os.path.islink(path)}
    links = {path: os.readlink(path) for path in libraries() if os.path.islink(path)}
    root = "/tmp"  # mounted over, in a namespace that nobody else sees
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("jail", root, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=64k,mode=755")
    for path, fd in shown.items():
        os.makedirs(root + path, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", root + path, "", MS_BIND | MS_REC)
        held = os.statvfs(root + path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048)  # locked: must stay
        relatime = 1 << 21 if os.statvfs(root + path).f_flag & 4096 else 0
        mount("none", root + path, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | held | relatime)
        os.close(fd)
    for path, target in links.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    os.mkdir(root + BOX)
    mount(
        "box",
        root + BOX,
        "tmpfs",
        MS_NOSUID | MS_NODEV | MS_NOEXEC,
        f"size={box_bytes},nr_inodes=1024,mode=700,uid={user},gid={user}",
    )
    os.chdir(root)
    number = {"x86_64": 155, "aarch64": 41}.get(platform.machine())  # the C library has no function for it
    if number is None:
        raise OSError(errno.ENOSYS, f"pivot_root on {platform.machine()}")
    checked(libc().syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    checked(libc().umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")
    mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(BOX)
    os.environ.clear()
    os.environ.update(HOME=BOX, TMPDIR=BOX, PATH="", LANG="C.UTF-8")


def drop_capabilities() -> None:
    """None in any set, and none to come back."""
    for capability in range(64):
        prctl(CAPBSET_DROP, capability)
    header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)
    checked(libc().capset(header, data), "capset")
    checked(prctl(NO_NEW_PRIVS, 1), "no_new_privs")


def own_system_calls() -> None:
    """A seccomp filter: `DENIED` fail with EPERM, another instruction set's calls kill the process."""
    machine = MACHINES.get(platform.machine())
    if machine is None or sys.byteorder != "little" or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no list of system calls for {platform.machine()}")
    arch, column = machine
    numbers = [pair[column] for pair in DENIED.values()]
    kill, refuse, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
    new_namespace = CLONE["user"] | 0x02000000 | sum(CLONE[k] for k in ("mount", "pid", "net", "ipc", "uts"))
    clone = (56, 220)[column]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, kill), (0x20, 0, 0, 0)]
    program += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, kill)]  # x32
    for number in numbers:
        program += [(0x15, 0, 1, number), (0x06, 0, 0, refuse)]
    # the C library starts threads by clone() where there is no clone3(), whose flags a filter cannot see
    program += [(0x15, 0, 1, 435), (0x06, 0, 0, 0x00050000 | errno.ENOSYS)]
    # clone() with any namespace flag in its first argument
    program += [(0x15, 0, 3, clone), (0x20, 0, 0, 16), (0x45, 0, 1, new_namespace), (0x06, 0, 0, refuse)]
    program += [(0x06, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    checked(prctl(NO_NEW_PRIVS, 1), "no_new_privs")
    checked(prctl(SECCOMP, 2, filter_), "seccomp")


def own_limits(limits: Mapping[str, int]) -> None:
    """Of each process; ``processes`` is of all together."""
    wanted = {
        "RLIMIT_CPU": limits["cpu_seconds"],
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_NPROC": limits["processes"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in wanted.items():
        number = getattr(resource, name, None)
        if number is None:
            if name in ("RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"):
                continue
            raise OSError(errno.ENOSYS, f"no {name}")
        hard = resource.getrlimit(number)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (most, most))


def attempt(guarantee: str, accepted: Sequence[str], *steps: Callable[[], None]) -> str | None:
    """Runs the steps. What fails is named where that is accepted, and raised as `Missing` where it is not."""
    try:
        for step in steps:
            step()
    except (OSError, ValueError, AttributeError) as error:
        if guarantee not in accepted:
            raise Missing(guarantee, str(error)) from error
        return guarantee
    return None


def jailed(job: Mapping[str, Any], keep: Sequence[int], role: Callable[[], NoReturn]) -> int:
    """Forks a keeper that builds a jail and runs ``role`` as process 1 in it; the keeper's id.

    The keeper ends with process 1's exit status, or with 100 and a line on stderr where the jail could not be built.
    """
    keeper = os.fork()
    if keeper:
        return keeper
    try:
        os.setsid()
        follow_parent()
        close_all_but(keep)
        accepted, limits = job["accepted"], job["limits"]
        user = spare_user()
        attempt("processes", accepted, lambda: own_processes(user))
        attempt("network", accepted, lambda: unshare("net", "uts"))
        attempt("files", accepted, lambda: unshare("mount"))
        first = os.fork()
        if first:
            _, status = os.waitpid(first, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        attempt("files", accepted, lambda: own_files(user, limits["file_bytes"]))
        attempt("limits", accepted, lambda: own_limits(limits), lambda: become(user))
        attempt("system_calls", accepted, drop_capabilities, own_system_calls)
        if hasattr(libc(), "prctl"):
            prctl(PDEATHSIG, signal.SIGKILL)  # a change of user clears it
    except Missing as missing:
        os.write(2, (json.dumps(missing.args) + "\n").encode())
        os._exit(100)
    except BaseException as error:  # a keeper must never return into the supervisor's code
        os.write(2, (json.dumps(["limits", repr(error)]) + "\n").encode())
        os._exit(100)
    os.dup2(0, 2)  # /dev/null: what the jail says from here on is the program's
    role()


def follow_parent() -> None:
    """Ends when the process that started this one ends."""
    parent = os.getppid()
    if hasattr(libc(), "prctl"):
        prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(100)


def close_all_but(keep: Sequence[int]) -> None:
    edges = [2, *sorted(keep), 1 << 16]
    for low, high in zip(edges, edges[1:], strict=False):
        os.closerange(low + 1, high)


# --- plain data over a pipe ----------------------------------------------------------------------------------


def pack(value: Any, depth: int = 0) -> Any:
    """A value as JSON, every type tagged. Subclasses travel as the plain type that they extend.

    Raises:
        TypeError: for what is not plain data: it could not equal an expected value anyway.
    """
    if depth > 100:
        raise TypeError("nested too deeply")
    match value:
        case None | bool() | str():
            return value if value is None or isinstance(value, bool) else ["s", str.__str__(value)]
        case int():
            return ["i", hex(int(value))]
        case float():
            return ["f", float.__repr__(float(value))]
        case complex():
            return ["c", value.real.hex(), value.imag.hex()]
        case bytes() | bytearray():
            return ["b", bytes(value).hex()]
        case decimal.Decimal() | fractions.Fraction():
            return ["D" if isinstance(value, decimal.Decimal) else "F", str(value)]
        case dict():
            return ["d", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in value.items()]]
        case list() | tuple() | set() | frozenset():
            tag = next(
                t for kind, t in ((list, "l"), (tuple, "t"), (set, "S"), (frozenset, "Z")) if isinstance(value, kind)
            )
            return [tag, [pack(item, depth + 1) for item in value]]
    raise TypeError(f"{type(value).__name__} is not plain data")


def unpack(packed: Any) -> Any:
    """The value again. Builds nothing but plain data, whatever the other side sent."""
    if packed is None or isinstance(packed, bool):
        return packed
    tag, content = packed[0], packed[1]
    plain: dict[str, Callable[[], Any]] = {
        "s": lambda: str(content),
        "i": lambda: int(content, 16),
        "f": lambda: float(content),
        "c": lambda: complex(float.fromhex(content), float.fromhex(packed[2])),
        "b": lambda: bytes.fromhex(content),
        "D": lambda: decimal.Decimal(content),
        "F": lambda: fractions.Fraction(content),
        "d": lambda: {unpack(k): unpack(v) for k, v in content},
        "l": lambda: [unpack(item) for item in content],
        "t": lambda: tuple(unpack(item) for item in content),
        "S": lambda: {unpack(item) for item in content},
        "Z": lambda: frozenset(unpack(item) for item in content),
    }
    return plain[tag]()


def send(fd: int, message: Any) -> None:
    body = json.dumps(message).encode()
    body = struct.pack(">I", len(body)) + body
    while body:
        body = body[os.write(fd, body) :]


def receive(fd: int) -> Any:
    """Raises EOFError where the other side is gone, ValueError for what is no message."""
    (length,) = struct.unpack(">I", exactly(fd, 4))
    if length > MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(exactly(fd, length))


def exactly(fd: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        chunk = os.read(fd, min(length - len(found), 1 << 16))
        if not chunk:
            raise EOFError
        found += chunk
    return bytes(found)


# --- the two roles -------------------------------------------------------------------------------------------


def candidate(calls: int, answers: int) -> NoReturn:
    """Runs a program it knows nothing about, then answers calls of its function: all of it in the program's hands."""
    try:
        job = receive(calls)
        names: dict[str, Any] = {"__name__": "candidate"}
        exec(compile(job["program"], "program.py", "exec"), names)
        function = names[job["entry_point"]]
        send(answers, {"ready": True})
        while True:
            arguments = unpack(receive(calls))
            try:
                reply = {"value": pack(function(*arguments[0], **arguments[1]))}
            except MemoryError:
                os._exit(1)
            except Exception as error:
                reply = {"error": type(error).__name__, "text": str(error)[:200]}
            send(answers, reply)
    except BaseException as error:
        try:
            send(answers, {"error": type(error).__name__, "text": str(error)[:200]})
        finally:
            os._exit(1)


class Wrong(Exception):
    """Why a program did not pass."""


def judge(job_fd: int, calls: int, answers: int, verdict: int) -> NoReturn:
    """Runs the prompt (for its helpers) and the tests, with the candidate's function as a call over the pipe."""
    outcome = "passed"
    try:
        job = receive(job_fd)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        send(calls, {"program": job["program"], "entry_point": job["entry_point"]})
        first = receive(answers)
        if "ready" not in first:
            raise Wrong(f"the program ended with {first['error']}: {first['text']}")

        def call(*args: Any, **kwargs: Any) -> Any:
            send(calls, pack([args, kwargs]))
            reply = receive(answers)
            if "error" in reply:
                kind = vars(builtins).get(str(reply["error"]))
                known = isinstance(kind, type) and issubclass(kind, Exception)
                raise (kind if known else RuntimeError)(str(reply.get("text", "")))  # type: ignore[misc]
            return unpack(reply["value"])

        names: dict[str, Any] = {"__name__": "judge"}
        exec(compile(job["prompt"], "prompt.py", "exec"), names)
        exec(compile(job["test"], "test.py", "exec"), names)
        names[job["entry_point"]] = call
        names["check"](call)
    except AssertionError as error:
        outcome = f"failed: an assertion of the tests. {error}".strip()
    except Wrong as error:
        outcome = f"failed: {error}"
    except EOFError:
        outcome = "failed: the program ended before it answered"
    except BaseException as error:
        outcome = f"failed: {type(error).__name__}: {error}"
    send(verdict, outcome[:500])
    os._exit(0 if outcome == "passed" else 1)


# --- the supervisor ------------------------------------------------------------------------------------------


def supervise(job: Mapping[str, Any], job_fd: int) -> dict[str, Any]:
    """One program against its tests. Everything it started is dead when this returns.

    Returns:
        ``outcome`` (``passed``, ``failed: why`` or ``timed out``) and ``seconds``.
    """
    started = time.monotonic()
    call_out, call_in = os.pipe()
    answer_out, answer_in = os.pipe()
    verdict_out, verdict_in = os.pipe()
    # neither keeper keeps the other's ends of the pipes: the end of a file would never come
    keepers = [
        jailed(job, [call_out, answer_in], lambda: candidate(call_out, answer_in)),
        jailed(
            job,
            [job_fd, call_in, answer_out, verdict_in],
            lambda: judge(job_fd, call_in, answer_out, verdict_in),
        ),
    ]
    for fd in (call_out, call_in, answer_out, answer_in, verdict_in, job_fd):
        os.close(fd)
    deadline = started + job["limits"]["wall_seconds"]
    outcome = "timed out"
    try:
        ready, _, _ = select.select([verdict_out], [], [], max(0.0, deadline - time.monotonic()))
        if ready:
            outcome = str(receive(verdict_out))
    except (EOFError, ValueError):
        outcome = "failed: no verdict"
    end_all(keepers)
    return {"outcome": outcome, "seconds": time.monotonic() - started}


def end_all(keepers: Sequence[int]) -> None:
    """Kills both jails and waits until nothing of them is left; orphans come to this process, their subreaper."""
    for keeper in keepers:
        kill(keeper, os.kill)
    while True:
        for child in children():
            kill(child, os.kill)
            if child not in keepers:
                kill(child, os.killpg)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
        except ChildProcessError:
            return


def kill(process: int, how: Callable[[int, int], None]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(process, signal.SIGKILL)


def children() -> Iterator[int]:
    try:
        with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
            yield from map(int, file.read().split())
    except OSError:
        return


def main() -> int:
    """The settings are the first argument, the program and its tests come on stdin, the result goes to stdout."""
    job = json.loads(sys.argv[1])
    follow_parent()
    if hasattr(libc(), "prctl"):
        prctl(SUBREAPER, 1)
    job_fd, out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    gc.disable()
    result = supervise(job, job_fd)
    os.write(out, json.dumps(result).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
