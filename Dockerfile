# userip_fast in a container: `userip` is what runs, /data is where it runs.
#
#   docker build -t userip .
#   docker run --rm -v "$PWD:/data" userip demo
#
# CPU by default. Where pip finds a CUDA build of torch first, name the index that has the CPU builds
# (the PyTorch site tells it): --build-arg TORCH="torch==2.13.0 --index-url URL".
#
# With the CUDA half of the extension and Triton, for an NVIDIA GPU:
#
#   docker build -t userip:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#     --build-arg CUDA=1 --build-arg EXTRAS=nf4,triton,ctr,tensorboard .
#   docker run --rm --gpus all -v "$PWD:/data" userip:cuda env
ARG BASE=python:3.12-slim
FROM ${BASE}

# The compiler stays: it builds the extension here, and Triton's launchers later.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && (command -v python3 >/dev/null \
     || apt-get install -y --no-install-recommends python3 python3-dev python3-venv) \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/userip
ENV PATH=/opt/userip/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

ARG TORCH="torch==2.13.0"
RUN pip install ${TORCH}

ARG CUDA=0
ARG EXTRAS=nf4,ctr,tensorboard
COPY . /src
RUN USERIP_FAST_CUDA=${CUDA} pip install "/src[${EXTRAS}]" && rm -rf /src \
 && python -c "from userip_fast.core import _extension as e; assert e.why_not() is None, e.why_not()"

RUN useradd --create-home userip && mkdir /data && chown userip /data
USER userip
WORKDIR /data
ENTRYPOINT ["userip"]
CMD ["--help"]
