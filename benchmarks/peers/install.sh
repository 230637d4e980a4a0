#!/bin/bash
# Makes a virtual environment for a comparison: benchmarks/peers/install.sh NAME DIR
#   buffers   TorchRL and TransferQueue, with this package  (benchmarks/replay_buffer.py)
#   trl       TRL                                           (benchmarks/peers/run.py)
#   torchrl   TorchRL and Ray                               (benchmarks/peers/run.py)
#   tunix     Tunix                                         (benchmarks/peers/run.py)
#   trackers  wandb, MLflow, Trackio, with the tests        (tests/metrics/test_trackers_real.py)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
usage="usage: $0 buffers|trl|torchrl|tunix|trackers DIR"
name=${1:?$usage} dir=${2:?$usage}
case $name in
    buffers) packages=(-c "$root/constraints.txt" -e "$root" torchrl==0.14.1 tensordict==0.14.3
        TransferQueue==0.1.11) ;;
    trl) packages=(torch==2.13.0 trl==1.16.0 transformers==5.23.0) ;;
    torchrl) packages=(torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3 transformers==5.23.0
        ray==2.60.0) ;;
    tunix) packages=(torch==2.13.0 google-tunix==0.1.7 jax==0.10.2 flax==0.12.8
        transformers==5.12.1) ;;
    trackers) packages=(-c "$root/constraints.txt" -e "$root[test,wandb,mlflow,trackio]") ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
python3 -m venv "$dir"
"$dir/bin/pip" install "${packages[@]}"
