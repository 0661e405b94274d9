# One image per service, built from shared layers: `docker compose build`, or
# `docker build --target teacher .`. These images run on the CPU; on a GPU machine start from a CUDA image.
#
# On Linux, a plain `pip install torch` downloads several gigabytes of CUDA. To avoid that, pass the URL of PyTorch's CPU
# wheel index as a build argument: `docker compose build --build-arg PIP_EXTRA_INDEX_URL=...`.

FROM python:3.11-slim-bookworm AS base
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY constraints.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt torch transformers
COPY shared shared
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt ./shared
RUN useradd --create-home --uid 10001 hyperagent && mkdir /data && chown hyperagent /data
VOLUME /data

FROM base AS teacher
COPY services/teacher services/teacher
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt ./services/teacher
USER hyperagent
EXPOSE 8701
ENTRYPOINT ["hyperagent", "serve", "teacher"]

FROM base AS trainer
COPY services/trainer services/trainer
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt ./services/trainer
USER hyperagent
EXPOSE 8702
ENTRYPOINT ["hyperagent", "serve", "trainer"]

FROM base AS adapter_api
COPY services/adapter_api services/adapter_api
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt ./services/adapter_api
USER hyperagent
EXPOSE 8703
ENTRYPOINT ["hyperagent", "serve", "adapter-api"]

# The demo starts all three services itself, so its image contains all of them.
FROM base AS demo
COPY services services
COPY demo demo
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --constraint constraints.txt ./services/teacher ./services/trainer ./services/adapter_api ./demo
COPY configs configs
USER hyperagent
ENTRYPOINT ["hyperagent", "demo"]
