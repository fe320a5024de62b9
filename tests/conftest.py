"""One thread: the models are tiny, and threads would only wait for each other (also in subprocesses)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
