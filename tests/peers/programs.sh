#!/usr/bin/env bash
# Programs that the tests of the mount run on it, installed once: rsync, fio, stress-ng from Debian; pyarrow, DuckDB and boto3, at fixed versions, in a virtual
# environment of their own. Prints the folder of the environment.
set -euo pipefail
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers/programs
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
missing=()
for program in rsync fio stress-ng git; do command -v "$program" >/dev/null || missing+=("$program"); done
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ "${#missing[@]}" -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "install first: ${missing[*]}" >&2; exit 1; }
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq "${missing[@]}" >/dev/null
fi
home=$cache/python-2
if [ ! -e "$home/ok" ]; then
  rm -rf "$home"
  python3 -m venv "$home"
  "$home/bin/pip" -q install pyarrow==21.0.0 duckdb==1.4.1 boto3==1.40.40 >&2
  touch "$home/ok"
fi
echo "$home"
