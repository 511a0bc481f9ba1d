# syntax=docker/dockerfile:1
#   docker build --target cpu --tag millirec:cpu .
#   docker build --target gpu --tag millirec:gpu .     to be run with --gpus all
# The image serves and trains: its arguments are those of the command `millirec`. The service refuses to listen beyond
# loopback without API keys: give it MILLIREC_API_KEYS.

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/millirec
ENV PATH=/opt/millirec/bin:$PATH
WORKDIR /src
COPY pyproject.toml ./

FROM build AS wheel
COPY README.md LICENSE ./
COPY app ./app
COPY models ./models
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /dist .

# What the distribution needs goes in before its own code, so that a change of the code leaves the large layers alone.
FROM build AS needs
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['train'], sep='\n')" > needs.txt

FROM needs AS build-cpu
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)" \
    && pip install --requirement needs.txt --constraint requirements.txt faiss-cpu
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl

FROM needs AS build-gpu
COPY requirements-gpu.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --requirement needs.txt --constraint requirements-gpu.txt faiss-gpu-cuvs
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl

FROM python:3.11-slim-bookworm AS runtime
# Debian keeps only the newest revision of a package: a pinned one could not be installed after the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/millirec --shell /usr/sbin/nologin millirec
ENV PATH=/opt/millirec/bin:$PATH \
    MILLIREC_HOME=/var/lib/millirec \
    NUMBA_CACHE_DIR=/var/lib/millirec/compiled \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/millirec
# Bundles, and the spool of events.
VOLUME /var/lib/millirec
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["millirec"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/millirec /opt/millirec

FROM runtime AS cpu
COPY --from=build-cpu /opt/millirec /opt/millirec
