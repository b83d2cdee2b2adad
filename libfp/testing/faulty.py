"""A router that goes wrong when it is told to: ``python -m libfp.testing.faulty NAME PORT,PORT CORE,... OPTIONS``.

OPTIONS is a JSON object of options for `Application`. It prints {"name": NAME} when it forwards. Each line on its
standard input is a command, answered by one JSON line when it has been carried out:

    fault     the worker makes a system call (getpid) with the next packet
    stall     the worker stands still from the next packet on
    calm      but for a worker that stands still already, the others do not
    go        and moves again
    restart   the worker is stopped and started
    account   the worker is stopped, its frames are counted (`libfp.testing.frames`), and it is started again
    unfollow  the tables stay as they are, whatever Linux does
    stop      the application is stopped
    stop-worker N, start-worker N, add-worker CORE
              answered by {"ended": whether the thread has ended} or {"error": type, "said": its words}

It is a process of its own because what it is for leaves nothing usable behind: a worker that seccomp kills, or one
that is sealed and cannot come back from its loop, since whatever a thread does in order to end is a system call.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import sys
from typing import Any

from libfp import Error, Linux, Pipeline, stage
from libfp.jit import Arena, call, load_acquire64, pause, store_release64
from libfp.jit.libc import address_of
from libfp.stages import forward, parse
from libfp.tables import Hash
from libfp.testing.frames import frame_account


@stage
def faults(packet: Any, orders: Any) -> None:
    """Entry 0 is the address of a C function to call, entry 1 that of a word to wait for: it must be 0."""
    function, gate = orders.get(0, 0), orders.get(1, 0)
    if function != 0:
        call(function, 0, 0, 0, 0, 0, 0)
    if gate != 0:
        while load_acquire64(gate) != 0:
            pause()


def main(name: str, ports: str, core: str, options: str) -> None:
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
    orders = Hash(key="u64", value="u64", capacity=8)
    orders[0] = orders[1] = 0
    gate = Arena(64)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(gate))  # never freed: a worker may wait at it to the very end
    with Linux(*ports.split(",")) as linux:
        pipeline = Pipeline(parse, faults(orders), forward(linux))
        app = pipeline.start(linux.ports, [int(one) for one in core.split(",")], name=name, **json.loads(options))
        worker = app.workers[0]
        print(json.dumps({"name": name}), flush=True)
        for line in sys.stdin:
            command, answer = line.strip(), {}
            if command == "fault":
                orders[0] = address_of("getpid")
            elif command == "stall":
                store_release64(gate.address, 1)
                orders[1] = gate.address
            elif command == "calm":
                orders[1] = 0
            elif command == "go":
                orders[1] = 0
                store_release64(gate.address, 0)
            elif command == "restart":
                worker.restart()
            elif command == "account":
                worker.stop()
                answer = dataclasses.asdict(frame_account(worker))
                worker.start()
            elif command == "unfollow":
                linux.mirror.close()
            elif command == "stop":
                app.stop()
            elif (change := command.partition(" "))[0].endswith("-worker"):
                answer = _change(app, change[0], int(change[2]))
            else:
                raise ValueError(f"no command {command!r}")
            print(json.dumps(answer), flush=True)
        app.stop()


def _change(app: Any, what: str, number: int) -> dict[str, Any]:
    try:
        if what == "add-worker":
            app.add_worker(number)
        elif what == "start-worker":
            app.workers[number].start()
        else:
            return {"ended": app.workers[number].stop()}
    except Error as error:
        return {"error": type(error).__name__, "said": str(error)}
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
