"""
Runs generated code against tests: run(program, tests, names) -> "passed", or one line that says why not.

Two processes of one fresh interpreter: the judge, which holds the tests, and its fork, which runs the program
and never sees them. The tests call the program's functions of the given names alone; a call crosses a pipe as
plain data (numbers, strings, lists, tuples, sets, dicts), so that a result compares as what it is. After the
last test the judge prints a random nonce, which it reads after the fork: nothing else is a pass.

Covered: endless loops (wall clock, CPU limit), endless output (it goes nowhere), recursion, any exit, 10 GB
allocations, large files, many descriptors or processes (limits), walking frames for the nonce, printing it,
objects with an own __eq__, a closed stdout, our environment (scrubbed). A hook ends the program, and says so,
where it writes outside of its directory, reads /proc, starts or signals a process, opens a socket or calls C.
At the end the whole group is killed. Started by root, the program runs as user 65534, which may read every
file.
Not covered: a program that takes the hook apart (it is Python in the program's own process), many small
files, attacks on CPython. This is not a security boundary: code that you have reason to fear belongs into a
container. Linux; macOS as an ordinary user, without the limit on memory and the end of orphans.
"""
import builtins
import contextlib
import ctypes
import functools
import marshal
import os
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import types
from multiprocessing.connection import Pipe

LIMITS, MESSAGE_BYTES, NOBODY = dict(AS=4 << 30, CORE=0, FSIZE=1 << 20, NOFILE=64), 1 << 26, 65534
FORBIDDEN = ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.ch", "os.link", "os.symlink",
             "os.setxattr", "pty.", "subprocess.", "signal.pthread_kill", "socket.", "ctypes.", "sqlite3.",
             "resource.prlimit", "syslog.")
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime")
# What hooks do not see: functions of os, modules.
UNSEEN = ("mkfifo", "mknod", "pidfd_open"), ("_posixshmem", "_multiprocessing", "_dbm", "_gdbm")


def run(program, tests, names, timeout=20.0):
    """
    program, tests: Python source; names: the functions that the tests call; timeout: seconds of wall clock
    for both. "passed" if every test statement ran. RuntimeError where root cannot hand over to another user.
    """
    if os.getuid() == 0 and not can_change_user():
        raise RuntimeError(f"root cannot become user {NOBODY} here: "
                           "start as an ordinary user to run generated code")
    nonce, folder = secrets.token_hex(16).encode(), tempfile.mkdtemp()
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    judge = subprocess.Popen(
        [sys.executable, "-I", "-B", os.path.abspath(__file__), str(timeout)], cwd=folder,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        env=dict(PATH=os.defpath, HOME=folder, TMPDIR=folder, OPENBLAS_NUM_THREADS="1"))
    try:
        said, _ = judge.communicate(marshal.dumps((program, nonce, tests, names)), timeout)
    except subprocess.TimeoutExpired:
        said = f"no end within {timeout:g} s".encode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(judge.pid, signal.SIGKILL)
        judge.communicate()
        subprocess.run(["rm", "-rf", folder])       # shutil.rmtree recurses, a program's folders may be deep
    if said == nonce:
        return "passed"
    return said.decode(errors="replace").replace("\n", " ") or "the judge was killed"


@functools.cache
def can_change_user():
    change = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    return subprocess.run([sys.executable, "-I", "-c", change], stderr=subprocess.DEVNULL).returncode == 0


def plain(value):
    """
    value in built-in types, a subclass as its base; other iterables as (..., items), other objects as `...`
    or False.
    """
    value = value.tolist() if hasattr(value, "tolist") else value   # NumPy's
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__iter__"):
        return ..., list(map(plain, value))
    return value if value is None else bool(value) and ...          # `...` equals nothing


# ----------------------------------------------------------------------------------- in the fresh interpreter

def judge(timeout):
    for name, value in (LIMITS | dict(CPU=int(timeout) + 1)).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    ours, theirs = Pipe()
    if os.fork() == 0:
        ours.close()
        execute(theirs)
    theirs.close()
    program, nonce, tests, names = marshal.loads(sys.stdin.buffer.read())

    def call(name, *args, **kwargs):
        ours.send_bytes(marshal.dumps((name, plain(args), plain(kwargs))))
        done, value = marshal.loads(ours.recv_bytes(MESSAGE_BYTES))
        if not done:                    # an exception of the program's: raised as the built-in of its name
            kind = getattr(builtins, value[0], None)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(value[1])
        return iter(value[1]) if isinstance(value, tuple) and value[:1] == (...,) else value

    try:
        call("", program)
        reach = {"sys": sys}                                            # MBPP 596 tests with it
        reach |= {name: functools.partial(call, name) for name in names}
        exec(compile(tests, "tests", "exec"), reach)
        said = nonce
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:300].encode(errors="replace")
    os.write(1, said)


def execute(pipe):
    """The program's side: runs what a first, nameless call brings; answers others until the pipe closes."""
    nowhere, folder = os.open(os.devnull, os.O_RDWR), os.getcwd()
    module, libc = types.ModuleType("program"), ctypes.CDLL(None)
    for fd in range(3):
        os.dup2(nowhere, fd)
    if os.getuid() == 0:        # keeps CAP_DAC_READ_SEARCH, or nothing: Python may lie below /root
        libc.prctl(8, 1)        # PR_SET_KEEPCAPS
        os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
        any(libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", c, c, 0, 0, 0, 0)) == 0
            for c in (4, 0))
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL)                       # PR_SET_PDEATHSIG: ends with the judge
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    for name in UNSEEN[0]:
        vars(os).pop(name, None), vars(sys.modules["posix"]).pop(name, None)
    sys.modules |= dict.fromkeys(UNSEEN[1]) | {"program": module}

    def forbid(event, args):
        what = event if event.startswith(FORBIDDEN) else None
        writing = event in WRITES
        if event == "open" and isinstance(args[2], int):
            writing = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        for path in args[:2 if event == "os.rename" else event == "open" or event in WRITES]:
            if isinstance(path, (str, bytes, os.PathLike)):
                path = os.path.realpath(os.fsdecode(path))
                outside = not path.startswith(folder + os.sep) and path != os.devnull
                # a folder is refused for reading, too: by dir_fd it leads anywhere
                if path.startswith("/proc/") or outside and (writing or os.path.isdir(path)):
                    what = f"{event} {path}"
        if what:
            pipe.send_bytes(marshal.dumps((False, ("PermissionError", f"forbidden: {what}"))))
            os._exit(1)

    sys.addaudithook(forbid)
    while True:
        try:
            name, args, kwargs = marshal.loads(pipe.recv_bytes())
            if name:
                value = vars(module)[name](*args, **kwargs)
            else:
                value = exec(compile(args[0], "program", "exec"), vars(module))
            answer = marshal.dumps((True, plain(value)))
        except BaseException as error:
            answer = marshal.dumps((False, (type(error).__name__, str(error)[:300])))
        pipe.send_bytes(answer)                             # BrokenPipeError where the judge has ended


if __name__ == "__main__":
    judge(float(sys.argv[1]))
