#!/usr/bin/env bash
# All tests, called by ./dev test after it has built the binary. --full adds the slow ones.
set -euo pipefail
cd "$(dirname "$0")/.."
# The long forms of suites that have a short one.
if [ "${1:-}" = --full ]; then
  export FOREBAY_TEST_FLIPS=${FOREBAY_TEST_FLIPS:-10000} FOREBAY_TEST_OPERATIONS=${FOREBAY_TEST_OPERATIONS:-1000000} FOREBAY_TEST_CUTS=${FOREBAY_TEST_CUTS:-200}
  export FOREBAY_TEST_CHECKS=${FOREBAY_TEST_CHECKS:-100000} FOREBAY_TEST_KILLS=${FOREBAY_TEST_KILLS:-100} FOREBAY_TEST_FILES=${FOREBAY_TEST_FILES:-100000}
  export FOREBAY_TEST_DOWN_SECONDS=${FOREBAY_TEST_DOWN_SECONDS:-60} FOREBAY_TEST_OBJECTS=${FOREBAY_TEST_OBJECTS:-10000} FOREBAY_TEST_RATE_MIB=${FOREBAY_TEST_RATE_MIB:-256}
  export FOREBAY_TEST_MUTATIONS=${FOREBAY_TEST_MUTATIONS:-10000} FOREBAY_TEST_FUZZ_SECONDS=${FOREBAY_TEST_FUZZ_SECONDS:-60} FOREBAY_TEST_FSX=${FOREBAY_TEST_FSX:-200000} FOREBAY_TEST_STRESS=${FOREBAY_TEST_STRESS:-12} FOREBAY_TEST_FIO=${FOREBAY_TEST_FIO:-256} FOREBAY_TEST_SPARK=1 FOREBAY_TEST_FLINK=1 FOREBAY_TEST_KUBE=1 FOREBAY_TEST_NODES=${FOREBAY_TEST_NODES:-200} FOREBAY_TEST_PODS=${FOREBAY_TEST_PODS:-2000} FOREBAY_TEST_ASKS=${FOREBAY_TEST_ASKS:-500} FOREBAY_TEST_TERASORT_ROWS=${FOREBAY_TEST_TERASORT_ROWS:-10737419}
fi
bash tests/peers/versitygw.sh >/dev/null
bash tests/peers/hdfs/hdfs.sh prepare >/dev/null
bash tests/peers/contract/run.sh prepare >/dev/null
bash tests/peers/posix.sh >/dev/null
bash tests/peers/programs.sh >/dev/null
# Helm, for the chart; the whole of Kubernetes takes a quarter of an hour to build.
bash tests/peers/kube/kube.sh helm >/dev/null
[ -z "${FOREBAY_TEST_KUBE:-}" ] || bash tests/peers/kube/kube.sh prepare >/dev/null
out=$(mktemp)
trap 'rm -f "$out"' EXIT
cargo fmt --all -- --check
# Five minutes of building on two cores: the default has to end within twenty.
if [ "${1:-}" = --full ]; then cargo clippy --release --locked --workspace --all-targets -- -D warnings; fi
# One test process at a time, and within the heavy suites one test at a time: two cores, real processes.
status=0
RUST_TEST_THREADS=${RUST_TEST_THREADS:-2} cargo test --release --locked --workspace --no-fail-fast -- --nocapture 2>&1 | tee "$out" || status=$?
[ "${1:-}" = --full ] || echo "SKIPPED clippy: five minutes of building; ./dev lint and ./dev test --full run it" >>"$out"
passed=$(grep -h '^test result' "$out" | awk '{ n += $4 } END { print n + 0 }')
failed=$(grep -h '^test result' "$out" | awk '{ n += $6 } END { print n + 0 }')
skipped=$(grep -c '^SKIPPED' "$out" || true)
grep '^SKIPPED' "$out" || true
echo "$passed passed, $failed failed, $skipped skipped"
exit "$status"
