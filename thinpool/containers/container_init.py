"""The first process of a container: ``python container_init.py PARENT_PID ROOT HOSTNAME USER WORKDIR COMMAND [ARG...]``.

USER is as in an image's configuration: a name or number, a group's after a colon; nothing: root.

Run as a script, with nothing of thinpool loaded, so that it starts at once and has one thread. It becomes three::

    outer   unshares the namespaces, forwards signals, passes the exit status on; dies with PARENT
      init    PID 1 of the container: sets up the mounts, reaps orphans; dies with outer, and everything in the container with it
        command

Its environment is the command's. See namespaces(7), pid_namespaces(7), pivot_root(2).
"""

import contextlib
import ctypes
import errno
import os
import signal
import stat
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x04000000, 0x08000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOT_FOUND, NOT_RUNNABLE = 127, 126
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


def become(user: str, workdir: str) -> None:
    """Takes on the user, and goes where the command is to run; a working directory that is missing is made."""
    uid, gid, others, home = identity(user or "0")
    os.environ.setdefault("HOME", home or "/")
    os.makedirs(workdir, exist_ok=True)
    os.chdir(workdir)
    if user:
        os.setgroups(others)
        os.setgid(gid)
        os.setuid(uid)


def run_command(command: list[str]) -> None:
    """Becomes the command."""
    for number in (*FORWARDED, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status, why = NOT_FOUND, "no such command in the container"
    for path in candidates(command[0]):
        try:
            os.execv(path, command)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            status, why = NOT_RUNNABLE, error.strerror or "cannot be run"
    os.write(2, f"thinpool: {command[0]}: {why}\n".encode())
    os._exit(status)


def candidates(program: str) -> list[str]:
    """Where to look for it. (os.execvp would import modules that are out of reach here.)"""
    if "/" in program:
        return [program]
    return [f"{directory}/{program}" for directory in os.environ.get("PATH", "/bin:/usr/bin").split(":")]


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


def init(root: str, hostname: str, user: str, workdir: str, command: list[str]) -> int:
    enter_root(root, hostname)
    child = os.fork()
    if child == 0:
        become(user, workdir)
        run_command(command)
    forward_to(child)
    return reap_until(child)


def main(parent: int, root: str, hostname: str, user: str, workdir: str, *command: str) -> int:
    die_with_parent(parent)
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
        return init(root, hostname, user, workdir, list(command))
    os.close(alive)
    forward_to(child)
    return reap_until(child)


if __name__ == "__main__":
    try:
        code = main(int(sys.argv[1]), *sys.argv[2:])
    except OSError as failure:
        os.write(2, f"thinpool: cannot set up the container: {failure.strerror or failure}\n".encode())
        code = NOT_RUNNABLE
    os._exit(code)
