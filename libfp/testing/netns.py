"""Private networks for tests and the demo: namespaces, veth pairs, addresses, routes, processes.

    with Lab() as lab:
        client, router = lab.host("client"), lab.host("router")
        lab.link(client, "c0", router, "r0")
        client.address("c0", "10.0.1.2/24")
        router.address("r0", "10.0.1.1/24")
        assert client.ping("10.0.1.1").received == 3

Root is needed, no program is (everything goes through netlink, ioctl and setns). The namespaces have no name in the
file system: only this process and those it starts hold them, so the kernel removes them, with everything in them, even
when this process is killed. To look inside one from a shell: ``nsenter --net=<host.path>``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import signal
import socket
import struct
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from libfp.errors import MissingCapability, Unsupported
from libfp.testing.ping import PingResult, ping
from libfp.testing.wait import wait_until

__all__ = ["Host", "Lab", "namespace_of", "wait_until"]

T = TypeVar("T")

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
IFA_F_NODAD = 2
MS_REC, MS_SLAVE = 0x4000, 1 << 19
MARK = "LIBFP_LAB"  # in the environment of what `marked` starts, every process of a Lab's: "pid:start time" of its own
_lab_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def namespace_of(pid: int) -> int | None:
    """The inode number of a process's network namespace; None when the process is gone or not ours to see."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _start_time(pid: int) -> str:
    """Tells a process from a later one with the same pid; empty when there is none (zombies count as gone)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _end(pids: set[int], grace: float = 2.0) -> None:
    """SIGTERM, then SIGKILL after `grace` seconds; returns when all are gone."""

    def alive() -> list[int]:
        return [pid for pid in pids if _start_time(pid)]

    for number, limit in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        for pid in alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not alive(), timeout=limit)


def marked(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (this process's, if none is given) of a process to start that is not to outlive this one:
    `sweep` finds it by that."""
    return {**(os.environ if env is None else env), MARK: f"{os.getpid()}:{_start_time(os.getpid())}"}


def sweep() -> set[int]:
    """End processes that were started with `marked`, as all of a Lab's are, by one that is dead; returns their pids."""
    orphans = set()
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                marks = [v for v in file.read().split(b"\0") if v.startswith(MARK.encode() + b"=")]
        except OSError:
            continue
        for mark in marks:
            owner, _, begun = mark.decode().partition("=")[2].partition(":")
            if not owner.isdigit() or _start_time(int(owner)) != begun:
                orphans.add(pid)
    _end(orphans)
    return orphans


