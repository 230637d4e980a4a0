"""Loads what every cell needs, once: cells are forked from the process that has imported this."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium  # noqa: F401
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import skyrl_async.environments.registry
import skyrl_async.learner.learner
import skyrl_async.learner.tiny_policy
import skyrl_async.preflight
import skyrl_async.rollout.embedded_engine
import skyrl_async.run
import skyrl_async.run_folder
import skyrl_async.runtime.learner_build
import skyrl_async.runtime.local
import skyrl_async.weight_sync.collective
import skyrl_async.weight_sync.publisher  # noqa: F401

# More threads would be started here, and do not survive a fork.
torch.set_num_threads(1)
