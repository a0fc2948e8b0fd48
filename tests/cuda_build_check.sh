#!/usr/bin/env bash
# Does the CUDA build work, on a machine that may have no GPU?
#
# In an environment of its own (build/cuda-env, torch 2.14.1 with CUDA): builds for sm_80 and sm_90a, imports,
# lists the registered CUDA ops. Then shows that a CPU build made against another torch loads there too.
set -euo pipefail
cpu_python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
env=build/cuda-env
python=$PWD/$env/bin/python

step() { printf '\n== %s\n' "$*"; }

step "environment"
if [ ! -e $env/.ready ]; then
  python3 -m venv $env
  $env/bin/pip install --quiet torch==2.14.1 numpy 'setuptools>=77' wheel ninja pybind11
  touch $env/.ready
fi
$python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'

step "build for sm_80 and sm_90a"
rm -rf build/cuda-wheel build/cuda-site build/cpu-wheel build/cpu-site build/lib* build/temp*
start=$SECONDS
BIGKERN_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0a" \
  $python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/cuda-wheel .
echo "built in $((SECONDS - start)) s"
$python -m pip install --quiet --no-deps --target build/cuda-site build/cuda-wheel/*.whl

step "import and list"
cd build  # so that the source tree is not what gets imported
PYTHONPATH=cuda-site $python - <<'PY'
import torch, bigkern
from bigkern.core import info
from bigkern.core.library import SCHEMAS
print(info.summary())
assert info.has_cuda_kernels(), "the build holds no CUDA kernels"
names = ["bigkern_native::" + schema.split("(")[0] for schema in SCHEMAS]
on_cuda = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
print("registered for CUDA:", ", ".join(on_cuda))
missing = {"attention", "attention_backward", "norm", "norm_backward", "adam"} - {n.split("::")[1] for n in on_cuda}
assert not missing, f"not registered for CUDA: {missing}"
print(len(info.kernels()), "kernels compiled in")
PY
cd ..

step "a CPU build against $($cpu_python -c 'import torch; print("torch", torch.__version__)') under this torch"
rm -rf build/lib* build/temp*
BIGKERN_CUDA=0 $cpu_python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/cpu-wheel .
$python -m pip install --quiet --no-deps --target build/cpu-site build/cpu-wheel/*.whl
cd build
PYTHONPATH=cpu-site $python - <<'PY'
import torch, bigkern
from bigkern.core import info
assert info.import_error is None, info.import_error
print(info.summary(), "- built with torch", info.build()["torch"], "- running under", torch.__version__)
q = torch.randn(2, 4, 64, 32)
with bigkern.use("cpu"):
    ours = bigkern.attention(q, q, q, causal=True)
stock = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(ours, stock)
print("attention agrees with stock")
PY
echo
echo "cuda-build-check: passed"