class Lab:
    """Hosts (network namespaces) and links (veth pairs) that exist as long as the `with` block.

    At the end every process inside the namespaces is ended, sockets from `Host.socket` are closed and the links are
    removed, whatever happened in the block. `ipv6=False` switches IPv6 off in every host, so that no router
    solicitation or duplicate address detection appears among the packets a test counts.
    """

    def __init__(self, ipv6: bool = False) -> None:
        self.ipv6 = ipv6
        self.name = f"libfp-{os.getpid()}-{next(_lab_numbers)}"
        self.hosts: dict[str, Host] = {}
        self.aborted = False

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise MissingCapability("network namespaces need CAP_SYS_ADMIN and CAP_NET_ADMIN", "run as root")
        sweep()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; called by the end of the `with` block, and harmless when called again."""
        self._end_processes()
        for host in self.hosts.values():
            host._close()
        self.hosts.clear()

    def abort(self) -> None:
        """Make whoever works with this lab, in another thread, come to an end: its processes are ended, and whatever it
        asks of a host next raises InterruptedError. Its own `with` block then removes the lab. Can be repeated.
        """
        self.aborted = True
        self._end_processes()

    def _end_processes(self) -> None:
        inodes = {host.inode for host in list(self.hosts.values())}
        _end({pid for pid in _pids() if pid != os.getpid() and namespace_of(pid) in inodes})

    def host(self, name: str) -> Host:
        """A new network namespace with its loopback interface up."""
        if name in self.hosts:
            raise ValueError(f"this lab already has a host {name!r}")
        self.hosts[name] = Host(self, name, len(self.hosts) + 1)
        return self.hosts[name]

    def link(self, a: Host, a_name: str, b: Host, b_name: str, queues: int = 1, mtu: int = 1500) -> None:
        """A veth pair from `a` (as `a_name`) to `b` (as `b_name`), both ends up and with carrier.

        Each end has `queues` transmit and as many receive queues. MAC addresses are locally administered and the same
        in every run. Transmit checksumming is off on both ends: a veth never completes a checksum that was left to
        the hardware, and what leaves through AF_XDP would reach the far end with a wrong one.
        """

        def end(host: Host, name: str) -> dict[str, Any]:
            return {
                "ifname": name,
                "address": host._next_mac(),
                "mtu": mtu,
                "num_tx_queues": queues,
                "num_rx_queues": queues,
            }

        peer = end(b, b_name) | {"net_ns_fd": b._fd}
        a.netlink("link", "add", kind="veth", peer=peer, **end(a, a_name))
        for host, name in ((a, a_name), (b, b_name)):
            host.offload(name, "tx", False)
            host.up(name)
        for host, name in ((a, a_name), (b, b_name)):
            wait_until(lambda: host.has_carrier(name), what=f"carrier on {name}")  # noqa: B023

    def routed(self, first: str = "r0", second: str = "r1", *, queues: int = 1) -> tuple[Host, Host, Host]:
        """Hosts "client", "router" and "server", which Linux forwards between; the router's interfaces may have other
        names, and each end of a wire so many queues.

            client 10.0.1.2 (c0) -- r0 10.0.1.1 router r1 10.0.2.1 -- (s0) 10.0.2.2 server
        """
        client, router, server = (self.host(name) for name in ("client", "router", "server"))
        for number, (host, end, port) in enumerate(((client, "c0", first), (server, "s0", second)), 1):
            self.link(host, end, router, port, queues=queues)
            router.address(port, f"10.0.{number}.1/24")
            host.address(end, f"10.0.{number}.2/24")
            host.route("default", via=f"10.0.{number}.1")
        router.sysctl("net.ipv4.ip_forward", 1)
        return client, router, server


class Host:
    """One network namespace. A thread of its own lives in it; every operation that must happen inside runs there."""

    def __init__(self, lab: Lab, name: str, number: int) -> None:
        self.lab = lab
        self.name = f"{lab.name}-{name}"
        self._number = number
        self._macs = itertools.count(1)
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._processes: list[subprocess.Popen[Any]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self.name)
        self._ipr: Any = None
        try:
            self._fd: int = self.call(self._create)
        except OSError as error:
            self._thread.shutdown()
            raise Unsupported(
                f"cannot create a network namespace: {error}", "run as root on the host itself"
            ) from error
        self.inode = os.fstat(self._fd).st_ino

    def __repr__(self) -> str:
        return f"<Host {self.name}>"

    @property
    def path(self) -> str:
        """A path that opens this namespace while the lab's process lives: ``nsenter --net=<path>``."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def _create(self) -> int:
        from pyroute2 import IPRoute

        _check(_libc.unshare(CLONE_NEWNET | CLONE_NEWNS), "unshare")
        # A sysfs of its own, or programs started in here would see the outer namespace in /sys/class/net. Where a
        # container forbids mounting that view is wrong, and nothing in libfp reads it.
        if _libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None) == 0:
            _libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None)
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if not self.lab.ipv6 and os.path.isdir("/proc/sys/net/ipv6"):
            for scope in ("all", "default"):
                with open(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "w") as file:
                    file.write("1")
        self._ipr = IPRoute()
        self._ipr.link("set", index=1, state="up")
        return fd

    def _close(self) -> None:
        def close_inside() -> None:
            for link in list(self._ipr.get_links()):
                if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND"):  # all but the loopback
                    with contextlib.suppress(Exception):  # its peer's host may have been first
                        self._ipr.link("del", index=link["index"])
            self._ipr.close()

        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # a flush into a pipe that nobody reads any more
                        pipe.close()
        for sock in list(self._sockets):
            sock.close()
        self._thread.submit(close_inside).result()
        self._thread.shutdown()
        os.close(self._fd)

    # -- being inside

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a function in this host's thread (inside the namespace) and return its result."""
        if self.lab.aborted:
            raise InterruptedError(f"{self.lab.name} has been aborted")
        return self._thread.submit(function, *args, **kwargs).result()

    @contextlib.contextmanager
    def enter(self) -> Iterator[Host]:
        """The calling thread is inside the namespace meanwhile. Threads and processes started in here stay there."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(self._fd, CLONE_NEWNET), "setns")
            yield self
        finally:
            _check(_libc.setns(before, CLONE_NEWNET), "setns back")
            os.close(before)

    def popen(self, command: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """`subprocess.Popen` inside the namespace (the thread that forks is inside: no wrapper, no preexec)."""
        env = marked(kwargs.pop("env", None))
        process: subprocess.Popen[Any] = self.call(subprocess.Popen, command, env=env, **kwargs)
        self._processes.append(process)
        return process

    def run(self, command: Sequence[str], timeout: float = 10, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end; output is text. Raises subprocess.TimeoutExpired after `timeout` s."""
        process = self.popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        finally:
            self._processes.remove(process)
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        if check:
            done.check_returncode()
        return done

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM, protocol: int = 0) -> socket.socket:
        """A socket of this namespace, usable from any thread; closed with the lab at the latest."""
        sock = self.call(socket.socket, family, kind, protocol)
        self._sockets.add(sock)
        return sock

    def ping(self, address: str, count: int = 3, source: str = "", **kwargs: Any) -> PingResult:
        """Echo requests from here (`source`: from that address); see `libfp.testing.ping.ping` for the rest."""
        ipv4, ipv6 = (socket.AF_INET, socket.IPPROTO_ICMP), (socket.AF_INET6, socket.IPPROTO_ICMPV6)
        family, protocol = ipv6 if ":" in address else ipv4
        with self.socket(family, socket.SOCK_RAW, protocol) as sock:
            sock.bind((source, 0))
            return ping(sock, address, count, identifier=int(time.monotonic() * 1e6) & 0xFFFF, **kwargs)

    # -- configuration

    def netlink(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Any method of pyroute2's IPRoute, inside: ``host.netlink("rule", "add", iifname="r0", table=100)``."""
        return self.call(lambda: list(getattr(self._ipr, method)(*args, **kwargs) or ()))

    def index(self, name: str) -> int:
        """The interface's index. Raises OSError when there is none of that name."""
        return self.call(socket.if_nametoindex, name)

    def interfaces(self) -> list[str]:
        """The names of its interfaces, the loopback included."""
        return [link.get_attr("IFLA_IFNAME") for link in self.netlink("get_links")]

    def mac(self, name: str) -> str:
        """The interface's MAC address as "02:00:..."."""
        return str(self._link(name).get_attr("IFLA_ADDRESS"))

    def has_carrier(self, name: str) -> bool:
        """True when the interface is up and its lower layer is, by the kernel's operational state."""
        return bool(self._link(name).get_attr("IFLA_OPERSTATE") == "UP")

    def _link(self, name: str) -> Any:
        return self.netlink("get_links", self.index(name))[0]

    def _next_mac(self) -> str:
        return f"02:fb:00:{self._number:02x}:00:{next(self._macs):02x}"

    def up(self, name: str) -> None:
        """Set an interface up."""
        self.netlink("link", "set", index=self.index(name), state="up")

    def down(self, name: str) -> None:
        """Set an interface down."""
        self.netlink("link", "set", index=self.index(name), state="down")

    def set_mtu(self, name: str, mtu: int) -> None:
        """Give an interface another MTU, in bytes."""
        self.netlink("link", "set", index=self.index(name), mtu=mtu)

    def address(self, name: str, address: str, command: str = "add", **kwargs: Any) -> None:
        """Add "a.b.c.d/len" or "a:b::c/len" (without DAD) to an interface; `command="del"` removes it."""
        host, _, length = address.partition("/")
        if ":" in host:
            kwargs = {"family": socket.AF_INET6, "flags": IFA_F_NODAD} | kwargs
        length = length or ("128" if ":" in host else "32")
        self.netlink("addr", command, index=self.index(name), address=host, prefixlen=int(length), **kwargs)

    def route(
        self,
        prefix: str,
        via: str | None = None,
        dev: str | None = None,
        metric: int | None = None,
        table: int | None = None,
        command: str = "add",
        **kwargs: Any,
    ) -> None:
        """Add a route to a prefix, "default" or "::/0". `kwargs` go to pyroute2 (`type="blackhole"`, `multipath=`).

        `command` may be "add", "replace", "append", "change" or "del".
        """
        wanted: dict[str, Any] = {"dst": prefix, "gateway": via, "priority": metric, "table": table}
        wanted["oif"] = None if dev is None else self.index(dev)
        wanted["family"] = socket.AF_INET6 if ":" in prefix else socket.AF_INET
        self.netlink("route", command, **{k: v for k, v in wanted.items() if v is not None}, **kwargs)

    def unroute(self, prefix: str, **kwargs: Any) -> None:
        """Remove a route; takes what `route` takes."""
        self.route(prefix, command="del", **kwargs)

    def neighbour(self, name: str, address: str, mac: str | None, state: str = "permanent") -> None:
        """Set a neighbour entry; `mac=None` removes it."""
        if mac is None:
            self.netlink("neigh", "del", ifindex=self.index(name), dst=address)
        else:
            self.netlink("neigh", "replace", ifindex=self.index(name), dst=address, lladdr=mac, state=state)

    def sysctl(self, name: str, value: object | None = None) -> str:
        """Read a sysctl, or write it when a value is given: ``sysctl("net.ipv4.ip_forward", 1)``.

        Dots separate as in sysctl(8); write an interface name that has dots with slashes instead of dots throughout.
        """
        path = "/proc/sys/" + (name if "/" in name else name.replace(".", "/"))

        def access() -> str:
            if value is not None:
                with open(path, "w") as file:
                    file.write(str(value))
            with open(path) as file:
                return file.read().strip()

        return self.call(access)

    def offload(self, name: str, feature: str, on: bool) -> None:
        """Switch an offload by ethtool's legacy ioctl: "rx", "tx" (checksums), "sg", "tso", "gso" or "gro"."""
        command = {"rx": 0x15, "tx": 0x17, "sg": 0x19, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}[feature]
        value = ctypes.create_string_buffer(struct.pack("II", command, on), 8)
        request = struct.pack("16sP", name.encode(), ctypes.addressof(value)).ljust(40, b"\0")
        with self.socket() as sock:
            fcntl.ioctl(sock, 0x8946, request)  # SIOCETHTOOL
