#!/bin/sh
# Octavo on a machine where nothing can be installed: its compiled kernels and its package in build/gpu, used by
# PYTHONPATH=build/gpu. It needs python3 with torch, triton, nanobind, cmake and ninja, and a C++ compiler.
#
#     sh benchmarks/gpu/setup.sh
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
site=build/gpu
work=build/gpu-cmake
mkdir -p "$site"
rm -rf "$site/octavo"
cp -R src/octavo "$site/octavo"
cmake -S . -B "$work" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSKBUILD=1 \
  -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" >"$work.log" 2>&1 &&
  cmake --build "$work" >>"$work.log" 2>&1 &&
  cmake --install "$work" --prefix "$site" >>"$work.log" 2>&1 ||
  { tail -n 20 "$work.log" >&2; echo "no compiled kernels: the CPU computes with torch" >&2; }
PYTHONPATH=$site "$python" -c '
import torch, triton
from octavo import kernels
import octavo.llm, octavo.bench.measure, octavo.train.trainer
print(f"torch {torch.__version__}, triton {triton.__version__}, {kernels.backend()}, {kernels.threads()} threads")'
