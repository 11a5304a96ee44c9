"""What runs inside the sandbox: close the doors, then run the program. No imports of this package.

Started by :mod:`lorapro.experiments.scoring.sandbox` with ``python -I -S -B``. A JSON object on
standard input says what to run; JSON lines on the file descriptor ``report`` say how it went.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys

# <sched.h>, <sys/mount.h>, <linux/mount.h>; the system call has this number on every architecture.
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RECURSIVE, MS_PRIVATE = 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 0x1
KEEP_CAPABILITIES, NO_NEW_PRIVILEGES = 8, 38
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

PROCESSES = {
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.system",
    "os.exec",
    "os.spawn",
    "os.kill",
    "os.killpg",
    "pty.spawn",
    "subprocess.Popen",
}
CHANGES = {
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.rename",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
}


def call(function: str, *arguments: object) -> None:
    """Call a function of the C library; raise ``OSError`` if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def enter_namespaces() -> bool:
    """Move into namespaces without network, with private mounts and process numbers."""
    inside = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    user, group = os.getuid(), os.getgid()
    for flags in (inside, inside | NEW_USER) if user == 0 else (inside | NEW_USER,):
        try:
            call("unshare", flags)
            if flags & NEW_USER:
                for name, text in (
                    ("setgroups", "deny"),
                    ("uid_map", f"{user} {user} 1"),
                    ("gid_map", f"{group} {group} 1"),
                ):
                    with open(f"/proc/self/{name}", "w") as stream:
                        stream.write(text)
        except (OSError, AttributeError):
            continue
        return True
    return False


def seal_files(folder: str, size: int, owner: int) -> bool:
    """Make every mount read-only, put a small file system of its own on ``folder``."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    options = f"size={size},mode=0700".encode()
    try:
        call("mount", None, b"/", None, MS_RECURSIVE | MS_PRIVATE, None)
        call(
            "syscall",
            SYS_MOUNT_SETATTR,
            AT_FDCWD,
            b"/",
            AT_RECURSIVE,
            ctypes.byref(attributes),
            ctypes.sizeof(attributes),
        )
        call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, options)
        if owner != os.getuid():
            os.chown(folder, owner, owner)
        call("mount", b"tmpfs", b"/proc", b"tmpfs", 0, b"size=4k")
    except (OSError, AttributeError):
        return False
    return True


def limit(what: int, value: int) -> bool:
    """Set a resource limit, soft and hard, no higher than it is already; say whether it holds."""
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(what, (value, value))
    except (ValueError, OSError):  # macOS knows RLIMIT_AS by name only
        return False
    return True


def readable_by_others(*paths: str) -> bool:
    """Whether a user without rights of its own may open files below each path."""
    for path in paths:
        path = os.path.realpath(path)
        while True:
            if not os.stat(path).st_mode & 0o001:
                return False
            if path == os.path.dirname(path):
                break
            path = os.path.dirname(path)
    return True


def drop_privileges(user: int, keep_reading: bool) -> None:
    """Become ``user`` (if root) and give up every capability, but that of reading if need be."""
    kept = 1 << 2 if keep_reading else 0  # CAP_DAC_READ_SEARCH
    if os.getuid() != user:
        call("prctl", KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    call("capset", ctypes.byref(header), ctypes.byref(sets))
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def is_mapped(user: int) -> bool:
    """Whether this user namespace knows ``user``; read before ``/proc`` is covered."""
    try:
        with open("/proc/self/uid_map") as stream:
            ranges = [[int(word) for word in line.split()] for line in stream]
    except OSError:
        return False
    return any(first <= user < first + count for first, _, count in ranges)


def continue_in_child() -> None:
    """Go on in a child process; this one waits for it and ends as it ended."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)


def guard(folder: str, say: object) -> None:
    """Install the audit hook that ends the process at the first thing it must not do."""
    folder = os.path.realpath(folder)
    unix = 1  # socket.AF_UNIX

    def outside(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        name = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        return name != folder and not name.startswith(folder + os.sep) and name != os.devnull

    def refuse(what: str) -> None:
        say({"refused": what})  # type: ignore[operator]
        os._exit(1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and outside(path):
                refuse(f"writing {path!r}")
        elif event in PROCESSES:
            refuse(f"another process ({event})")
        elif event in CHANGES:
            paths = [a for a in arguments if isinstance(a, str | bytes)]
            if any(outside(path) for path in paths):
                refuse(f"{event} outside its folder")
        elif event.startswith("socket."):
            if event != "socket.__new__" or arguments[1] != unix:
                refuse(f"a socket ({event})")
        elif event.startswith("ctypes."):
            refuse(f"native code ({event})")

    sys.addaudithook(hook)


def main() -> None:
    """Run one program."""
    job = json.load(sys.stdin)
    folder, report = job["folder"], job["report"]

    def say(record: dict[str, object], _write: object = os.write) -> None:
        _write(report, json.dumps(record).encode() + b"\n")  # type: ignore[operator]

    limit(resource.RLIMIT_CPU, job["cpu_seconds"])
    limit(resource.RLIMIT_FSIZE, job["file_bytes"])
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 64)
    # A user of its own, so that the limit on processes counts this program's alone. Where the
    # interpreter itself lies in a private folder of root's, the right to read files stays.
    root = os.getuid() == 0
    keep_reading = root and not readable_by_others(os.__file__, *job["path"])
    spaces = "kernel" in job["layers"] and enter_namespaces()
    user = job["user"] if root and is_mapped(job["user"]) else os.getuid()
    sealed = spaces and seal_files(folder, job["folder_bytes"], user)
    if not sealed and user != os.getuid():
        os.chown(folder, user, user)
    if spaces:
        continue_in_child()  # the first process of the new process numbers
        continue_in_child()  # so that signals end the program as they would anywhere
    os.chdir(folder)
    dropped = True
    try:
        drop_privileges(user, keep_reading)
    except (OSError, AttributeError):
        dropped = False
    few = limit(resource.RLIMIT_NPROC, job["processes"])
    small = limit(resource.RLIMIT_AS, job["memory_bytes"])
    say(
        {
            "memory": "kernel" if small else "nobody",
            "network": "kernel" if spaces else "python",
            "files": "kernel" if sealed and dropped else "python",
            "processes": "kernel" if few and dropped and user != 0 else "python",
        }
    )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path += job["path"]
    code, token = job["program"], job["token"]
    if "python" in job["layers"]:
        guard(folder, say)
    try:
        exec(compile(code, "<program>", "exec"), {})
    except BaseException as error:
        last = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        say({"failed": last[:500]})
        os._exit(1)
    say({"passed": token})
    os._exit(0)


if __name__ == "__main__":
    main()
