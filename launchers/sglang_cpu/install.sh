#!/usr/bin/env bash
# install.sh VENV [VERSION]: an environment in which SGLang's own wheel serves text models on a CPU.
#
# About two minutes and 2.2 GB; a second run changes nothing. PYTHON names the interpreter (default
# python3, 3.11 or newer). VERSION is 0.5.21 unless given; 0.5.23 works too, and serves adapters.
# Servers of qwen2, qwen3, qwen3_moe and llama models start faster with the variables in
# VENV/sglang_fast_start.env, which skyrl_async applies by itself.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: install.sh VENV [VERSION]" >&2
    exit 2
fi
venv=$1 version=${2:-0.5.21}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1

[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python
"$python" -m pip install --quiet -r "$here/requirements.txt"
# SGLang requires CUDA packages that a CPU server never imports; of these only what it does import.
"$python" -m pip install --quiet --no-deps "sglang==$version" \
    triton==3.7.1 torchvision==0.28.0 xgrammar==0.2.7 compressed-tensors==0.18.0

site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$here/shim/." "$site/"
for module in torchvision_on_cpu pinned_memory_on_cpu; do
    echo "import $module" >"$site/$module.pth"
done

# SGLang imports all its models at every start; these are the ones to leave out.
disabled=$(find "$site/sglang/srt/models" -maxdepth 1 -name '*.py' -printf '%f\n' |
    sed 's/\.py$//' | grep -vxE '__init__|registry|utils|llama|qwen2|qwen2_moe|qwen3|qwen3_moe' |
    sort | paste -sd,)
echo "SGLANG_DISABLED_MODEL_ARCHS=$disabled" >"$venv/sglang_fast_start.env"

SGLANG_USE_CPU_ENGINE=1 "$python" -W ignore -c \
    'import sglang, sglang.srt.server_args; print("sglang", sglang.__version__)'
