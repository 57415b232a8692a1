"""How fast texts are served: Charloom beside the service that is usually written.

    python benchmarks/serve.py                    # the whole table
    python benchmarks/serve.py --only throughput  # one part: throughput, first, overload, memory,
                                                  # start

One model of 2 x 512 with 65 characters. The usual service is a Flask route around eager `nn.LSTM`
with a loop per request (`benchmarks/usual.py`), under gunicorn with 8 threads, 8 clients and its
better number of torch threads. The bare engine writes the same texts in a process of its own,
without any service. All run on this machine, one after another within each round, and so do the
clients (`benchmarks/clients.py`), in a process of their own. Figures are medians over the rounds.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import onnxruntime
from decode import MODELS, make_checkpoint
from machine import describe

from charloom import checkpoint as checkpoints
from charloom.checkpoint import Checkpoint, ModelWriter
from charloom.decoding.request import Prompt, Request
from charloom.model import Model
from charloom.params import SamplingParams

HERE = Path(__file__).parent
NAME = "bench"
CLIENTS = 64
CHARACTERS = 200
USUAL_CLIENTS = 8

Figures = dict[str, Any]


def keep(checkpoint: Checkpoint, models: Path) -> Path:
    """Put a model into a folder, as training would."""
    with ModelWriter(models / NAME, mode="new") as writer:
        writer.commit(
            architecture=checkpoint.architecture,
            tokenizer=checkpoint.tokenizer,
            tensors=checkpoint.tensors,
            token_counts=checkpoint.token_counts,
            documents=checkpoint.documents,
            summary=checkpoint.summary,
            trainer=None,
        )
    return models / NAME


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A service and the port that it says it listens on, ended afterwards."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stderr=log, text=True, env={**os.environ, **environment}, cwd=HERE
        )
        try:
            yield process, _find_port(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _find_port(process: subprocess.Popen[str], log: Any) -> int:
    """The port in what the service has written, waiting for it."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        log.seek(0)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read())
        if found:
            return int(found[1])
        time.sleep(0.002)
    log.seek(0)
    raise RuntimeError(f"the service did not start:\n{log.read()}")


@contextmanager
def charloom_service(models: Path, **environment: str) -> Iterator[tuple[int, int]]:
    """`charloom serve`: its process and its port, ready."""
    # A folder of its own, or it would find the engine of the service before, about to end.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        command = [sys.executable, "-m", "charloom", "serve", "--models", folder, "--port", "0"]
        with running(command, CHARLOOM_LOG_LEVEL="warning", **environment) as (process, port):
            wait_until_ready(port)
            members = family(process.pid)
            yield process.pid, port
        # The engine stays a little for workers to come back, and whoever shares its libraries'
        # pages meanwhile seems smaller than it is.
        while any(Path(f"/proc/{member}").exists() for member in members):
            time.sleep(0.1)


@contextmanager
def usual_service(model: Path, threads: int) -> Iterator[int]:
    """The service written the usual way: its port, warm."""
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "usual:create_app()"]
    command += ["--worker-class", "gthread", "--threads", str(USUAL_CLIENTS), "--no-control-socket"]
    with running(command, MODEL=str(model), THREADS=str(threads)) as (_, port):
        ask(port, 10)
        yield port


def wait_until_ready(port: int) -> None:
    """Return once the service says that it takes requests."""
    until = time.monotonic() + 60
    while True:
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # it does not listen yet
        finally:
            connection.close()
        if time.monotonic() > until:
            raise RuntimeError("the service does not become ready")
        time.sleep(0.002)


def ask(port: int, characters: int) -> None:
    """One request, so that everything is loaded."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": NAME, "prompt": "", "max_tokens": characters})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {text.decode()}")


def load(port: int, *arguments: object) -> Figures:
    """What the clients saw of a service."""
    command = [sys.executable, str(HERE / "clients.py"), "--port", str(port)]
    command += [str(argument) for argument in arguments]
    figures: Figures = json.loads(subprocess.check_output(command))
    return figures


def bare_engine(model: Path) -> float:
    """Characters a second of the engine by itself, as the service sets it up."""
    output = subprocess.check_output([sys.executable, __file__, "--engine", str(model)])
    return float(output)


def write_alone(model: Path) -> float:
    """Characters a second of 64 texts at once that follow each other without a pause."""
    threads = max(len(os.sched_getaffinity(0)) - 1, 1)
    loaded = Model(
        checkpoints.load(model),
        threads=threads,
        own_thread=False,
        spinning=False,
        capacity=CLIENTS,
    )
    engine = loaded.engine("auto")
    params = SamplingParams(max_tokens=CHARACTERS, temperature=0.8, top_p=0.95)

    def submit(seed: int) -> Any:
        prompt = Prompt(loaded.tokenizer.encode(""))
        return engine.submit(Request(prompt=prompt, params=params, seed=seed))

    handles = {submit(seed) for seed in range(CLIENTS)}
    characters, seed = 0, CLIENTS
    start, until = time.perf_counter(), time.perf_counter() + 4.0
    while handles:  # as the clients do: what is begun is ended, and the whole time counts
        engine.step()
        for handle in [handle for handle in handles if handle.take()]:
            handles.remove(handle)
            characters += len(handle.outcome.text)
            if time.perf_counter() < until:
                handles.add(submit(seed))
                seed += 1
    return characters / (time.perf_counter() - start)


def throughput(models: Path, rounds: int) -> None:
    """Print characters a second: usual service, bare engine, Charloom, Charloom streaming."""
    model = models / NAME
    rates: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    latest: list[float] = []

    def note(what: str, rate: float, share: float = 0.0) -> None:
        rates.setdefault(what, []).append(rate)
        shares.setdefault(what, []).append(share)

    for _ in range(rounds):
        for threads in (1, len(os.sched_getaffinity(0))):
            with usual_service(model, threads) as port:
                seen = load(port, "--clients", USUAL_CLIENTS, "--seconds", 6)
                note(f"usual service, {threads} torch threads", *_rate(seen))
        note("bare engine", bare_engine(model))
        with charloom_service(models) as (_, port):
            ask(port, 10)
            for what, extra in (("whole answers", ()), ("streams", ("--stream",))):
                seen = load(port, "--clients", CLIENTS, "--seconds", 6, *extra)
                note(what, *_rate(seen))
                if extra:
                    latest.append(seen["first_99"])
    middle = {what: statistics.median(values) for what, values in rates.items()}
    usual = max(rate for what, rate in middle.items() if what.startswith("usual"))
    print(
        f"{CHARACTERS} characters a request; {CLIENTS} clients, {USUAL_CLIENTS} of the usual one\n"
    )
    print("| | characters/s | against the usual service | of the bare engine | clients' share |")
    print("|---|---:|---:|---:|---:|")
    for what, rate in middle.items():
        print(
            f"| {what} | {rate:,.0f} | {rate / usual:.1f} | {rate / middle['bare engine']:.0%} | "
            f"{statistics.median(shares[what]):.0%} |"
        )
    print(
        f"\nfirst character, {CLIENTS} streams, 99th percentile: "
        f"{statistics.median(latest) * 1e3:.0f} ms"
    )


def _rate(seen: Figures) -> tuple[float, float]:
    """Characters a second and the clients' share of a processor; all must have been answered."""
    assert set(seen["statuses"]) == {"200"}, seen["statuses"]
    return seen["characters_per_second"], seen["processor_share"]


