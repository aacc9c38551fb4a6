"""Confines the current process for code nobody has read: namespaces, no capabilities, a system call filter, limits.

Imported only by the process that `sandbox.runner` starts for one run (`sandbox.worker`), never by the program
itself: what is done here cannot be undone. What is confined, and what is not, stands in `sandbox.runner`.
"""

from __future__ import annotations

import _signal as signal  # the public `signal` around it imports enum, which costs 5 ms a run
import ctypes
import os
import resource
import struct

# Namespaces: clone(2), unshare(2).
CLONE_NEWNS = 0x00020000  # mounts
CLONE_NEWUTS = 0x04000000  # host name
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# Mounts: mount(2), umount2(2), mount_setattr(2).
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY = 1

# Privileges: prctl(2), capset(2).
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# The filter's answers: seccomp(2). EPERM is what a refused call fails with.
SECCOMP_MODE_FILTER = 2
SECCOMP_KILL = 0x80000000
SECCOMP_EPERM = 0x00050001
SECCOMP_ALLOW = 0x7FFF0000

# The filter's instructions: linux/bpf_common.h.
BPF_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
BPF_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
BPF_JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
BPF_RETURN = 0x06  # BPF_RET | BPF_K
X32_CALLS = 0x40000000  # from this number on x86_64 has its calls a second time

NEW_ROOT = "/proc"  # the one directory that every Linux has and that no file needed below lies in
HOME = "/tmp"  # in the new root
HOME_OPTIONS = "size=16m,nr_inodes=1024,mode=700"
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store")
FILES = ("/dev/null", "/dev/urandom", "/etc/ld.so.cache", "/etc/localtime")

# System calls by number, the same on both machines from 424 on. Refused: new tasks and programs, signals, sockets (a
# socket pair stays), other processes' memory, mounts and namespaces, kernel services, memory that RLIMIT_AS misses.
_SHARED_CALLS = (424, 425, 428, 429, 430, 432, 434, 435, 438, 442, 447)
_CALLS = {
    "x86_64": (
        *(56, 57, 58, 59, 322),  # clone, fork, vfork, execve, execveat
        *(62, 200, 234, 129, 297),  # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
        *(41, 42, 49, 44),  # socket, connect, bind, sendto
        *(101, 310, 311),  # ptrace, process_vm_readv, process_vm_writev
        *(165, 166, 155, 161, 272, 308),  # mount, umount2, pivot_root, chroot, unshare, setns
        *(248, 249, 250, 298, 321, 323, 246),  # add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd, kexec
        *(319, 29, 68, 64, 240),  # memfd_create, shmget, msgget, semget, mq_open
        *(109, 112, 157),  # setpgid, setsid, prctl
        13,  # rt_sigaction: a handler would be handed the frame of a test
    ),
    "aarch64": (
        *(220, 221, 281),
        *(129, 130, 131, 138, 240),
        *(198, 203, 200, 206),
        *(117, 270, 271),
        *(40, 39, 41, 51, 97, 268),
        *(217, 218, 219, 241, 280, 282, 104),
        *(279, 194, 186, 190, 180),
        *(154, 157, 167),
        134,
    ),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SYSCALLS = {
    "x86_64": {"pivot_root": 155, "mount_setattr": 442, "capset": 126},
    "aarch64": {"pivot_root": 41, "mount_setattr": 442, "capset": 91},
}


class CannotConfine(Exception):
    """Confinement is not possible here; the message says which step was refused."""


_libc = ctypes.CDLL(None, use_errno=True)


def _check(step: str, result: int) -> None:
    """Raises CannotConfine where a call of libc failed."""
    if result < 0:
        raise CannotConfine(f"{step}: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, value: int, step: str) -> None:
    zero = ctypes.c_ulong(0)
    _check(step, _libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero))


def _syscall(name: str, *arguments: object) -> None:
    number = _SYSCALLS[platform_name()][name]
    _check(name, _libc.syscall(ctypes.c_long(number), *arguments))


def platform_name() -> str:
    """`x86_64` or `aarch64`. Raises CannotConfine on any other machine: system calls are called by number."""
    machine = os.uname().machine
    if machine not in _CALLS or struct.calcsize("P") != 8:
        raise CannotConfine(f"machine {machine} is not supported, only 64-bit x86_64 and aarch64 are")
    return machine


# --- namespaces -------------------------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Own user, mount, net, pid, ipc and uts namespaces, and a root that holds libraries alone; cwd is HOME.

    The pid namespace begins with the next child. Raises CannotConfine.
    """
    platform_name()
    uid = os.getuid()
    gid = os.getgid()
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    _check("unshare", _libc.unshare(flags))

    # Inside, the user keeps the own numbers and has no others. An unprivileged process may map groups only once it has
    # given up changing them.
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    try:
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise CannotConfine(f"mapping the user: {error.strerror}") from error

    _new_root()


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    result = _libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3])
    _check(f"mount {source} on {target}", result)


def _new_root() -> None:
    """A small tmpfs with the libraries bound into it, everything read-only, and a private HOME."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")

    # What the interpreter needs to start and the code to import the standard library.
    standard_library = os.path.dirname(os.path.realpath(os.__file__))
    folders = dict.fromkeys([*filter(os.path.isdir, LIBRARIES), standard_library, os.path.dirname(os.__file__)])
    for folder in folders:
        if any(folder != other and folder.startswith(other + "/") for other in folders):
            continue  # comes with its parent
        os.makedirs(NEW_ROOT + folder, exist_ok=True)
        _mount(folder, NEW_ROOT + folder, None, MS_BIND | MS_REC)
    for file in filter(os.path.exists, FILES):
        os.makedirs(os.path.dirname(NEW_ROOT + file), exist_ok=True)
        os.close(os.open(NEW_ROOT + file, os.O_CREAT | os.O_WRONLY, 0o444))
        _mount(file, NEW_ROOT + file, None, MS_BIND)
    os.makedirs(NEW_ROOT + HOME, exist_ok=True)

    # A bind mount ignores MS_RDONLY, and a remount would forget its other flags: all of it at once becomes read-only.
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    _syscall("mount_setattr", ctypes.c_long(AT_FDCWD), NEW_ROOT.encode(), ctypes.c_uint(AT_RECURSIVE), attributes, size)
    _mount("tmpfs", NEW_ROOT + HOME, "tmpfs", MS_NOSUID | MS_NODEV, HOME_OPTIONS)

    # The new root is laid over the old one, which is then taken from under it.
    os.chdir(NEW_ROOT)
    _syscall("pivot_root", b".", b".")
    _check("unmounting the old root", _libc.umount2(b".", MNT_DETACH))
    os.chdir(HOME)


