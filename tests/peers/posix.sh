#!/usr/bin/env bash
# Builds the third parties' file system tests once, at fixed versions, and prints the folder of their binaries:
# pjdfstest 0.2.2 (POSIX, BSD-2-Clause), fsx 0.3.2 (random operations beside a model, APSL-2.0; with a call that it lacks).
set -euo pipefail
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/posix
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
install() { CARGO_TARGET_DIR=$cache/target cargo install --quiet --locked --root "$cache" "$@" >&2; }
if [ ! -e "$cache/bin/pjdfstest@0.2.2" ]; then
  install pjdfstest@0.2.2
  touch "$cache/bin/pjdfstest@0.2.2"
fi
# fsx never unmaps what it reads through a mapping: after 230,000 operations it has as many mappings as Linux lets a process have (ENOMEM), and long before that every
# truncation walks tens of thousands of them. Its source is in the registry's folder once it was built; it is built again with the one call that is missing.
if [ ! -e "$cache/bin/fsx@0.3.2-unmapped" ]; then
  install --force fsx@0.3.2
  # Nothing of an attempt that was cut off, and one source, whatever registries there are.
  rm -rf "$cache/fsx"
  sources=("${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/fsx-0.3.2)
  cp -r "${sources[0]}" "$cache/fsx"
  sed -i '/fn domapread/,/^    }/ s/^\( *\)self.check_eofpage(offset, p.as_ptr(), size);/&\n\1munmap(p, map_size).unwrap();/' "$cache/fsx/src/main.rs"
  [ "$(grep -c 'munmap(p, ' "$cache/fsx/src/main.rs")" = 3 ] || { echo "fsx is not as it was when tests/peers/posix.sh was written" >&2; exit 1; }
  install --force --path "$cache/fsx"
  rm -rf "$cache/fsx"
  touch "$cache/bin/fsx@0.3.2-unmapped"
fi
rm -rf "$cache/target"
echo "$cache/bin"
