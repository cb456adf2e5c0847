"""
Runs generated code against tests: run(program, tests) -> "passed", or one line that says why not.

Two processes of one fresh interpreter: the judge, which holds the tests, and its fork, which runs the program and never
sees them. The tests find the program's functions under their names; a call crosses a pipe as plain data (numbers,
strings, lists, tuples, sets, dicts), so that a result compares as what it is. After the last test the judge prints a
random nonce, which it is told after the fork: nothing else is a pass.

Covered: endless loops (wall clock and CPU limit), endless output (it goes nowhere), recursion, any exit, 10 GB
allocations, large files, many descriptors or processes (limits), walking frames for the nonce, printing it, objects with
an own __eq__, a closed stdout, our environment (scrubbed). An audit hook ends the program, and this is reported, where it
writes outside of its directory, reads /proc, starts or signals a process, opens a socket or calls C. At the end the whole
group is killed. Started by root, the program runs as user 65534.
Not covered: reading what that user may read, and attacks on CPython itself. This is not a security boundary: code that
you have reason to fear belongs into a container. Linux; macOS without the limit on memory and the end of orphans.
"""
import builtins
import ctypes
import functools
import importlib
import marshal
import numbers
import os
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import types

MEMORY, FILE_BYTES, MESSAGE_BYTES, DESCRIPTORS, NOBODY = 4 << 30, 1 << 20, 1 << 26, 64, 65534
FORBIDDEN = ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.ch", "os.link", "os.symlink", "os.setxattr",
             "subprocess.", "pty.", "signal.pthread_kill", "socket.", "ctypes.")
WRITES = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.utime": 1}    # paths


def run(program, tests, timeout=20.0):
    """
    program, tests: Python source; timeout: seconds of wall clock for both. "passed" if every test statement ran.
    RuntimeError where root cannot start the program as another user.
    """
    nonce = secrets.token_hex(16).encode()
    if os.getuid() == 0 and not can_change_user():
        raise RuntimeError(f"root cannot become user {NOBODY} here: start as an ordinary user to run generated code")
    with tempfile.TemporaryDirectory() as folder:
        if os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        judge = subprocess.Popen([sys.executable, "-I", "-B", os.path.abspath(__file__), str(timeout)], cwd=folder,
                                 env=dict(PATH=os.defpath, HOME=folder, TMPDIR=folder, OPENBLAS_NUM_THREADS="1"),
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
        try:
            said, _ = judge.communicate(message(program) + message((nonce, tests)), timeout)
        except subprocess.TimeoutExpired:
            said = f"no end within {timeout:g} s".encode()
        finally:
            try:
                os.killpg(judge.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            judge.communicate()
    return "passed" if said == nonce else said.decode(errors="replace").replace("\n", " ") or "the judge was killed"


@functools.cache
def can_change_user():
    change = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    return subprocess.run([sys.executable, "-I", "-c", change], stderr=subprocess.DEVNULL).returncode == 0


def message(value):
    data = marshal.dumps(value)
    return len(data).to_bytes(8, "little") + data


def receive(fd):
    """The next message of a pipe. EOFError where it ends, ValueError for one that is too long."""
    data, size = b"", 8
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError("the program ended")
        data += part
        if size == 8 == len(data):
            size += int.from_bytes(data, "little")
            if size > MESSAGE_BYTES:
                raise ValueError(f"a result of {size} bytes")
    return marshal.loads(data[8:])


def plain(value):
    """value in built-in types, a subclass as its base (a Counter as a dict); any other object as `...`."""
    for kind in (type(None), bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind([plain(item) for item in value])
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for kind, base in ((numbers.Integral, int), (numbers.Real, float)):     # NumPy's scalars
        if isinstance(value, kind):
            return base(value)
    return ...                                  # equals nothing, is true


# ------------------------------------------------------------------------------------ in the fresh interpreter

def judge(timeout):
    for limit, value in ((resource.RLIMIT_CPU, int(timeout) + 1), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0),
                         (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NOFILE, DESCRIPTORS)):
        resource.setrlimit(limit, (value, value))
    program, (calls, to_program), (from_program, answers) = receive(0), os.pipe(), os.pipe()
    if os.fork() == 0:
        execute(program, calls, answers)
    os.close(calls), os.close(answers)
    nonce, tests = receive(0)

    def answer():
        done, value = receive(from_program)
        if not done:                            # an exception of the program's: raised as the built-in one of its name
            kind = getattr(builtins, value[0], None)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(value[1])
        return value

    def call(name, *args, **kwargs):
        os.write(to_program, message((name, plain(args), plain(kwargs))))
        return answer()

    try:
        names, modules = answer()
        reach = {name: functools.partial(call, name) for name in names}
        reach |= {name: importlib.import_module(module) for name, module in modules.items()}
        exec(compile(tests, "tests", "exec"), {"__name__": "tests"} | reach)
        said = nonce
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:300].encode(errors="replace")
    os.write(1, said)


def execute(program, calls, answers):
    """The program's side of the fork: runs it, then answers calls until the pipe closes."""
    nowhere, folder = os.open(os.devnull, os.O_RDWR), os.getcwd()
    for fd in range(3):
        os.dup2(nowhere, fd)
    low, high = sorted((calls, answers))
    os.closerange(3, low), os.closerange(low + 1, high), os.closerange(high + 1, DESCRIPTORS)
    libc = ctypes.CDLL(None)
    if os.getuid() == 0:                                    # keeps CAP_DAC_READ_SEARCH: Python may lie below /root
        libc.prctl(8, 1)                                    # PR_SET_KEEPCAPS
        os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
        any(libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", c, c, 0, 0, 0, 0)) == 0 for c in (4, 2))
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL)                       # PR_SET_PDEATHSIG: ends with the judge
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

    def forbid(event, args):
        what = event if event.startswith(FORBIDDEN) else None
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        for path in args[:WRITES.get(event, event == "open")]:
            if isinstance(path, (str, bytes, os.PathLike)):
                path = os.path.realpath(os.fsdecode(path))
                inside = path.startswith(folder + os.sep) or path == os.devnull
                changing = writing or event in WRITES or os.path.isdir(path)        # a directory's dir_fd leads anywhere
                if path.startswith("/proc/") or changing and not inside:
                    what = f"{event} {path}"
        if what:
            os.write(answers, message((False, ("PermissionError", f"forbidden: {what}"))))
            os._exit(1)

    def answer(work):
        try:
            data = message((True, work()))
        except BaseException as error:
            data = message((False, (type(error).__name__, str(error)[:300])))
        os.write(answers, data)

    def load():
        module = sys.modules["program"] = types.ModuleType("program")
        exec(compile(program, "program", "exec"), module.__dict__)
        functions.update((name, value) for name, value in vars(module).items() if callable(value))
        modules = {name: value.__name__ for name, value in vars(module).items() if isinstance(value, types.ModuleType)}
        return list(functions), modules

    functions = {}
    sys.addaudithook(forbid)
    answer(load)
    while True:
        try:
            name, args, kwargs = receive(calls)
        except EOFError:
            os._exit(0)
        answer(lambda: plain(functions[name](*args, **kwargs)))


if __name__ == "__main__":
    judge(float(sys.argv[1]))
