"""Clients of a text service, many in one process: what `benchmarks/serve.py` loads services with.

    python benchmarks/clients.py --port 8000 --clients 64 --characters 200 --seconds 5 [--stream]

Each client sends its next request when the last one is answered, on a connection that it keeps.
HTTP is spoken on bare sockets with asyncio, so that the clients take little of the processor that
the service runs on; their own share is reported. Prints one JSON object.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field

PATIENCE = 60.0
"""Seconds after which an answer counts as hanging."""


@dataclass
class Tally:
    """What the clients have seen."""

    statuses: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds from a request to the first character of its answer."""
    whole: list[float] = field(default_factory=list)
    """Seconds from a request to the end of its answer."""


@dataclass(frozen=True)
class Plan:
    """What every client asks for."""

    host: str
    port: int
    path: str
    model: str
    prompt: str
    characters: int
    stream: bool

    def request(self, seed: int) -> bytes:
        """One whole request."""
        fields = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.characters,
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": seed,
            "stream": self.stream,
        }
        body = json.dumps(fields).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return int(lines[0].split(" ", 2)[1]), headers


async def read_chunks(reader: asyncio.StreamReader) -> list[tuple[float, bytes]]:
    """The chunks of a body, and when each came."""
    chunks: list[tuple[float, bytes]] = []
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return chunks
        chunks.append((time.perf_counter(), data[:-2]))


def characters_of(events: bytes) -> int:
    """How many characters the events of a stream carry."""
    count = 0
    for event in events.split(b"\n\n"):
        if event.startswith(b"data: {"):
            fields = json.loads(event[6:])
            if "error" in fields:
                raise ConnectionError(fields["error"]["message"])
            count += sum(len(choice["text"]) for choice in fields["choices"])
    return count


async def ask(
    plan: Plan, seed: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally
) -> bool:
    """Send one request and take its answer; whether the connection stays."""
    start = time.perf_counter()
    writer.write(plan.request(seed))
    status, headers = await read_head(reader)
    first = 0.0
    if headers.get("transfer-encoding") == "chunked":
        chunks = await read_chunks(reader)
        body = b"".join(data for _, data in chunks)
        first = next((moment for moment, data in chunks if data.startswith(b"data: ")), 0.0)
    else:
        body = await reader.readexactly(int(headers["content-length"]))
    end = time.perf_counter()
    tally.statuses[str(status)] += 1
    if status == 200:
        if plan.stream:
            tally.characters += characters_of(body)
            tally.first.append(first - start)
        else:
            tally.characters += sum(len(choice["text"]) for choice in json.loads(body)["choices"])
        tally.whole.append(end - start)
    return headers.get("connection", "").lower() != "close"


async def live(plan: Plan, number: int, until: float, left: list[int], tally: Tally) -> None:
    """One client: request after request until the time or the requests are over."""
    seed = number << 32
    while time.perf_counter() < until and left[0] > 0:
        try:
            reader, writer = await asyncio.open_connection(plan.host, plan.port)
        except OSError:
            tally.statuses["unreachable"] += 1
            await asyncio.sleep(0.1)
            continue
        try:
            stays = True
            while stays and time.perf_counter() < until and left[0] > 0:
                left[0] -= 1
                seed += 1
                async with asyncio.timeout(PATIENCE):
                    stays = await ask(plan, seed, reader, writer, tally)
        except TimeoutError:
            tally.statuses["hung"] += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            tally.statuses["cut"] += 1
        finally:
            writer.close()


def percentile(values: list[float], share: float) -> float | None:
    """The value that this share of all does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else None


async def run(plan: Plan, clients: int, seconds: float, requests: int) -> dict[str, object]:
    """Let the clients live, and say what they saw."""
    tally = Tally()
    start, processor = time.perf_counter(), time.process_time()
    left = [requests]
    await asyncio.gather(
        *(live(plan, number, start + seconds, left, tally) for number in range(clients))
    )
    wall = time.perf_counter() - start
    return {
        "seconds": wall,
        "statuses": dict(tally.statuses),
        "requests_per_second": len(tally.whole) / wall,
        "characters_per_second": tally.characters / wall,
        "first_median": percentile(tally.first, 0.5),
        "first_99": percentile(tally.first, 0.99),
        "whole_median": percentile(tally.whole, 0.5),
        "whole_99": percentile(tally.whole, 0.99),
        "processor_share": (time.process_time() - processor) / wall,
    }


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/completions")
    parser.add_argument("--model", default="bench")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--characters", type=int, default=200)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=1 << 60)
    parser.add_argument("--stream", action="store_true")
    chosen = parser.parse_args()
    plan = Plan(
        host=chosen.host,
        port=chosen.port,
        path=chosen.path,
        model=chosen.model,
        prompt=chosen.prompt,
        characters=chosen.characters,
        stream=chosen.stream,
    )
    print(json.dumps(asyncio.run(run(plan, chosen.clients, chosen.seconds, chosen.requests))))


if __name__ == "__main__":
    main()
