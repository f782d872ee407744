# syntax=docker/dockerfile:1
# How to build and use it: docs/container.md
FROM python:3.11-slim

# torch.compile, which nnU-Net uses on GPUs, compiles with gcc, and with g++ what stays on the CPU.
# No versions are pinned (DL3008): a Debian release keeps but one of each, and drops the older ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nnunet_ima
COPY LICENSE README.md constraints.txt pyproject.toml setup.cfg ./
COPY nnunet_ima nnunet_ima
COPY trainers trainers
COPY evaluation evaluation
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt .

# Where nnU-Net finds our trainers; the build fails if they are elsewhere.
ENV nnUNet_extTrainer=/usr/local/lib/python3.11/site-packages/nnunet_ima/trainers
RUN test "$(nnunet_ima trainers)" = "$nnUNet_extTrainer"

# nnU-Net's folders, in one place to be mounted.
ENV nnUNet_raw=/data/nnUNet_raw \
    nnUNet_preprocessed=/data/nnUNet_preprocessed \
    nnUNet_results=/data/nnUNet_results \
    OMP_WAIT_POLICY=PASSIVE

# Not root, and no trouble for any other user that `docker run --user` names: a home that all may write to, and a name,
# which torch.compile asks for.
RUN useradd --uid 1000 --home-dir /opt/nnunet --create-home nnunet \
    && mkdir -p /data/nnUNet_raw /data/nnUNet_preprocessed /data/nnUNet_results \
    && chown -R nnunet /data \
    && chmod 1777 /opt/nnunet
ENV HOME=/opt/nnunet USER=nnunet
USER 1000
WORKDIR /data

# No entry point: what stands after the image's name is the command, nnunet_ima or any of nnU-Net's.
CMD ["nnunet_ima", "--help"]
