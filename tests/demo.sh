#!/usr/bin/env bash
# The main job on real parts: an S3 server, a bucket of real files, Forebay over it; cold, warm, and what it was like without.
# usage: demo.sh FOREBAY S3SERVER [--once]
set -euo pipefail
bin=$1 s3=$2 once=${3:-}
work=$(mktemp -d /tmp/forebay-demo.XXXXXX)
export S3_ACCESS_KEY=demo S3_SECRET_KEY=demosecret
pids=()
cleanup() {
  for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; done
  for p in "${pids[@]}"; do wait "$p" 2>/dev/null || true; done
  umount "$work/data/worker/mem.ro" 2>/dev/null || true
  umount "$work/data/worker/mem" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
wait_for() { # file, text
  for _ in $(seq 300); do grep -q "$2" "$1" 2>/dev/null && return 0; sleep 0.1; done
  echo "no '$2' in $1 after 30 s:" >&2; cat "$1" >&2; return 1
}

say "1. A real S3 server (s3s-fs, signatures checked) on loopback, with an empty bucket"
mkdir -p "$work/s3/bucket"
"$s3" "$work/s3" 0 >"$work/s3.log" 2>&1 & pids+=($!)
wait_for "$work/s3.log" READY
endpoint=$(sed -n 's/^READY //p' "$work/s3.log")
echo "$endpoint, bucket s3://bucket"

say "2. forebay local, with the bucket mounted on /s3"
"$bin" local --data-dir "$work/data" --mem 1GiB --any-port \
  --mount "/s3=s3://bucket,endpoint=$endpoint,region=us-east-1,access_key_id=$S3_ACCESS_KEY,secret_access_key=$S3_SECRET_KEY" \
  >"$work/local.log" 2>&1 & pids+=($!)
wait_for "$work/local.log" 'Stop with'
export FOREBAY_MASTER; FOREBAY_MASTER=$(sed -n 's/.*master \([0-9.:]*\),.*/\1/p' "$work/local.log" | head -1)
head -2 "$work/local.log"
fb() { "$bin" "$@"; }
fb fs mount

say "3. A few hundred MiB of real files into the bucket"
mkdir -p "$work/src/docs" "$work/src/sources"
doc=$(rustc --print sysroot 2>/dev/null)/share/doc
if [ -d "$doc" ]; then find "$doc" -type f -name '*.html' | head -400 | while read -r f; do cp "$f" "$work/src/docs/$(echo "${f#"$doc"/}" | tr '/' '_')"; done || true; fi
find "$HOME/.cargo/registry/src" -type f -name '*.rs' -size +20k 2>/dev/null | head -300 | while read -r f; do cp "$f" "$work/src/sources/$(basename "$(dirname "$f")")_$(basename "$f")"; done || true
{ printf 'PAR1'; head -c $((256 * 1024 * 1024 - 8)) /dev/urandom; printf 'PAR1'; } >"$work/src/table.parquet"
fb fs put --write-type ufs_only "$work/src" /s3/data
fb fs count /s3/data

say "4. The first read is cold: it comes from S3, and is cached on the way"
rate() { # label, bytes, command...
  local label=$1 size=$2 t0 t1; shift 2
  t0=$(date +%s%N); "$@" >/dev/null; t1=$(date +%s%N)
  awk -v l="$label" -v b="$size" -v n=$((t1 - t0)) 'BEGIN { printf "%-46s %8.1f MiB in %6.3f s  %8.0f MiB/s\n", l, b / 1048576, n / 1e9, b / 1048576 / (n / 1e9) }'
}
size=$(stat -c %s "$work/src/table.parquet")
rate "cold, forebay fs cat" "$size" fb fs cat /s3/data/table.parquet
say "5. The second comes out of memory, through a passed descriptor"
rate "warm, forebay fs cat" "$size" fb fs cat /s3/data/table.parquet
[ "$(fb fs cat /s3/data/table.parquet | sha256sum)" = "$(sha256sum <"$work/src/table.parquet")" ] && echo "same bytes as were put in (SHA-256)"
say "6. Beside plain S3 and plain pread, in the same run (a program that stays: no process start per file)"
fb bench read --size 128MiB --passes 3 --operations 2000 --cold /s3/data/table.parquet \
  --ufs-option endpoint="$endpoint" --ufs-option region=us-east-1 --ufs-option access_key_id=$S3_ACCESS_KEY --ufs-option secret_access_key=$S3_SECRET_KEY 2>/dev/null
say "7. Where the blocks are, and what moved which way"
fb fs cat /s3/data/table.parquet >/dev/null
fb fs location /s3/data/table.parquet
sleep 1
fb fsadmin report metrics | grep -E 'Bytes(Read|Written)(Domain|Remote|Ufs) '
fb fsadmin doctor

if [ "$once" = --once ]; then say "demo done"; exit 0; fi
say "The cluster stays up for you to try:"
cat <<EOT
  export FOREBAY_MASTER=$FOREBAY_MASTER PATH=$(dirname "$bin"):\$PATH
  forebay fs ls /s3/data          forebay fs stat /s3/data/table.parquet
  forebay fs free /s3             forebay fs load /s3/data
Stop with ctrl-c.
EOT
wait "${pids[1]}"
