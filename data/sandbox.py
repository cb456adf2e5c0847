"""
Runs generated code against tests: run(program, tests, names) -> "passed", or one line that says why not.

Two fresh interpreters: the judge, which holds the tests, and the program's, which never sees them. The tests
call the program's functions of the given names, and those that it returns; a call crosses a socket as plain
data (marshal's types, KINDS), so that a result compares as what it is; what it changes in a list, set or dict
crosses back. After the last test the judge prints a random nonce: nothing else is a pass.

Covered: endless loops, endless output, recursion, any exit, 10 GB allocations, large files, many descriptors
or processes, walking frames for the nonce, objects with an own __eq__, a closed stdout, our environment. A
hook ends the program, and says so, where it writes outside of its directory, reads /proc, starts or signals
a process, opens a socket or calls C; compiled modules are Python's and NumPy's alone, less UNSEEN. Both end
with our process, and at the end are killed and reaped. Started by root, the program is user 65534, who may
read every file. Where namespace() holds, bubblewrap gives each its own: no other process, no network, nothing
to write but 64 MB in memory; this holds for a program that takes the hook apart, too.
Not covered: attacks on the kernel, or on CPython by what the judge reads; tests that hand over a function;
without bubblewrap, many small files and taking the hook apart, as it is Python: then no security boundary.
Linux; macOS as an ordinary user, without the limit on memory and the end with ours.
"""
import builtins
import contextlib
import ctypes
import functools
import marshal
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections import abc, deque
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe

BWRAP, MANY = "/usr/bin/bwrap", (list, tuple, set, frozenset)
LIMITS, MESSAGE_BYTES, NOBODY = dict(AS=4 << 30, CORE=0, FSIZE=1 << 20, NOFILE=64), 1 << 26, 65534
FORBIDDEN = ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.ch", "os.link", "os.symlink",
             "os.setxattr", "os.removexattr", "pty.", "subprocess.", "signal.pthread_kill", "socket.",
             "ctypes.", "fcntl.", "sqlite3.", "resource.prlimit", "syslog.")
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime")
# What hooks do not see: functions of os; modules, the last three since they run code where no hook is.
UNSEEN = ("mkfifo mknod pidfd_open memfd_create setpriority sched_setaffinity sched_setscheduler",
          "readline _ssl _tkinter _posixshmem _multiprocessing _dbm _gdbm "
          "_testcapi _xxsubinterpreters _interpreters")
KINDS = (       # what crosses beyond marshal's types: a type, as what, what the other side makes of that
    (range, lambda x: (x.start, x.stop, x.step), lambda x: range(*x)), (abc.ItemsView, dict, dict.items),
    (abc.ValuesView, lambda x: dict(enumerate(x)), dict.values), (abc.KeysView, dict.fromkeys, dict.keys),
    (Fraction, str, Fraction), (Decimal, str, Decimal), (deque, list, deque), (abc.Iterable, list, iter))


