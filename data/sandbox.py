"""
Runs generated code against tests: run(program, tests) -> "passed", or one line that says why not.

Two processes of one fresh interpreter: the judge, who holds the tests, and its fork, which runs the program and never
sees them. The program's functions are within the tests' reach by name; a call crosses a pipe as plain data (numbers,
strings, lists, tuples, sets, dicts), so an answer compares as what it is. After the last test the judge prints a
random nonce, which it is told after the fork: nothing else is a pass.

Covered: endless loops (wall clock and CPU limit), endless output (it goes nowhere), recursion, any exit, 10 GB
allocations, large files, descriptors and processes (limits), walking frames for the nonce, printing it, objects with an
own __eq__, a closed stdout, our environment (scrubbed). An audit hook ends the program, and this is reported, where it
writes outside of its directory, reads /proc, starts or signals a process, opens a socket or calls C. When it ends, so
does all of its group. Started by root, it runs as user 65534.
Not covered: reading what that user may read, and attacks on CPython itself. This is not a security boundary: code that
you have reason to fear belongs into a container. Linux; macOS without the limits on memory and orphans.
"""
import builtins
import ctypes
import marshal
import numbers
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import types

MEMORY, FILE_BYTES, MESSAGE_BYTES, DESCRIPTORS, NOBODY = 4 << 30, 1 << 20, 1 << 26, 64, 65534
FORBIDDEN = ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.ch", "os.link", "os.symlink", "os.setxattr",
             "subprocess.", "pty.", "signal.pthread_kill", "socket.connect", "socket.bind", "socket.__new__", "ctypes.")
PATHS = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.utime": 1}    # how many


def run(program, tests, timeout=20.0):
    """program, tests: Python source; timeout: seconds of wall clock, for both. ValueError if root cannot be user 65534."""
    nonce = secrets.token_hex(16).encode()
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
            said = f"no answer within {timeout:g} s".encode()
        finally:
            try:
                os.killpg(judge.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            judge.communicate()
    if said == b"no user":
        raise ValueError(f"sandbox: root cannot become user {NOBODY} here; run as an ordinary user")
    return "passed" if said == nonce else said.decode(errors="replace") or "the judge was killed"


def message(value):
    data = marshal.dumps(value)
    return len(data).to_bytes(8, "little") + data


def receive(fd):
    """The next message of a pipe; EOFError where it ends, ValueError where it is too long."""
    def read(count):
        data = b""
        while len(data) < count:
            part = os.read(fd, min(count - len(data), 1 << 20))
            if not part:
                raise EOFError("the program ended")
            data += part
        return data
    size = int.from_bytes(read(8), "little")
    if size > MESSAGE_BYTES:
        raise ValueError(f"a result of {size} bytes")
    return marshal.loads(read(size))


def plain(value):
    """value as marshal takes it, subclasses as their base (a Counter as a dict). TypeError for any other object."""
    if value is None:
        return value
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(plain(item) for item in value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for kind, base in ((numbers.Integral, int), (numbers.Real, float)):     # NumPy's scalars
        if isinstance(value, kind):
            return base(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


# ------------------------------------------------------------------------------------ in the fresh interpreter

def judge(timeout):
    for limit, value in ((resource.RLIMIT_CPU, int(timeout) + 1), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0),
                         (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NOFILE, DESCRIPTORS)):
        resource.setrlimit(limit, (value, value))
    program, (calls, to_program), (from_program, answers) = receive(0), os.pipe(), os.pipe()
    if os.fork() == 0:
        os.dup2(calls, 3), os.dup2(answers, 4)
        execute(program, os.getcwd())
    os.close(calls), os.close(answers)
    nonce, tests = receive(0)

    def call(name, *args, **kwargs):
        os.write(to_program, message((name, plain(args), plain(kwargs))))
        done, *result = receive(from_program)
        if done:
            return result[0]
        kind = getattr(builtins, result[0], None)
        kind = kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError
        raise kind(result[1])
    ...
