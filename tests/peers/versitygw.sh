#!/usr/bin/env bash
# Builds versitygw (an independent S3 server in Go: signatures checked, If-Match honoured) once, and prints its path.
# Go 1.26 or newer, or an older one that may fetch its toolchain through the module proxy.
set -euo pipefail
version=v1.8.0
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers
bin=$cache/versitygw-$version
if [ ! -x "$bin" ]; then
  export PATH=$PATH:/usr/local/go/bin
  command -v go >/dev/null || { echo "versitygw needs Go 1.26 (apt-get install golang, or https://go.dev/dl)" >&2; exit 1; }
  mkdir -p "$cache"
  exec 9>"$cache/lock"; flock 9
  if [ ! -x "$bin" ]; then
    tmp=$(mktemp -d "$cache/build.XXXX")
    GOBIN=$tmp CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "github.com/versity/versitygw/cmd/versitygw@$version" >&2
    mv "$tmp/versitygw" "$bin"; rmdir "$tmp"
  fi
fi
echo "$bin"
