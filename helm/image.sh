#!/usr/bin/env bash
# The image: the one binary with the shared libraries it needs and the CA certificates, nothing else; no shell, not root. Made without a registry, a daemon or a
# build tool, as a docker archive:
#   helm/image.sh BINARY OUT.tar [NAME:TAG]
#   docker load -i OUT.tar          ctr -n k8s.io images import OUT.tar          skopeo copy docker-archive:OUT.tar docker://REGISTRY/forebay:0.1.0
set -euo pipefail
binary=$1 out=$2 name=${3:-forebay:0.1.0}
here=$(cd "$(dirname "$0")" && pwd)
pairs=("$binary=/usr/local/bin/forebay")
while read -r library; do pairs+=("$library=$library"); done < <(ldd "$binary" | grep -o '/[^ ]*' | sort -u)
# Names of users and hosts are looked up by libraries that are loaded when asked for.
for extra in libnss_files.so.2 libnss_dns.so.2 libresolv.so.2; do
  path=$(ldconfig -p | awk -v n="$extra" '$1 == n && !found { print $NF; found = 1 }')
  [ -z "$path" ] || pairs+=("$path=$path")
done
[ ! -s /etc/ssl/certs/ca-certificates.crt ] || pairs+=("/etc/ssl/certs/ca-certificates.crt=/etc/ssl/certs/ca-certificates.crt")
etc=$(mktemp -d)
trap 'rm -rf "$etc"' EXIT
printf 'root:x:0:0:root:/:/usr/local/bin/forebay\nforebay:x:1000:1000:Forebay:/:/usr/local/bin/forebay\n' >"$etc/passwd"
printf 'root:x:0:\nforebay:x:1000:\n' >"$etc/group"
printf 'hosts: files dns\npasswd: files\ngroup: files\n' >"$etc/nsswitch.conf"
for f in passwd group nsswitch.conf; do pairs+=("$etc/$f=/etc/$f"); done
python3 "$here/archive.py" "$out" "$name" "${pairs[@]}" --user 1000:1000 -- /usr/local/bin/forebay
echo "$out"
