"""The service written the usual way: a Flask route around `nn.LSTM`, a loop per request.

What `benchmarks/serve.py` compares with. It is served by gunicorn with threads, from a folder of
models as Charloom keeps them:

    MODEL=models/demo THREADS=1 gunicorn --worker-class gthread --threads 8 'usual:create_app()'
"""

import os
from pathlib import Path

import torch
from decode import Naive
from flask import Flask, Response, jsonify, request

from charloom import checkpoint


def create_app() -> Flask:
    """The application."""
    loaded = checkpoint.load(Path(os.environ["MODEL"]))
    network = Naive(loaded)
    torch.set_num_threads(int(os.environ["THREADS"]))
    app = Flask(__name__)

    @app.post("/v1/completions")
    def complete() -> Response:
        fields = request.get_json()
        tokens = network.draw(1, fields["max_tokens"])[0]
        return jsonify({"choices": [{"text": loaded.tokenizer.decode(tokens)}]})

    return app