def first_character(models: Path, rounds: int) -> None:
    """Print how long one client waits for the first character of a stream."""
    with charloom_service(models) as (_, port):
        ask(port, 10)
        prompt = "".join(map(chr, range(0x4E00, 0x4E00 + 20)))
        waits = [
            load(port, "--clients", 1, "--seconds", 2, "--stream", "--prompt", prompt)
            for _ in range(rounds)
        ]
    median = statistics.median(seen["first_median"] for seen in waits)
    print(f"first character, one client, prompt of 20, median: {median * 1e3:.2f} ms")


def overload(models: Path, rounds: int) -> None:
    """Print what 500 clients get from a queue of 128."""
    with charloom_service(models, CHARLOOM_QUEUE="128") as (_, port):
        ask(port, 10)
        best, crowd = [], []
        for _ in range(rounds):
            best.append(load(port, "--clients", CLIENTS, "--seconds", 5))
            crowd.append(load(port, "--clients", 500, "--seconds", 5))
    statuses: dict[str, int] = {}
    for seen in crowd:
        for status, count in seen["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    rate = statistics.median(seen["characters_per_second"] for seen in crowd)
    full = statistics.median(seen["characters_per_second"] for seen in best)
    print(
        f"500 clients, queue of 128: {statuses}; those served get {rate:,.0f} characters/s, "
        f"{rate / full:.0%} of what {CLIENTS} clients get"
    )


def memory(models: Path, requests: int) -> None:
    """Print the resident memory after 1,000 requests and after many more."""
    with charloom_service(models) as (pid, port):
        load(port, "--clients", CLIENTS, "--requests", 1_000, "--seconds", 600, "--characters", 20)
        early = resident(pid)
        load(
            port,
            *("--clients", CLIENTS, "--requests", requests - 1_000),
            *("--seconds", 3600, "--characters", 20),
        )
        late = resident(pid)
    print(
        f"proportional memory after 1,000 requests {early / 1e6:.0f} MB, after {requests:,} "
        f"{late / 1e6:.0f} MB: {late / early - 1:+.1%}"
    )


def start(models: Path, rounds: int) -> None:
    """Print how long it takes from the command to readiness, and the memory then."""
    seconds, sizes = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        with charloom_service(models) as (pid, port):
            seconds.append(time.perf_counter() - begun)
            ask(port, 10)
            sizes.append(resident(pid))
    print(
        f"start to ready: {statistics.median(seconds):.2f} s, "
        f"{statistics.median(sizes) / 1e6:.0f} MB in all processes"
    )


def family(pid: int) -> list[int]:
    """The numbers of a process and of all below it."""
    members = [pid]
    for member in members:
        for task in Path(f"/proc/{member}/task").iterdir():
            members += map(int, (task / "children").read_text().split())
    return members


def resident(pid: int) -> int:
    """Bytes of memory of a process and all below it, shared pages counted once."""
    total = 0
    for member in family(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def main() -> None:
    """Read the command line and print what it asks for."""
    parts: dict[str, Callable[[Path], None]] = {
        "throughput": lambda models: throughput(models, chosen.rounds),
        "first": lambda models: first_character(models, chosen.rounds),
        "overload": lambda models: overload(models, chosen.rounds),
        "memory": lambda models: memory(models, chosen.requests),
        "start": lambda models: start(models, chosen.rounds),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=parts, action="append", help="this part alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100_000, help="of the part memory")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.engine:
        print(write_alone(chosen.engine))
        return
    print(f"{describe(onnxruntime=onnxruntime.__version__)}\n")
    with tempfile.TemporaryDirectory() as folder:
        keep(make_checkpoint(*MODELS["2x512"]), Path(folder))
        for name in chosen.only or parts:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