def run(program, tests, names, timeout=20.0):
    """Two sources; names: what tests call; timeout: seconds. RuntimeError: root cannot change its user."""
    if os.getuid() == 0 and not can_change_user():
        raise RuntimeError(f"root cannot become user {NOBODY} here: run generated code as an ordinary user")
    nonce, folder = os.urandom(16).hex().encode(), tempfile.mkdtemp()
    os.getuid() or os.chown(folder, NOBODY, NOBODY)
    try:
        ours, theirs = Pipe()
        with (started("judge", ours, folder, timeout) as judge, started("program", theirs, folder, timeout)):
            ours.close(), theirs.close()        # each side is to see the other's end
            said, _ = judge.communicate(marshal.dumps((program, nonce, tests, names)), timeout)
    except subprocess.TimeoutExpired:
        said = f"no end within {timeout:g} s".encode()
    finally:        # shutil.rmtree recurses: a program's folders may be deep; and closed to their owner
        subprocess.run(["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder], stderr=subprocess.DEVNULL)
    said = b"passed" if said == nonce else said or b"the judge was killed"
    return said.decode(errors="replace").replace("\n", " ")


@contextlib.contextmanager
def started(role, pipe, folder, timeout):
    """A fresh interpreter in its role; at the end it is killed with all that it started, and reaped."""
    wall, ends = walls(folder) * namespace(), subprocess.PIPE if role == "judge" else subprocess.DEVNULL
    child = subprocess.Popen(
        [*wall, sys.executable, "-I", "-B", os.path.abspath(__file__), role, str(pipe.fileno()), str(timeout),
         str(1 if wall else os.getpid())], cwd=folder, stdin=ends, stdout=ends, stderr=subprocess.DEVNULL,
        start_new_session=True, pass_fds=[pipe.fileno()],
        env=dict(PATH=os.defpath, HOME=folder, TMPDIR=folder, OPENBLAS_NUM_THREADS="1"))
    try:
        yield child
    finally:    # a namespace ends with its first process, the child of bwrap, which reaps it
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            first = open(f"/proc/{child.pid}/task/{child.pid}/children").read() if wall else ""
            os.kill(int(first or -child.pid), signal.SIGKILL)
        child.communicate()


def walls(folder):
    """bwrap before a command. Root goes without a namespace of users, in which it could become no other."""
    own = "all" if os.getuid() else ("ipc --unshare-pid --unshare-net --unshare-uts --cap-add CAP_SETUID "
                                     "--cap-add CAP_SETGID --cap-add CAP_DAC_READ_SEARCH")
    return (f"{BWRAP} --cap-drop ALL --unshare-{own} --as-pid-1 --die-with-parent --new-session "
            "--ro-bind / / --dev /dev --remount-ro /dev --tmpfs /proc --remount-ro /proc --tmpfs /run "
            f"--remount-ro /run --perms 0777 --size {64 << 20} --tmpfs").split() + [folder, "--chdir", folder]


@functools.cache
def can_change_user(walls=lambda folder: []):
    """Whether a trial start succeeds: an interpreter, behind the walls if any, that ceases to be root."""
    trial = f"import os; os.getuid() or (os.setgroups([]), os.setuid({NOBODY}))"
    with tempfile.TemporaryDirectory() as folder:
        command = [*walls(folder), sys.executable, "-I", "-c", trial]
        return subprocess.call(command, stderr=subprocess.DEVNULL) == 0


def namespace():
    return all(map(os.path.exists, (BWRAP, "/proc/thread-self/children"))) and can_change_user(walls)


def plain(value, kept=None):
    """As marshal's types; KINDS as (..., number, what), functions (..., -1, place), else `...` or False."""
    value = value.tolist() if hasattr(value, "tolist") else value   # NumPy's
    if isinstance(value, dict):
        return {plain(key, kept): plain(item, kept) for key, item in value.items()}
    for kind in (bool, int, float, complex, str, bytes, *MANY):
        if isinstance(value, kind):
            return kind([plain(item, kept) for item in value] if kind in MANY else value)
    for number, (kind, to, _) in enumerate(KINDS):
        if isinstance(value, kind):
            return ..., number, plain(to(value), kept)
    if kept is not None and callable(value):
        return ..., -1, kept.append(value) or len(kept) - 1
    return value if value is None else bool(value) and ...          # `...` equals nothing


def restored(value, call=None):
    """What plain had; call(place, *args) reaches the functions that the other side keeps."""
    if isinstance(value, dict):
        return {restored(key, call): restored(item, call) for key, item in value.items()}
    if not isinstance(value, MANY):
        return value
    items = [restored(item, call) for item in value]
    if items[:1] != [...] or type(value) is not tuple:
        return type(value)(items)
    return functools.partial(call, items[2]) if items[1] == -1 else KINDS[items[1]][2](items[2])


def confine(role, timeout, parent):
    """Limits, user and end of a fresh interpreter; libc is in no frame that the program can reach."""
    libc, word, program = ctypes.CDLL(None), ctypes.c_uint32, role == "program"
    if os.getpid() == 1 and os.fork():      # bwrap's own first process would be left to others to reap
        os.wait(), os._exit(0)
    for name, value in (LIMITS | dict(CPU=int(timeout) + 1) | ({"NPROC": 0} if program else {})).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if program and os.getuid() == 0:
        libc.prctl(8, 1)        # PR_SET_KEEPCAPS: CAP_DAC_READ_SEARCH, or nothing; Python may lie below /root
        os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
        any(libc.capset((word * 2)(0x20080522), (word * 6)(cap, cap)) == 0 for cap in (4, 0))
    sys.platform == "linux" and libc.prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG
    os.getppid() == parent or os._exit(1)                               # it has ended before


def judge(pipe):
    program, nonce, tests, names = marshal.loads(sys.stdin.buffer.read())

    def call(name, /, *args, **kwargs):
        pipe.send_bytes(marshal.dumps((name, plain(args), plain(kwargs))))
        error, value, changed = marshal.loads(pipe.recv_bytes(MESSAGE_BYTES))
        if error:                       # an exception of the program's: raised as the built-in of its name
            kind = getattr(builtins, error, None)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(value)
        for place, now in changed.items():      # a list, set or dict
            mine = [*args, *kwargs.values()][place]
            mine.clear(), (mine.extend if isinstance(mine, list) else mine.update)(restored(now, call))
        return restored(value, call)

    try:        # MBPP 596 tests with sys
        call(0, program)
        exec(compile(tests, "tests", "exec"), {"sys": sys} | {n: functools.partial(call, n) for n in names})
        os.write(1, nonce)
    except BaseException as error:
        os.write(1, f"{type(error).__name__}: {error}"[:300].encode(errors="replace"))


def execute(pipe):
    """Answers the judge's calls, the first of which brings the program, until the judge has ended."""
    folder, module = os.getcwd(), type(sys)("program")
    kept = [lambda source: exec(compile(source, "program", "exec"), vars(module))]
    own = os.path.realpath(os.path.dirname(os.__file__)) + "/lib-dynload/"
    for name in UNSEEN[0].split():
        vars(os).pop(name, None), vars(sys.modules["posix"]).pop(name, None)
    sys.modules |= dict.fromkeys(UNSEEN[1].split()) | {"program": module}

    def forbid(event, args):
        what = event if event.startswith(FORBIDDEN) else None
        writing = event in WRITES or event == "open" and isinstance(args[2], int) and (
            args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if event == "import" and args[1]:                   # compiled: no hook sees what it does
            path = os.path.realpath(args[1])
            if path.startswith(folder) or not path.startswith(own) and "-packages/numpy/" not in path:
                raise ImportError(f"forbidden: import {path}")
        for path in args[:2 if event == "os.rename" else event == "open" or event in WRITES]:
            if isinstance(path, (str, bytes, os.PathLike)):
                path = os.path.realpath(os.fsdecode(path))
                outside = not path.startswith(folder + os.sep) and path != os.devnull
                # a folder is refused for reading, too: by dir_fd it leads anywhere
                if path.startswith("/proc/") or outside and (writing or os.path.isdir(path)):
                    what = f"{event} {path}"
        if what:
            pipe.send_bytes(marshal.dumps(("PermissionError", f"forbidden: {what}", {}))), os._exit(1)

    sys.addaudithook(forbid)
    while True:
        try:
            name, args, kwargs = marshal.loads(pipe.recv_bytes())
            mine, named, given = restored(args), restored(kwargs), [*args, *kwargs.values()]
            value = (kept[name] if isinstance(name, int) else vars(module)[name])(*mine, **named)
            changed = {place: plain(x) for place, x in enumerate([*mine, *named.values()])
                       if isinstance(x, (list, set, dict)) and plain(x) != given[place]}
            answer = marshal.dumps(("", plain(value, kept), changed))
        except BaseException as error:
            answer = marshal.dumps((type(error).__name__, str(error)[:300], {}))
        pipe.send_bytes(answer)                             # BrokenPipeError where the judge has ended


if __name__ == "__main__":
    role, pipe, timeout, parent = sys.argv[1:]
    confine(role, float(timeout), int(parent))
    {"judge": judge, "program": execute}[role](Connection(int(pipe)))
