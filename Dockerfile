# minilora serve on a CPU. Build: docker build -t minilora .   Run: see compose.yaml; docs/serve.md
# lists the folders to mount.
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/minilora
ENV PATH=/opt/minilora/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY minilora minilora
COPY kernels kernels
# Only torch comes from PyTorch's index, which has the build without CUDA.
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-cache-dir -r torch.txt --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -c constraints.txt '.[serve,gguf]'

FROM python:3.12.12-slim-bookworm
# The C compiler builds the CPU kernels at first use; MINILORA_CACHE stores them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin minilora
COPY --from=build /opt/minilora /opt/minilora
ENV PATH=/opt/minilora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    MINILORA_CACHE=/var/cache/minilora
RUN install -d -o 10001 -g 10001 "$MINILORA_CACHE"
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["minilora", "serve"]
CMD ["/models/base", "--host=0.0.0.0", "--adapter_folder=/adapters"]
