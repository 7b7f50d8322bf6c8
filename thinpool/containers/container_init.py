"""The first process of a container: ``python container_init.py PARENT_PID FD``.

From the descriptor it reads a JSON object: ``root`` (a mount point), ``command``, ``environment``, ``hostname``, ``workdir``, ``user`` (as in an
image's configuration: a name or number, a group's after a colon; nothing: root), and ``runtime``: null, or the words that run an OCI
bundle, to which ``bundle``, the directory with its config.json, belongs. None of it is in this process's own environment or arguments, for an
image says some of it, and must have no say in what runs outside of its container.

Run as a script, with nothing of thinpool loaded, so that it starts at once and has one thread. It becomes three::

    outer   unshares the namespaces, forwards signals, passes the exit status on; dies with PARENT
      init    PID 1 of the container: sets up the mounts, reaps orphans; dies with outer, and everything in the container with it
        command, or the OCI runtime, whose container has namespaces of its own below these

See namespaces(7), pid_namespaces(7), pivot_root(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import stat
import sys

TYPE_CHECKING = False  # typing would take as long to load as all the rest
if TYPE_CHECKING:
    from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x04000000, 0x08000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOT_FOUND, NOT_RUNNABLE = 127, 126
NO_COMMAND = "no such command in the container"
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    result = libc.mount(source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None)
    checked(result, f"mount on {target}")


def die_with_parent(parent: int) -> None:
    """SIGKILL when the parent ends; at once if it has ended already."""
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def make_devices(directory: str) -> None:
    mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k")
    for name, (major, minor) in DEVICES.items():
        os.mknod(f"{directory}/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(f"{directory}/{name}", 0o666)
    for name, target in LINKS.items():
        os.symlink(target, f"{directory}/{name}")
    os.mkdir(f"{directory}/pts")
    mount("devpts", f"{directory}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    os.mkdir(f"{directory}/shm")
    mount("shm", f"{directory}/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def mount_point(root: str, name: str) -> str:
    """A directory of the root file system, made if it has none; never a link that leads out of it."""
    path = f"{root}/{name}"
    if os.path.islink(path) or (os.path.lexists(path) and not os.path.isdir(path)):
        raise OSError(f"/{name} is no directory in the container's root file system")
    os.makedirs(path, exist_ok=True)
    return path


def enter_root(root: str, hostname: str) -> None:
    in_chroot = not keep_to_ourselves(root)
    mount(root, root, flags=MS_BIND | MS_REC)
    mount("proc", mount_point(root, "proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", mount_point(root, "sys"), "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    make_devices(mount_point(root, "dev"))
    os.chdir(root)
    if in_chroot:
        os.chroot(".")
    else:
        checked(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
        checked(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")
    name = hostname.encode()
    checked(libc.sethostname(name, len(name)), "sethostname")


def keep_to_ourselves(root: str) -> bool:
    """What is mounted from here on is not seen outside. False in a chroot, whose root is no mount point, as pivot_root wants it
    to be too: there only what is below the container's root is made private."""
    try:
        mount("none", "/", flags=MS_REC | MS_PRIVATE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        mount("none", root, flags=MS_REC | MS_PRIVATE)
        return False
    return True


def entries(path: str) -> list[list[str]]:
    """The lines of /etc/passwd or /etc/group, in fields."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return [line.rstrip("\n").split(":") for line in file if line.count(":") >= 3]
    except OSError:
        return []


def identity(user: str) -> tuple[int, int, list[int], str]:
    """User id, group id, other groups and home of a USER, by the container's own files (as Docker does it). Raises OSError."""
    name, _, group = user.partition(":")
    known = next((line for line in entries("/etc/passwd") if name in (line[0], line[2]) and len(line) >= 6), None)
    if known is None and not name.isdigit() and name:
        raise OSError(f"there is no user {name!r} in the container")
    uid = int(known[2]) if known else int(name or 0)
    gid = int(known[3]) if known else 0
    others = [gid]
    if group:
        line = next((line for line in entries("/etc/group") if group in (line[0], line[2])), None)
        if line is None and not group.isdigit():
            raise OSError(f"there is no group {group!r} in the container")
        gid = int(line[2]) if line else int(group)
        others = [gid]
    elif known:
        others += [int(line[2]) for line in entries("/etc/group") if known[0] in line[3].split(",") and line[2].isdigit()]
    return uid, gid, others, known[5] if known else "/"


def prepare(settings: dict[str, Any]) -> tuple[int, int, list[int]]:
    """In the container's root: its user, whose home joins the environment; and goes to the working directory, made if it is missing."""
    uid, gid, others, home = identity(settings["user"] or "0")
    settings["environment"].setdefault("HOME", home or "/")
    os.makedirs(settings["workdir"], exist_ok=True)
    os.chdir(settings["workdir"])
    return uid, gid, others


def default_signals() -> None:
    """As a program expects them."""
    for number in (*FORWARDED, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def run_command(settings: dict[str, Any]) -> None:
    """Becomes the command."""
    uid, gid, others = prepare(settings)
    if settings["user"]:
        os.setgroups(others)
        os.setgid(gid)
        os.setuid(uid)
    default_signals()
    status, why = NOT_FOUND, NO_COMMAND
    for path in candidates(settings):
        try:
            os.execve(path, settings["command"], settings["environment"])
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            status, why = NOT_RUNNABLE, error.strerror or "cannot be run"
    give_up(settings, status, why)


def give_up(settings: dict[str, Any], status: int, why: str) -> None:
    os.write(2, f"thinpool: {settings['command'][0]}: {why}\n".encode())
    os._exit(status)


def candidates(settings: dict[str, Any]) -> list[str]:
    """Where to look for the command. (os.execvp would import modules that are out of reach here.)"""
    program = settings["command"][0]
    if "/" in program:
        return [program]
    return [f"{directory}/{program}" for directory in settings["environment"].get("PATH", "/bin:/usr/bin").split(":")]


# --- with an OCI runtime ---


def complete_bundle(settings: dict[str, Any]) -> None:
    """Writes into config.json what only the container's own files say: who its user is, and whether there is such a command."""
    answer, telling = os.pipe()
    child = os.fork()
    if child == 0:
        os.chroot(settings["root"])
        os.chdir("/")
        uid, gid, others = prepare(settings)
        found = [path for path in candidates(settings) if os.path.exists(path)]
        if not found:
            give_up(settings, NOT_FOUND, NO_COMMAND)
        if not any(os.path.isfile(path) and os.access(path, os.X_OK) for path in found):
            give_up(settings, NOT_RUNNABLE, "Permission denied")
        os.write(telling, json.dumps([uid, gid, others, settings["environment"]["HOME"]]).encode())
        os._exit(0)
    os.close(telling)
    with os.fdopen(answer) as told:
        text = told.read()
    status = reap_until(child)
    if status != 0:
        os._exit(status)
    uid, gid, others, home = json.loads(text)
    path = f"{settings['bundle']}/config.json"
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    environment = {**settings["environment"], "HOME": home}
    config["process"]["env"] = [f"{name}={value}" for name, value in environment.items()]
    config["process"]["user"] = {"uid": uid, "gid": gid, "additionalGids": others}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)


def run_bundle(settings: dict[str, Any]) -> None:
    """Becomes the runtime."""
    default_signals()
    os.execve(settings["runtime"][0], settings["runtime"], {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")})


def exit_status(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


def forward_to(pid: int) -> None:
    """Signals for a program go to the process; those of a terminal reach it by themselves."""

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def reap_until(pid: int) -> int:
    """Reaps whatever ends, until it is that process; its exit status."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return exit_status(status)


def init(settings: dict[str, Any]) -> int:
    if settings["runtime"]:
        keep_to_ourselves(settings["root"])
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
            with contextlib.suppress(OSError):  # runtimes refuse a mixture of versions 1 and 2, and no group is needed here
                mount("none", "/sys/fs/cgroup", "cgroup2")
        complete_bundle(settings)
    else:
        enter_root(settings["root"], settings["hostname"])
    child = os.fork()
    if child == 0:
        run_bundle(settings) if settings["runtime"] else run_command(settings)
    forward_to(child)
    return reap_until(child)


def main(parent: int, descriptor: int) -> int:
    die_with_parent(parent)
    with os.fdopen(descriptor) as file:
        settings = json.load(file)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # what comes before there is a command waits for it
    checked(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID), "unshare")
    alive, held = os.pipe()  # init, in a PID namespace of its own, cannot see whether its parent is still there
    child = os.fork()
    if child == 0:
        os.close(held)
        checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        os.set_blocking(alive, False)
        try:
            os.read(alive, 1)
            os._exit(NOT_RUNNABLE)  # end of file: outer ended before the call above
        except BlockingIOError:
            os.close(alive)
        return init(settings)
    os.close(alive)
    forward_to(child)
    return reap_until(child)


if __name__ == "__main__":
    try:
        code = main(int(sys.argv[1]), int(sys.argv[2]))
    except OSError as failure:
        os.write(2, f"thinpool: cannot set up the container: {failure.strerror or failure}\n".encode())
        code = NOT_RUNNABLE
    os._exit(code)
