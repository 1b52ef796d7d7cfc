#!/usr/bin/env bash
# Unmodified Spark from PyPI, each version in a virtual environment of its own.
#   spark.sh VERSION URI FOLDER [KEY=VALUE ..]   runs jobs.py against a file system, its local files in FOLDER; keys are Spark's
#   spark.sh VERSION prepare                     prints the folder of the environment
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers/spark
version=$1; shift

missing=()
command -v java >/dev/null || missing+=(openjdk-17-jdk-headless)
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ "${#missing[@]}" -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "install first: ${missing[*]}" >&2; exit 1; }
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi
home=$cache/$version
if [ ! -x "$home/ok" ]; then
  mkdir -p "$cache"
  exec 9>"$cache/lock"; flock 9
  if [ ! -x "$home/ok" ]; then
    rm -rf "$home"
    python3 -m venv "$home"
    "$home/bin/pip" -q install "pyspark==$version" >&2
    install -m 755 /dev/null "$home/ok"
  fi
  exec 9>&-
fi
[ "${1:-}" != prepare ] || { echo "$home"; exit 0; }
unset HADOOP_CONF_DIR
exec "$home/bin/python" "$here/jobs.py" "$@"
