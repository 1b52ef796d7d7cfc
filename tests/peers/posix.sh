#!/usr/bin/env bash
# Builds the third parties' file system tests once, at fixed versions, and prints the folder of their binaries:
# pjdfstest 0.2.2 (POSIX, BSD-2-Clause), fsx 0.3.2 (random operations beside a model, APSL-2.0).
set -euo pipefail
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/posix
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
for tool in pjdfstest@0.2.2 fsx@0.3.2; do
  mark=$cache/bin/$tool
  if [ ! -e "$mark" ]; then
    CARGO_TARGET_DIR=$cache/target cargo install --quiet --locked --root "$cache" "$tool" >&2
    touch "$mark"
  fi
done
rm -rf "$cache/target"
echo "$cache/bin"
