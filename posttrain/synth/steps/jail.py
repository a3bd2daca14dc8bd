"""What runs in the process of `sandbox`: it locks itself in, then runs a program. The standard library alone.

Two mechanisms of Linux that need no rights: Landlock (kernel 5.13) for files, seccomp for system calls. Nothing is run
if one of them cannot be had. Sources: docs.kernel.org/userspace-api/landlock.html and seccomp_filter.html.
"""

import ctypes
import json
import os
import platform
import resource
import stat
import struct
import sys

LOCKED = b"locked "
"""What the process says before it runs anything."""
EXECUTE, WRITE, READ, LIST = 1, 2, 4, 8
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
ACCESSES = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Version of Landlock -> how many kinds of access to files it knows; as the last one from there on."""
MACHINES = {
    "x86_64": (0xC000003E, {
        "clone": 56, "clone3": 435, "fork": 57, "vfork": 58, "socket": 41, "ptrace": 101, "setsid": 112, "setpgid": 109,
        "process_vm_readv": 310, "process_vm_writev": 311, "io_uring_setup": 425, "unshare": 272, "setns": 308,
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "bpf": 321, "keyctl": 250, "add_key": 248,
        "request_key": 249, "perf_event_open": 298, "userfaultfd": 323, "kexec_load": 246, "init_module": 175,
        "finit_module": 313, "reboot": 169, "open_by_handle_at": 304, "kill": 62, "tkill": 200, "pidfd_open": 434,
        "pidfd_send_signal": 424, "move_mount": 429, "fsopen": 430, "open_tree": 428, "mount_setattr": 442,
    }),
    "aarch64": (0xC00000B7, {
        "clone": 220, "clone3": 435, "socket": 198, "ptrace": 117, "setsid": 157, "setpgid": 154,
        "process_vm_readv": 270, "process_vm_writev": 271, "io_uring_setup": 425, "unshare": 97, "setns": 268,
        "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "bpf": 280, "keyctl": 219, "add_key": 217,
        "request_key": 218, "perf_event_open": 241, "userfaultfd": 282, "kexec_load": 104, "init_module": 105,
        "finit_module": 273, "reboot": 142, "open_by_handle_at": 265, "kill": 129, "tkill": 130, "pidfd_open": 434,
        "pidfd_send_signal": 424, "move_mount": 429, "fsopen": 430, "open_tree": 428, "mount_setattr": 442,
    }),
}  # fmt: skip
"""Machine -> (its number for seccomp, numbers of the calls that are filtered)."""


def main() -> None:
    """Lock the process in as the first argument says, then run the program in the second one."""
    limits, program = json.loads(sys.argv[1]), sys.argv[2]
    with open(program, encoding="utf-8") as file:
        parts = json.load(file)
    try:
        bound(limits["seconds"], limits["memory_mb"], limits["output_kb"])
        libc = ctypes.CDLL(None, use_errno=True)
        checked(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
        no_files(libc, limits["readable"])
        no_calls(libc)
    except (OSError, RuntimeError) as error:
        os.write(2, str(error).encode())
        os._exit(1)
    os.write(limits["said"], LOCKED)
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    sys.argv = ["answer.py"]
    for name, source in parts:
        exec(compile(source, name, "exec"), space)
    sys.stdout.flush()
    # The word comes through a pipe and is not asked for before the end: a program that exits early cannot say it.
    os.write(limits["said"], os.read(limits["word"], 64))


def bound(seconds: int, memory_mb: int, output_kb: int) -> None:
    """Limit processor time, memory, what is printed, and files that are open."""
    memory = memory_mb << 20
    for kind, most in (
        (resource.RLIMIT_CPU, seconds + 1), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, output_kb << 10),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


def no_files(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Forbid every access to files but reading below some folders, and the network and signals where Landlock can."""
    version = libc.syscall(CREATE_RULESET, 0, 0, 1)
    if version < 1:
        raise RuntimeError("this kernel has no Landlock (Linux 5.13 or later, and `landlock` among its `lsm`)")
    handled = (1 << ACCESSES.get(version, 16)) - 1
    form = struct.pack("QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = checked(libc.syscall(CREATE_RULESET, form, len(form), 0), "a Landlock ruleset")
    for path in (*readable, "/dev/null", "/dev/urandom", "/dev/zero"):
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        allowed = EXECUTE | READ | LIST if folder else READ | (WRITE if path == "/dev/null" else EXECUTE)
        checked(libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, handle), 0), f"a rule for {path}")
        os.close(handle)
    checked(libc.syscall(RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def no_calls(libc: ctypes.CDLL) -> None:
    """Forbid sockets, processes (threads stay), signals to others, and calls that change the machine."""
    if platform.machine() not in MACHINES:
        raise RuntimeError(f"no list of system calls for {platform.machine()}; known: {', '.join(MACHINES)}")
    number, calls = MACHINES[platform.machine()]
    load, equal, greater, bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
    steps = [(load, 0, 0, 4), (equal, 1, 0, number), (end, 0, 0, 0x80000000), (load, 0, 0, 0)]
    steps += [(greater, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # the other numbering of x86
    steps += [(equal, 0, 1, calls["clone3"]), (end, 0, 0, unknown)]  # so that clone is used, whose flags can be read
    for name, call in calls.items():
        if name not in ("clone", "clone3"):
            steps += [(equal, 0, 1, call), (end, 0, 0, refuse)]
    steps += [(equal, 0, 3, calls["clone"]), (load, 0, 0, 16), (bits, 1, 0, 0x10000), (end, 0, 0, refuse)]
    steps += [(end, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    form = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    checked(libc.prctl(22, 2, form, 0, 0), "a seccomp filter")


def checked(result: int, what: str) -> int:
    """Return the result of a call, or say what failed."""
    if result < 0:
        raise OSError(f"{what} was refused: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main()
