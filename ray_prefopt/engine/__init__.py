"""Engines: what holds weights and optimizer, and moves them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns in every process when it has to find out
