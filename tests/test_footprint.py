import json
import platform
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from charloom.architecture import Architecture
from service.engine.footprint import estimate

NETWORK = Architecture(cell="lstm", vocabulary=100, embedding=64, hidden=512, layers=2)


def test_more_of_anything_takes_more() -> None:
    """Wider, deeper, with more tokens, rows, engines or states kept, a model is larger."""
    base = estimate(NETWORK, ["int8"], rows=64, cache=0)
    larger = [
        estimate(replace(NETWORK, **{name: 2 * getattr(NETWORK, name)}), ["int8"], rows=64, cache=0)
        for name in ("vocabulary", "embedding", "hidden", "layers")
    ]
    larger += [
        estimate(NETWORK, ["int8", "float32"], rows=64, cache=0),
        estimate(NETWORK, ["float32"], rows=64, cache=0),
        estimate(NETWORK, ["int8"], rows=65, cache=0),
    ]
    assert min(larger) > base
    assert estimate(NETWORK, ["int8"], rows=64, cache=1 << 20) == base + (1 << 20)
    assert estimate(NETWORK, [], rows=64, cache=0) >= 4 * NETWORK.parameters


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and its C library")
@pytest.mark.parametrize("kernel", ["int8", "float32"])
@pytest.mark.parametrize(
    "network",
    [
        NETWORK,
        Architecture(cell="gru", vocabulary=3000, embedding=128, hidden=256, layers=2),
        # So large that the first layer is not folded into a table.
        Architecture(cell="lstm", vocabulary=12000, embedding=64, hidden=400, layers=1),
    ],
)
def test_the_estimate_is_near_what_a_process_takes(network: Architecture, kernel: str) -> None:
    """Neither half as much again nor two thirds of it, with all rows in use."""
    program = """
        import ctypes, gc, json, sys
        from pathlib import Path
        import numpy as np
        from charloom.architecture import Architecture
        from charloom.checkpoint import Checkpoint
        from charloom.decoding.request import Prompt, Request
        from charloom.model import Model
        from charloom.params import SamplingParams
        from charloom.tokenizer import CharacterTokenizer

        def private():
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is free is not the model's
            for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
                if line.startswith("Private_Dirty"):
                    return int(line.split()[1]) * 1024

        def open_model(architecture, kernel, rows):
            rng = np.random.default_rng(0)
            size = architecture.vocabulary
            model = Model(
                Checkpoint(
                    path=Path("memory"), architecture=architecture,
                    tokenizer=CharacterTokenizer([chr(0x4E00 + i) for i in range(size - 2)]),
                    tensors={name: rng.uniform(-0.1, 0.1, shape).astype(np.float32)
                             for name, shape in architecture.tensor_shapes().items()},
                    token_counts=np.ones(size, np.int64), documents="none", summary={},
                    fingerprint="0" * 64,
                ),
                threads=1, own_thread=False, spinning=False, capacity=rows, cache=0,
            )
            engine = model.engine(kernel)
            for seed in range(rows):
                engine.submit(Request(
                    prompt=Prompt(np.array([3], np.int32)), seed=seed,
                    params=SamplingParams(max_tokens=8, top_p=0.9, frequency_penalty=0.1),
                ))
            while engine.step():
                pass
            return model

        network, kernel = json.loads(sys.argv[1]), sys.argv[2]
        tiny = Architecture(cell="rnn", vocabulary=9, embedding=2, hidden=4, layers=1)
        open_model(tiny, kernel, 2)
        before = private()
        model = open_model(Architecture(**network), kernel, 64)
        print(json.dumps([private() - before, model.kernels]))
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), json.dumps(network.to_json()), kernel],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    measured, kernels = json.loads(output)
    assert 0.67 < estimate(network, kernels, rows=64, cache=0) / measured < 1.5
