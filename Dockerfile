# The serving image: no torch, no compiler, no root, nothing to write to but /tmp.
#
#   docker build --tag charloom .
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume ./models:/models:ro \
#       --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges charloom
#
# Settings are environment variables (docs/operations.md). compose.yaml has the same, with nginx and
# Redis where they are wanted.

FROM python:3.13-slim-trixie AS build
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1

# What it needs, first and alone: this layer stays while only the code changes.
COPY pyproject.toml constraints.txt ./
RUN python -m venv --without-pip /opt/charloom \
    && python -c "import tomllib; from pathlib import Path; project = tomllib.loads(Path('pyproject.toml').read_text())['project']; extras = project['optional-dependencies']; print(*project['dependencies'], *extras['serve'], *extras['redis'], sep='\n')" > requirements.txt \
    && python -m pip --python /opt/charloom/bin/python install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY README.md ./
COPY charloom charloom
COPY training training
COPY service service
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir wheels . \
    && python -m pip --python /opt/charloom/bin/python install --no-cache-dir --no-deps wheels/charloom-*.whl

FROM python:3.13-slim-trixie
COPY --from=build /opt/charloom /opt/charloom
RUN groupadd --gid 10001 charloom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin charloom
ENV PATH=/opt/charloom/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CHARLOOM_MODELS=/models
WORKDIR /
VOLUME /models
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('CHARLOOM_PORT', '8000') + '/healthz', timeout=2).read()"]
STOPSIGNAL SIGTERM
CMD ["charloom", "serve", "--host", "0.0.0.0"]