# --- privileges, limits, system calls ---------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent is gone, so that none stays a zombie."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def drop_privileges() -> None:
    """No capability, none to be gained by a program file, no debugger, and death when the parent dies.

    Raises CannotConfine.
    """
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    nothing = struct.pack("=6I", *[0] * 6)
    _syscall("capset", header, nothing)
    _prctl(PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    _prctl(PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, "PR_SET_PDEATHSIG")


def limit(memory_mb: int, cpu_seconds: int) -> None:
    """Address space in MiB, CPU seconds, file size, open files, no core file, no new tasks of this user.

    A hard limit that is lower already stays.
    """
    wanted = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: 16 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def protect(confined: bool, memory_mb: int, cpu_seconds: int) -> None:
    """Privileges dropped, limits set as `limit` takes them, system calls filtered.

    Without confinement what of it this machine allows.

    Raises:
        CannotConfine: a step was refused, where `confined`.
    """
    limit(memory_mb, cpu_seconds)
    for step in (drop_privileges, filter_system_calls):
        try:
            step()
        except CannotConfine:
            if confined:
                raise


def filter_system_calls() -> None:
    """Installs the filter; a refused call fails with EPERM. Raises CannotConfine."""
    name = platform_name()
    refused = sorted({*_CALLS[name], *_SHARED_CALLS})

    # Instructions are (code, jump if true, jump if false, operand); a jump counts the instructions it passes over. The
    # machine is looked at first, since the numbers mean other calls on another one.
    program = [
        (BPF_LOAD, 0, 0, 4),  # seccomp_data.arch
        (BPF_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[name]),
        (BPF_RETURN, 0, 0, SECCOMP_KILL),
        (BPF_LOAD, 0, 0, 0),  # seccomp_data.nr
        (BPF_JUMP_AT_LEAST, len(refused) + 1, 0, X32_CALLS),
    ]
    for place, number in enumerate(refused):
        program.append((BPF_JUMP_EQUAL, len(refused) - place, 0, number))
    program.append((BPF_RETURN, 0, 0, SECCOMP_ALLOW))
    program.append((BPF_RETURN, 0, 0, SECCOMP_EPERM))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    described = Program(len(program), ctypes.addressof(code))
    _prctl(PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    mode = ctypes.c_ulong(SECCOMP_MODE_FILTER)
    _check("PR_SET_SECCOMP", _libc.prctl(PR_SET_SECCOMP, mode, ctypes.byref(described)))
