"""One of two processes that share a step; keeps what it saw. Run by `test_feature_trainer.py`."""

import os
import sys
from pathlib import Path

import posttrain_tiny as small
import torch

if __name__ == "__main__":
    out = Path(sys.argv[1])
    trainer = small.train(out / "run", per_device_train_batch_size=4, ddp_backend="gloo")
    rank = trainer.args.process_index
    assert trainer.args.world_size == 2
    term = small.FeatureLoss(small.table(), small.saes(), weight=small.WEIGHT, scale="published")
    other = small.train(out / "run", term, per_device_train_batch_size=4, ddp_backend="gloo")
    logs = {"log": trainer.state.log_history[0], "published": other.state.log_history[0]}
    torch.save({"gradients": trainer.gradients[0], **logs}, out / f"{rank}.pt")
    # The wrapped model and accelerate keep the group and its threads alive, and a thread that gives back a tensor
    # while the interpreter ends aborts the process.
    os._exit(0)
