# Two images, built from the repository's root:
#   docker build --target distill -t masters-distill .    everything, for a machine with a GPU:   docker run --gpus all -v "$PWD:/work" masters-distill distill recipe.yaml
#   docker build --target runtime -t masters-runtime .    the base install, to serve one bundle:  docker run -p 8000:8000 -e MASTERS_API_KEY -v "$PWD/bundle:/bundle:ro" masters-runtime
# The server listens to other machines, so it asks for a key: export MASTERS_API_KEY before; without it the container stops with a line that says so.
# docs/docker.md tells how each RUN line was proved; tests/test_dockerfile.py keeps this file in step with pyproject.toml.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY LICENSE README.md constraints.txt pyproject.toml *.py ./
COPY demo demo
COPY distill distill
COPY export export
COPY runtime runtime
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . && cp constraints.txt /wheels

# torch's wheels bring CUDA 13's libraries themselves, so the smallest of NVIDIA's bases is enough. It adds what no wheel has: the driver check
# before start, and the compatibility libraries with which an older data-centre driver runs CUDA 13.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS distill
# gcc and Python's headers: Triton compiles a launcher for each kernel when it first runs.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/masters
ENV PATH=/opt/masters/bin:$PATH
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt "$(ls /wheels/masters-*.whl)[all]"
WORKDIR /work
ENTRYPOINT ["masters"]
CMD ["--help"]

FROM python:3.11-slim-bookworm AS runtime
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt "$(ls /wheels/masters-*.whl)[serve]"
RUN useradd --uid 10001 --create-home masters
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["masters"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "8000"]
