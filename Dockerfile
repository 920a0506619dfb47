# An image with the program, and the environment that scripts/environment makes.
#
#     docker build --tag qat .
#     docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" qat stage=all recipe=own_data data.path=chats.jsonl
#
# PyTorch's wheels bring the libraries of CUDA. The base image tells NVIDIA's container runtime which driver they need.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Triton and torch.compile compile with gcc and Python's headers. The program records its commit with git.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/gpt-oss-qat
# The environment is made before the rest is copied, so that a change of the program does not install everything again.
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY recipes recipes
COPY scripts/environment scripts/environment
COPY pipeline/__init__.py pipeline/__init__.py
RUN PIP_NO_CACHE_DIR=1 bash -c 'source scripts/environment'
COPY pipeline pipeline
COPY scripts scripts

# Any user may run the image (docker run --user "$(id -u):$(id -g)"), so that files in /work belong to that user.
# PyTorch asks for a user name, which such a user has only in the environment.
RUN useradd --create-home qat && chmod 1777 /home/qat
ENV HOME=/home/qat \
    HF_HOME=/work/.cache/huggingface \
    PATH=/opt/gpt-oss-qat/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    USER=qat
USER qat
WORKDIR /work
ENTRYPOINT ["gpt-oss-qat"]
