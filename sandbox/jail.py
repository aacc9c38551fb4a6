"""Confines the current process for code nobody has read: namespaces, no capabilities, a system call filter, limits.

Imported only by the process that `sandbox.runner` starts for one run (through `sandbox.judge`), never by the program
itself: what is done here cannot be undone. What is confined, and what is not, stands in `sandbox.runner`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 2, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_KILL, SECCOMP_EPERM, SECCOMP_ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
LINUX_CAPABILITY_VERSION_3 = 0x20080522

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
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    _check("unshare", _libc.unshare(flags))
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
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
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    _syscall("mount_setattr", ctypes.c_long(AT_FDCWD), NEW_ROOT.encode(), ctypes.c_uint(AT_RECURSIVE), attributes, size)
    _mount("tmpfs", NEW_ROOT + HOME, "tmpfs", MS_NOSUID | MS_NODEV, HOME_OPTIONS)
    os.chdir(NEW_ROOT)
    _syscall("pivot_root", b".", b".")
    _check("unmounting the old root", _libc.umount2(b".", MNT_DETACH))
    os.chdir(HOME)


# --- privileges, limits, system calls ---------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent is gone, so that none stays a zombie."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def drop_privileges(death_signal: int) -> None:
    """No capability, none to be gained by a program file, no debugger, and `death_signal` when the parent dies."""
    header, nothing = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0), struct.pack("=6I", *[0] * 6)
    _syscall("capset", header, nothing)
    _prctl(PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    _prctl(PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")
    _prctl(PR_SET_PDEATHSIG, death_signal, "PR_SET_PDEATHSIG")


def limit(memory_mb: int, cpu_seconds: int, processes: int | None = None) -> None:
    """Address space in MiB, CPU seconds, file size, open files, no core file; new tasks of this user where given."""
    wanted = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: 16 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes is not None:
        wanted[resource.RLIMIT_NPROC] = processes
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def filter_system_calls() -> None:
    """Installs the filter; a refused call fails with EPERM. Raises CannotConfine."""
    name = platform_name()
    refused = sorted({*_CALLS[name], *_SHARED_CALLS})
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[name]), (answer, 0, 0, SECCOMP_KILL), (load, 0, 0, 0)]
    program.append((at_least, len(refused) + 1, 0, 0x40000000))  # x86's second table of the same calls
    program += [(equal, len(refused) - place, 0, number) for place, number in enumerate(refused)]
    program += [(answer, 0, 0, SECCOMP_ALLOW), (answer, 0, 0, SECCOMP_EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    described = Program(len(program), ctypes.addressof(code))
    _prctl(PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    mode = ctypes.c_ulong(SECCOMP_MODE_FILTER)
    _check("PR_SET_SECCOMP", _libc.prctl(PR_SET_SECCOMP, mode, ctypes.byref(described)))
