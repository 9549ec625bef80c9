#!/bin/sh
# Sets up a real Triton server on this machine without Docker, in an environment of its own (default .venv-serve): the
# tritonserver with the Python backend that NVIDIA packs into nvidia-pytriton, tritonclient, MLServer, ONNX Runtime.
# tests/shipping/test_triton_serving.py and benchmarks/soak.py start it from there. Does nothing when it is complete.
#
#   scripts/serve-env.sh [FOLDER]
#   PYTHON     chooses the interpreter: 3.11 or 3.12
#   PIP_ARGS   more arguments for pip
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-${PASSDEPLOY_SERVE_ENV:-$root/.venv-serve}}
pytriton=0.7.0
mark=.made-by-serve-env
stamp="pytriton $pytriton, mlserver, 1"
[ "$(cat "$folder/complete" 2>/dev/null || true)" = "$stamp" ] && { echo "$folder: complete"; exit 0; }
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "serve-env: tritonserver is packed for Linux x86_64 only" >&2; exit 2; }

if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.11 python3.12 python3; fi
python=
for candidate; do
  command -v "$candidate" >/dev/null || continue
  version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || continue
  case $version in 3.11 | 3.12) python=$candidate; break ;; esac
done
[ -n "$python" ] || { echo "serve-env: needs Python 3.11 or 3.12, tried $* (set PYTHON)" >&2; exit 2; }

if [ -d "$folder" ] && [ -n "$(ls -A "$folder")" ] && [ ! -f "$folder/$mark" ] && [ ! -f "$folder/complete" ]; then
  echo "serve-env: $folder is not empty and was not made by this script; name another folder" >&2
  exit 2
fi
rm -rf "$folder"
"$python" -m venv "$folder"
touch "$folder/$mark"
# Without its dependencies: of nvidia-pytriton only the server is used. Its Python backend corrupts tensors beside numpy 2.
# shellcheck disable=SC2086  # PIP_ARGS is a list
"$folder/bin/pip" install ${PIP_ARGS:-} -q --disable-pip-version-check --no-deps "nvidia-pytriton==$pytriton"
# shellcheck disable=SC2086
"$folder/bin/pip" install ${PIP_ARGS:-} -q --disable-pip-version-check \
  "numpy<2" "onnxruntime>=1.23" "tritonclient[grpc,http]>=2.51" "mlserver>=1.7.1" 2>&1 | grep -v -e "^nvidia-pytriton" -e "dependency resolver" || true
"$folder/bin/python" -c 'import numpy, onnxruntime, tritonclient.grpc, tritonclient.http'
"$folder/bin/python" -c 'import mlserver'  # on its own: both bring the same protobuf messages

# The backend's stub embeds Python: the interpreter's own library will do, else the system's.
library=libpython$version.so.1.0
own=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR") or "")')
if [ -e "$own/$library" ]; then
  libpython=$own
elif ldconfig -p 2>/dev/null | grep -q "$library" || [ -e "/usr/lib/x86_64-linux-gnu/$library" ]; then
  libpython=/usr/lib/x86_64-linux-gnu
elif [ "$(id -u)" = 0 ] && apt-get install -y -q "libpython$version" >/dev/null 2>&1; then
  libpython=/usr/lib/x86_64-linux-gnu
else
  echo "serve-env: $library is missing; apt-get install libpython$version" >&2
  exit 2
fi

site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$folder/triton"
cp -r "$site/pytriton/tritonserver/bin" "$site/pytriton/tritonserver/backends" "$folder/triton/"
cp "$site/pytriton/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" "$folder/triton/backends/python/"
chmod +x "$folder/triton/bin/tritonserver" "$folder/triton/backends/python/triton_python_backend_stub"
echo "$site/nvidia_pytriton.libs:$libpython" >"$folder/triton/library_path"
echo "$stamp" >"$folder/complete"
echo "$folder: complete"
